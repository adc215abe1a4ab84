"""Reasoning between two markers: `<think>…</think>` of Qwen, DeepSeek, Nemotron, GLM; `[THINK]…[/THINK]` of Mistral.

An output begins in its reasoning if the chat template wrote the opening marker into the prompt (`is_open`), or if the
marker is the first thing in the output. Later ones are text: an answer may speak of them. Without the closing marker
all that follows is reasoning. White space around the markers is markup.
"""

from dataclasses import dataclass

from stator.core.tools.events import Reasoning
from stator.core.tools.parser import StepsParser
from stator.core.tools.reader import Markers, NotACall, Steps
from stator.core.tools.trailing_space import MAX_SPACE_CHARS, TrailingSpace

_PROMPT_TAIL_CHARS = 4096


@dataclass(frozen=True, slots=True)
class TagFormat:
    """start, end: the markers. implicit_ends: markup that ends the reasoning too, and belongs to what follows.

    assumed_open: the model reasons from its first token even where the prompt does not say so (DeepSeek-R1).
    """

    start: str
    end: str
    implicit_ends: tuple[str, ...] = ()
    assumed_open: bool = False

    def is_open(self, prompt: str) -> bool:
        """Whether the output to this prompt begins in reasoning. The prompt's end is enough."""
        tail = prompt[-_PROMPT_TAIL_CHARS:].rstrip()
        if tail.endswith(self.start):
            return True
        return self.assumed_open and not tail.endswith(self.end)


class TagReasoningParser(StepsParser):
    """is_open: of the output's prompt (`TagFormat.is_open`)."""

    def __init__(self, format: TagFormat, *, is_open: bool) -> None:
        self._format = format
        self._is_open = is_open
        self._ends = Markers(format.end, *format.implicit_ends)
        self._space = TrailingSpace()
        super().__init__(MAX_SPACE_CHARS)

    def _parse(self) -> Steps[None]:
        reader, format = self._reader, self._format
        if not (yield from self._opened()):
            self._content(reader.recorded())
            yield from self._rest()
            return
        reader.recorded()
        yield from reader.space()
        marker = yield from reader.until(self._ends, self._reasoning)
        if marker == format.end:
            yield from reader.space()
        elif marker:
            self._content(marker)
        yield from self._rest()

    def _opened(self) -> Steps[bool]:
        if self._is_open:
            yield from self._reader.space()
            yield from self._reader.accept(self._format.start)  # some models repeat the prompt's
            return True
        self._reader.record()
        try:
            yield from self._reader.space()
            yield from self._reader.expect(self._format.start)
        except NotACall:
            return False
        return True

    def _rest(self) -> Steps[None]:
        while (yield from self._reader.peek()):
            text, _ = yield from self._reader.available()
            self._content(self._reader.take_to(len(text)))

    def _reasoning(self, text: str) -> None:
        shown = self._space.add(text)
        if shown:
            self._events.append(Reasoning(shown))
