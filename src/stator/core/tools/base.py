"""What the parsers share: the life of a call, its bounds, and calls written as JSON objects."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stator.core.tools.events import CallArguments, CallEnded, CallStarted
from stator.core.tools.json_text import copy_composite, copy_value, read_string, scalar
from stator.core.tools.parser import StepsParser
from stator.core.tools.reader import NotACall, Steps

NewId = Callable[[], str]
"""Makes the id of a call; injected, as all randomness is."""

MAX_NAME_CHARS = 256
MAX_KEY_CHARS = 1024
_CLOSING_JUNK_CHARS = 64
_JUNK = re.compile(r"[}\]\s]+")


@dataclass(frozen=True, slots=True)
class Limits:
    """max_calls: calls of one output. max_call_chars: of one call's arguments, and of text held to see what it is."""

    max_calls: int = 128
    max_call_chars: int = 1 << 20


@dataclass(frozen=True, slots=True)
class ToolSet:
    """parameters: the JSON schema of each declared function's parameters, by its name; None for one without."""

    parameters: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict[str, "Mapping[str, Any] | None"])

    def __contains__(self, name: str) -> bool:
        return name in self.parameters


class CallParser(StepsParser):
    """One family is a subclass with `_parse`: a generator over `self._reader` that returns when the text is over.

    `_parse` reports with `_content`, `_start`, `_arguments`, `_end`; `_attempt` runs a part that may turn out to be no
    call.
    """

    def __init__(self, tools: ToolSet, new_id: NewId, limits: Limits | None = None) -> None:
        self._tools = tools
        self._new_id = new_id
        self._limits = limits or Limits()
        self._num_calls = 0
        self._num_argument_chars = 0
        self._open = False
        super().__init__(self._limits.max_call_chars)

    def _start(self, name: str, call_id: str | None = None) -> None:
        """From here on the call is one; what was recorded is its markup."""
        if self._num_calls == self._limits.max_calls:
            raise NotACall
        self._reader.recorded()
        self._open = True
        self._num_argument_chars = 0
        self._events.append(CallStarted(self._num_calls, call_id or self._new_id(), name))
        self._num_calls += 1

    def _arguments(self, text: str) -> None:
        """Past the bound, the call is ended and what still comes of it is content."""
        if self._open:
            room = self._limits.max_call_chars - self._num_argument_chars
            self._num_argument_chars += len(text)
            self._events.append(CallArguments(self._num_calls - 1, text[:room]))
            if len(text) <= room:
                return
            self._end(complete=False)
            text = text[room:]
        self._content(text)

    def _end(self, *, complete: bool = True) -> None:
        if self._open:
            self._open = False
            self._events.append(CallEnded(self._num_calls - 1, complete))

    def _attempt(self, part: Steps[None], opening: str = "") -> Steps[bool]:
        """Read what may be a call. opening: markup before it that is consumed already.

        True if there was a call and its last one is whole, even if the markup behind it is not. What belongs to no
        call is content, and reading goes on behind it.
        """
        num_before = self._num_calls
        self._reader.record()
        try:
            yield from part
        except NotACall:
            if self._open:
                self._end(complete=False)
                self._content(self._reader.recorded())
                return False
            if self._num_calls == num_before:
                self._content(opening)
            self._content(self._reader.recorded())
        self._reader.recorded()
        return self._num_calls > num_before

    # Calls as JSON objects

    def _may_be_called(self, name: str) -> bool:
        """For families without markup of their own: `name in self._tools`."""
        return bool(name)

    def _may_be_a_member(self, key: str) -> bool:
        """Of a call's object, beside name and arguments."""
        return bool(key)

    def _object_call(self) -> Steps[None]:
        """{"name": …, "arguments": {…}}, members in any order, also "parameters"; other members are left out.

        Ends with the object; NotACall before the start if it is no such object, after it if it breaks off.
        """
        reader = self._reader
        name: str | None = None
        held: list[str] | None = None
        called = False
        yield from reader.expect("{")
        yield from reader.space()
        closed = yield from reader.accept("}")
        while not closed:
            key = yield from read_string(reader, MAX_KEY_CHARS)
            yield from reader.space()
            yield from reader.expect(":")
            yield from reader.space()
            if key == "name" and name is None:
                name = yield from self._name()
            elif key in ("arguments", "parameters") and held is None and not called:
                if name is None:
                    held = []
                    yield from self._argument_value(held.append)
                else:
                    called = True
                    yield from self._argument_value(self._starter(name))
                    self._end()
            elif called or self._may_be_a_member(key):
                yield from copy_value(reader, _drop)
            else:
                raise NotACall
            yield from reader.space()
            closed = (yield from reader.expect(",", "}")) == "}"
            yield from reader.space() if not closed else _nothing()
        if name is None:
            raise NotACall
        if not called:
            self._whole_call(name, "".join(held or ("{}",)))

    def _call_list(self) -> Steps[None]:
        """[{…}, {…}]"""
        reader = self._reader
        yield from reader.expect("[")
        more = True
        while more:
            yield from reader.space()
            yield from self._object_call()
            yield from reader.space()
            more = (yield from reader.expect(",", "]")) == ","

    def _name(self) -> Steps[str]:
        name = yield from read_string(self._reader, MAX_NAME_CHARS)
        if not self._may_be_called(name):
            raise NotACall
        return name

    def _starter(self, name: str) -> Callable[[str], None]:
        """Starts the call with the arguments' first piece, so that what is no object is no call."""
        started = False

        def emit(text: str) -> None:
            nonlocal started
            if not started:
                started = True
                self._start(name)
            self._arguments(text)

        return emit

    def _whole_call(self, name: str, arguments: str, call_id: str | None = None) -> None:
        self._start(name, call_id)
        self._arguments(arguments)
        self._end()

    def _argument_value(self, emit: Callable[[str], None]) -> Steps[None]:
        """An object; or null for none; or an object's text in a string, which some models write."""
        char = yield from self._reader.peek()
        if char == "{":
            yield from copy_composite(self._reader, emit)
        elif char == '"':
            text = yield from read_string(self._reader, self._limits.max_call_chars)
            emit(_object_text(text))
        elif (yield from scalar(self._reader)) == "null":
            emit("{}")
        else:
            raise NotACall

    def _closing(self, *markers: str) -> Steps[None]:
        """The markup behind a call: one of the markers, and brackets too many before it. Without a marker: content."""
        yield from self._attempt(self._marker_behind_junk(markers))

    def _marker_behind_junk(self, markers: tuple[str, ...]) -> Steps[None]:
        yield from self._reader.run(_JUNK, _CLOSING_JUNK_CHARS)
        yield from self._reader.expect(*markers)


def _drop(text: str) -> None:
    """Takes the text of what nobody asked for."""


def _nothing() -> Steps[None]:
    return
    yield


def _object_text(text: str) -> str:
    """NotACall unless the text is a JSON object."""
    if not text.strip():
        return "{}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise NotACall from None
    if not isinstance(value, dict):
        raise NotACall
    return text
