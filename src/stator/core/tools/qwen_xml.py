"""Qwen3-Coder and Qwen 3.5, XML form:

    <tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>…</function>\\n</tool_call>

Models leave out `<tool_call>` at times, and `</parameter>` before the next tag; both are understood. One newline on
each side of a value is markup. Values are bare text; the parameter's schema says what they are, and a string is handed
on while it comes. What is read as something else is held till it is whole.
"""

from collections.abc import Mapping
from typing import Any

from stator.core.tools.base import MAX_KEY_CHARS, MAX_NAME_CHARS, CallParser
from stator.core.tools.json_text import Emit, inside_quotes, quoted
from stator.core.tools.reader import Markers, NotACall, Steps
from stator.core.tools.schema_types import allowed_types, is_plain_string, property_schema, to_json

START = "<tool_call>"
END = "</tool_call>"
FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"
_STARTS = Markers(START, FUNCTION)
_TAG_ENDS = Markers(">", "\n")
# Without the newline, a value that holds such a tag itself would be cut short.
_VALUE_ENDS = Markers(PARAMETER_END, "\n" + PARAMETER, "\n" + FUNCTION_END)


class QwenXmlParser(CallParser):
    def _parse(self) -> Steps[None]:
        while opening := (yield from self._reader.until(_STARTS, self._content)):
            if not (yield from self._attempt(self._call(opening), opening)):
                continue
            while (yield from self._attempt(self._next_function())):
                pass
            yield from self._closing(END)

    def _next_function(self) -> Steps[None]:
        yield from self._reader.space()
        yield from self._reader.expect(FUNCTION)
        yield from self._call(FUNCTION)

    def _call(self, opening: str) -> Steps[None]:
        reader = self._reader
        if opening == START:
            yield from reader.space()
            yield from reader.expect(FUNCTION)
        name = yield from self._tag_value(MAX_NAME_CHARS)
        yield from reader.space()
        tag = yield from reader.expect(PARAMETER, FUNCTION_END)
        self._start(name)
        self._arguments("{")
        parameters = self._tools.parameters.get(name)
        separator = ""
        while tag == PARAMETER:
            key = yield from self._tag_value(MAX_KEY_CHARS)
            self._arguments(f"{separator}{quoted(key)}: ")
            separator = ", "
            tag = yield from self._value(key, parameters)
        self._arguments("}")
        self._end()

    def _tag_value(self, max_chars: int) -> Steps[str]:
        text, marker = yield from self._reader.text_until(_TAG_ENDS, max_chars)
        text = text.strip().strip("\"'")
        if marker != ">" or not text:
            raise NotACall
        return text

    def _value(self, key: str, parameters: Mapping[str, Any] | None) -> Steps[str]:
        """A parameter's value, and the tag behind it."""
        types = allowed_types(property_schema(parameters, key), parameters)
        if is_plain_string(types):
            value = _StringValue(self._arguments)
        else:
            value = _TypedValue(self._arguments, types, self._limits.max_call_chars)
        yield from self._reader.accept("\n")
        marker = yield from self._reader.until(_VALUE_ENDS, value.add)
        if not marker:
            value.break_off()
            raise NotACall
        # Of the newlines before a tag, the last is markup; in the short forms the marker has it.
        value.close(strip_newline=marker == PARAMETER_END)
        if marker != PARAMETER_END:
            return marker[1:]
        yield from self._reader.space()
        return (yield from self._reader.expect(PARAMETER, FUNCTION_END))


class _StringValue:
    """A string, handed on as it comes, but for its last newline, which may be markup."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._newline = ""
        emit('"')

    def add(self, text: str) -> None:
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        text = text[: len(text) - len(self._newline)]
        if text:
            self._emit(inside_quotes(text))

    def close(self, *, strip_newline: bool) -> None:
        if self._newline and not strip_newline:
            self._emit("\\n")
        self._emit('"')

    def break_off(self) -> None:
        if self._newline:
            self._emit("\\n")


class _TypedValue:
    """A value whose type only its whole text shows. Past max_chars it is handed on as it is."""

    def __init__(self, emit: Emit, types: frozenset[str], max_chars: int) -> None:
        self._emit = emit
        self._types = types
        self._num_left = max_chars
        self._pieces: list[str] = []

    def add(self, text: str) -> None:
        self._pieces.append(text)
        self._num_left -= len(text)
        if self._num_left < 0:
            self.break_off()

    def close(self, *, strip_newline: bool) -> None:
        if self._num_left < 0:
            self.break_off()
            return
        text = "".join(self._pieces)
        self._emit(to_json(text.removesuffix("\n") if strip_newline else text, self._types))

    def break_off(self) -> None:
        self._emit("".join(self._pieces))
        self._pieces.clear()
