"""Mistral. Early tokenizers: `[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]`; from version 11 on one marker a call:
`[TOOL_CALLS]f{…}`, `[TOOL_CALLS]f[ARGS]{…}`, and `[CALL_ID]…` before the arguments in between."""

from stator.core.tools.base import MAX_NAME_CHARS, CallParser
from stator.core.tools.json_text import copy_composite
from stator.core.tools.reader import Markers, NotACall, Steps, run_of

START = "[TOOL_CALLS]"
ARGS = "[ARGS]"
CALL_ID = "[CALL_ID]"
_STARTS = Markers(START)
_NAME = run_of(r"\w.\-")
_ID = run_of(r"a-zA-Z0-9")
ID_CHARS = 9
"""Of a call's id: Mistral's templates refuse others."""


class MistralParser(CallParser):
    def _parse(self) -> Steps[None]:
        while (yield from self._reader.until(_STARTS, self._content)):
            yield from self._attempt(self._calls(), START)

    def _calls(self) -> Steps[None]:
        yield from self._reader.space()
        if (yield from self._reader.peek()) == "[":
            yield from self._call_list()
        else:
            yield from self._named_call()

    def _named_call(self) -> Steps[None]:
        reader = self._reader
        name = yield from reader.run(_NAME, MAX_NAME_CHARS)
        if not name:
            raise NotACall
        call_id: str | None = None
        yield from reader.space()
        if (yield from reader.accept(CALL_ID)):
            call_id = yield from reader.run(_ID, ID_CHARS)
        yield from reader.accept(ARGS)
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            raise NotACall
        self._start(name, call_id if call_id is not None and len(call_id) == ID_CHARS else None)
        yield from copy_composite(reader, self._arguments)
        self._end()
