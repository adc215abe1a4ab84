"""Granite 3.2: `Here is my thought process: … Here is my response: …`, also spelled `Here's`.

Only at the output's beginning; anything else there is an answer without reasoning.
"""

from stator.core.tools.events import Reasoning
from stator.core.tools.parser import StepsParser
from stator.core.tools.reader import Markers, NotACall, Steps
from stator.core.tools.trailing_space import MAX_SPACE_CHARS, TrailingSpace

STARTS = ("Here is my thought process:", "Here's my thought process:")
ENDS = Markers("Here is my response:", "Here's my response:")


class GraniteReasoningParser(StepsParser):
    def __init__(self) -> None:
        self._space = TrailingSpace()
        super().__init__(MAX_SPACE_CHARS)

    def _parse(self) -> Steps[None]:
        reader = self._reader
        if (yield from self._opened()):
            yield from reader.space()
            if (yield from reader.until(ENDS, self._reasoning)):
                yield from reader.space()
        self._content(reader.recorded())
        while (yield from reader.peek()):
            text, _ = yield from reader.available()
            self._content(reader.take_to(len(text)))

    def _opened(self) -> Steps[bool]:
        self._reader.record()
        try:
            yield from self._reader.space()
            yield from self._reader.expect(*STARTS)
        except NotACall:
            return False
        self._reader.recorded()
        return True

    def _reasoning(self, text: str) -> None:
        shown = self._space.add(text)
        if shown:
            self._events.append(Reasoning(shown))
