"""The text of one output: detokenized, cut at a stop string."""

from collections.abc import Collection, Sequence

from stator.core.detokenize import Detokenizer
from stator.core.stop_strings import StopStringMatcher


class OutputText:
    """Turns token ids into the text that a client gets.

    stops: the output ends before the first of these. min_tokens: stop strings are not looked for in the text of that
    many first tokens. stop_ids: a token that ends the output and is one of these shows no text.

    After each push, `num_tokens` is how many tokens belong to the output: all, or those up to the end of the match.
    """

    __slots__ = ("_detokenizer", "_matcher", "_min_tokens", "_stop_ids", "num_tokens", "stopped")

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], *, min_tokens: int, stop_ids: Collection[int]
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopStringMatcher(stops) if stops else None
        self._min_tokens = min_tokens
        self._stop_ids = stop_ids
        self.num_tokens = 0
        self.stopped = False
        """A stop string was found; push no more."""

    @property
    def stop_string(self) -> str | None:
        """The one that ended the output."""
        return None if self._matcher is None else self._matcher.matched

    def push(self, token_ids: Sequence[int]) -> str:
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        return self._push_matching(token_ids, self._matcher)

    def push_last(self, token_ids: Sequence[int], *, stopped: bool) -> str:
        """The last ids and everything held back. stopped: the engine ended the output at a token of stop_ids."""
        if not (stopped and token_ids and token_ids[-1] in self._stop_ids):
            return self.push(token_ids) + self._flush()
        text = self.push(token_ids[:-1])
        if not self.stopped:
            self.num_tokens += 1
        return text + self._flush()

    def _push_matching(self, token_ids: Sequence[int], matcher: StopStringMatcher) -> str:
        """Token by token, so that where the output ends does not depend on how tokens were put together."""
        out: list[str] = []
        for token_id in token_ids:
            self.num_tokens += 1
            text = self._detokenizer.push((token_id,))
            if self.num_tokens <= self._min_tokens:
                out.append(text)
                continue
            out.append(matcher.feed(text))
            if matcher.matched is not None:
                self.stopped = True
                break
        return "".join(out)

    def _flush(self) -> str:
        if self.stopped:
            return ""
        matcher = self._matcher
        if matcher is None:
            return self._detokenizer.flush()
        text = matcher.feed(self._detokenizer.flush())
        self.stopped = matcher.matched is not None
        return text if self.stopped else text + matcher.flush()
