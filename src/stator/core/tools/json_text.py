"""JSON text, copied while it is read.

Structure is followed (strings, escapes, brackets that match), the rest is taken as it is written: what a model writes
as a call's arguments is the client's to judge. Raw control characters in strings, which models write and JSON forbids,
are escaped on the way.
"""

import json
import re
from collections.abc import Callable

from stator.core.tools.reader import NotACall, Steps, TextReader, run_of

Emit = Callable[[str], None]

MAX_DEPTH = 64
"""Brackets in brackets; common JSON readers stop at a few hundred."""
MAX_SCALAR_CHARS = 1024

_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_SCALAR = run_of(r"\w+.\-")
_CLOSING = {"{": "}", "[": "]"}
CONTROL = {code: f"\\u{code:04x}" for code in range(0x20)} | {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r"}
"""str.translate table: control characters as JSON strings spell them."""


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def inside_quotes(text: str) -> str:
    """A piece of a JSON string's inside."""
    return quoted(text)[1:-1]


def copy_value(reader: TextReader, emit: Emit) -> Steps[None]:
    """One value of any kind. NotACall where it breaks: what breaks it is not consumed."""
    char = yield from reader.peek()
    if char in ("{", "["):
        yield from copy_composite(reader, emit)
    elif char == '"':
        yield from copy_string(reader, emit)
    else:
        emit((yield from scalar(reader)))


def scalar(reader: TextReader) -> Steps[str]:
    """A number, true, false, null, or any other word."""
    text = yield from reader.run(_SCALAR, MAX_SCALAR_CHARS)
    if not text:
        raise NotACall
    return text


def copy_composite(reader: TextReader, emit: Emit) -> Steps[None]:
    """An object or a list, from its bracket to the one that closes it."""
    closing: list[str] = []
    while True:
        text, start = yield from reader.available()
        found = _STRUCTURE.search(text, start)
        if found is None:
            emit(reader.take_to(len(text)))
            continue
        if found.start() > start:
            emit(reader.take_to(found.start()))
        char = found.group()
        if char == '"':
            yield from copy_string(reader, emit)
            continue
        if char in _CLOSING:
            if len(closing) == MAX_DEPTH:
                raise NotACall
            closing.append(_CLOSING[char])
        elif closing.pop() != char:
            raise NotACall
        emit(reader.take_to(found.end()))
        if not closing:
            return


def copy_string(reader: TextReader, emit: Emit) -> Steps[None]:
    """A string with its quotes."""
    yield from reader.expect('"')
    emit('"')
    while True:
        text, start = yield from reader.available()
        found = _IN_STRING.search(text, start)
        if found is None:
            emit(reader.take_to(len(text)))
            continue
        if found.start() > start:
            emit(reader.take_to(found.start()))
        char = reader.take_to(found.end())
        if char == "\\":
            emit(char)
            text, start = yield from reader.available()
            char = reader.take_to(start + 1)
            emit(CONTROL[ord(char)][1:] if ord(char) in CONTROL else char)
            continue
        emit(char.translate(CONTROL))
        if char == '"':
            return


def read_string(reader: TextReader, max_chars: int) -> Steps[str]:
    """A string, decoded. NotACall if it is none, or longer than max_chars as it is written."""
    pieces: list[str] = []
    num_chars = 0

    def keep(piece: str) -> None:
        nonlocal num_chars
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > max_chars:
            raise NotACall

    yield from copy_string(reader, keep)
    try:
        return json.loads("".join(pieces))
    except ValueError:
        raise NotACall from None
