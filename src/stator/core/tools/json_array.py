"""All calls of an output in one JSON list behind a marker: Nemotron, Granite 3, Phi-4-mini, Jamba, early Mistral.

`<TOOLCALL>[{"name": "f", "arguments": {…}}, …]</TOOLCALL>` and the like.
"""

from collections.abc import Sequence

from stator.core.tools.base import CallParser, Limits, NewId, ToolSet
from stator.core.tools.reader import Markers, Steps


class JsonArrayParser(CallParser):
    """starts: markers that a list follows. end: the one behind it, "" for none."""

    def __init__(
        self, tools: ToolSet, new_id: NewId, limits: Limits | None = None, *, starts: Sequence[str], end: str
    ) -> None:
        self._starts = Markers(*starts)
        self._closing_marker = end
        super().__init__(tools, new_id, limits)

    def _parse(self) -> Steps[None]:
        while opening := (yield from self._reader.until(self._starts, self._content)):
            called = yield from self._attempt(self._array(), opening)
            if called and self._closing_marker:
                yield from self._closing(self._closing_marker)

    def _array(self) -> Steps[None]:
        yield from self._reader.space()
        yield from self._call_list()
