"""What an answer says of its tokens beside their text: probabilities, ids, the prompt again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from stator.core.detokenize import Detokenizer
from stator.errors import ErrorCode, StatorError
from stator.messages.engine import SamplingParams, TokenDelta, TokenScore
from stator.messages.processor import Alternative, PromptDetails, ScoredToken, TokenDetails
from stator.processor.answer_form import AnswerReader
from stator.processor.answer_options import AnswerOptions


class Vocabulary(Protocol):
    """Of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for by itself; a special token's own text."""
        ...

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer: ...


@dataclass(frozen=True, slots=True)
class Told:
    """What goes into one delta."""

    tokens: TokenDetails | None = None
    prompt: PromptDetails | None = None


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """Of a choice. text: what `echo` shows. asks_scores: whether this choice gets the prompt's probabilities from its
    engine; else they come from elsewhere, or are not wanted."""

    ids: Sequence[int]
    text: str = ""
    asks_scores: bool = False


class Details:
    """One choice's. What was told is kept with the choice, not with an attempt: one that goes on elsewhere asks only
    for what is left."""

    def __init__(
        self,
        options: AnswerOptions,
        vocabulary: Vocabulary,
        prompt: ShownPrompt,
        reader: AnswerReader | None = None,
    ) -> None:
        """reader: of what the text is more than text."""
        self.reader = reader
        self.shows_output = not options.prompt_only
        self.continuous_usage = options.continuous_usage
        self._options = options
        self._vocabulary = vocabulary
        self._prompt: ShownPrompt | None = prompt
        self._pieces = _Pieces(vocabulary)
        self._offsets: Callable[[Sequence[int]], list[int]] | None = None
        if options.text_offsets:
            start = len(prompt.text) if options.echo else 0
            self._offsets = _Offsets(vocabulary.detokenizer(skip_special_tokens=options.skip_special_tokens), start)

    def left_to_ask(self, sampling: SamplingParams) -> SamplingParams:
        """The sampling parameters of the next attempt."""
        if self._prompt is not None or sampling.prompt_logprobs is None:
            return sampling
        return msgspec.structs.replace(sampling, prompt_logprobs=None)

    def take(self, token_ids: Sequence[int], deltas: Sequence[TokenDelta], num_counted: int) -> Told:
        """num_counted: how many of token_ids belong to the output; what is behind a stop string does not."""
        prompt, self._prompt = self._prompt, None
        told_prompt = None if prompt is None else self._of_prompt(prompt, deltas[0])
        ids = list(token_ids[:num_counted])
        scores = None
        if self._options.num_top is not None and self.shows_output:
            scores = [score for delta in deltas for score in delta.scores or ()]
            if len(scores) < num_counted:
                raise StatorError(ErrorCode.PROTOCOL, "the engine gave tokens without their probabilities")
            offsets = [0] * num_counted if self._offsets is None else self._offsets(ids)
            told = [
                self._scored(token_id, score, offset)
                for token_id, score, offset in zip(ids, scores, offsets, strict=False)
            ]
            return Told(TokenDetails(ids if self._options.token_ids else None, told), told_prompt)
        return Told(TokenDetails(ids) if self._options.token_ids else None, told_prompt)

    def _of_prompt(self, prompt: ShownPrompt, first: TokenDelta) -> PromptDetails | None:
        options = self._options
        text = prompt.text if options.echo else None
        ids = list(prompt.ids) if options.token_ids else None
        scores = None
        if prompt.asks_scores:
            scores = self._prompt_scores(prompt, first.prompt_scores or [])
        if text is None and ids is None and scores is None:
            return None
        return PromptDetails(text, ids, scores)

    def _prompt_scores(self, prompt: ShownPrompt, scores: Sequence[TokenScore]) -> list[ScoredToken]:
        if len(scores) != len(prompt.ids) - 1:
            raise StatorError(ErrorCode.PROTOCOL, "the engine did not give the probabilities of the prompt's tokens")
        offsets = [0] * len(prompt.ids)
        if self._options.text_offsets:
            offsets = _Offsets(self._vocabulary.detokenizer(skip_special_tokens=True), 0)(prompt.ids)
        first = ScoredToken(self._pieces.alternative(prompt.ids[0]), [], offsets[0])
        rest = zip(prompt.ids[1:], scores, offsets[1:], strict=True)
        return [first, *(self._scored(token_id, score, offset) for token_id, score, offset in rest)]

    def _scored(self, token_id: int, score: TokenScore, offset: int) -> ScoredToken:
        make = self._pieces.alternative
        ranked = enumerate(zip(score.top_ids, score.top_logprobs, strict=True), 1)
        top = [make(other, logprob, rank) for rank, (other, logprob) in ranked]
        return ScoredToken(make(token_id, score.logprob, score.rank), top, offset)


class _Pieces:
    """Tokens as they are shown by themselves."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def alternative(self, token_id: int, logprob: float | None = None, rank: int = 0) -> Alternative:
        raw = self._vocabulary.token_bytes(token_id)
        return Alternative(token_id, raw.decode("utf-8", "replace"), raw, logprob, rank)


class _Offsets:
    """Where tokens begin in the text that they make: behind the characters that are whole before them."""

    def __init__(self, detokenizer: Detokenizer, start: int) -> None:
        self._detokenizer = detokenizer
        self._num_chars = start

    def __call__(self, token_ids: Sequence[int]) -> list[int]:
        offsets: list[int] = []
        for token_id in token_ids:
            offsets.append(self._num_chars)
            self._num_chars += len(self._detokenizer.push((token_id,)))
        return offsets
