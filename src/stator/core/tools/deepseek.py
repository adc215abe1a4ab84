"""DeepSeek. V3 and R1 write the arguments as a fenced block behind the name, V3.1 writes the name first:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{…}\\n```<｜tool▁call▁end｜>…
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>

Which of the two is told by what follows the separator. A call whose section was not opened is a call too.
"""

from stator.core.tools.base import MAX_NAME_CHARS, CallParser
from stator.core.tools.json_text import copy_composite
from stator.core.tools.reader import Markers, NotACall, Steps

CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
_STARTS = Markers(CALLS_BEGIN, CALL_BEGIN)
_SEPARATORS = Markers(SEPARATOR)
_LINE_ENDS = Markers("\n")
_FENCES = ("```json", "```")


class DeepSeekParser(CallParser):
    def _parse(self) -> Steps[None]:
        while opening := (yield from self._reader.until(_STARTS, self._content)):
            yield from self._attempt(self._calls(opening), opening)

    def _calls(self, opening: str) -> Steps[None]:
        reader = self._reader
        if opening == CALLS_BEGIN:
            yield from reader.space()
            yield from reader.expect(CALL_BEGIN)
        yield from self._call()
        while (yield from self._attempt(self._next_call())):
            pass
        yield from self._attempt(self._marker_behind_junk((CALLS_END,)))

    def _next_call(self) -> Steps[None]:
        yield from self._reader.space()
        yield from self._reader.expect(CALL_BEGIN)
        yield from self._call()

    def _call(self) -> Steps[None]:
        reader = self._reader
        name, _ = yield from reader.text_until(_SEPARATORS, MAX_NAME_CHARS)
        yield from reader.space()
        fenced = (yield from reader.peek()) != "{"
        if fenced:
            name, _ = yield from reader.text_until(_LINE_ENDS, MAX_NAME_CHARS)
            yield from reader.space()
            yield from reader.accept(*_FENCES)
            yield from reader.space()
        if (yield from reader.peek()) != "{" or not name.strip():
            raise NotACall
        self._start(name.strip())
        yield from copy_composite(reader, self._arguments)
        self._end()
        yield from self._attempt(self._call_end(fenced=fenced))

    def _call_end(self, *, fenced: bool) -> Steps[None]:
        yield from self._reader.space()
        if fenced:
            yield from self._reader.accept("```")
        yield from self._marker_behind_junk((CALL_END,))
