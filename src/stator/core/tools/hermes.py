"""Hermes, Qwen 2.5 and 3, Granite 4: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, one tag a call."""

from stator.core.tools.base import CallParser
from stator.core.tools.reader import Markers, Steps

START = "<tool_call>"
END = "</tool_call>"
_STARTS = Markers(START)


class HermesParser(CallParser):
    def _parse(self) -> Steps[None]:
        while (yield from self._reader.until(_STARTS, self._content)):
            if (yield from self._attempt(self._call(), START)):
                yield from self._closing(END)

    def _call(self) -> Steps[None]:
        yield from self._reader.space()
        yield from self._object_call()
