"""Python literals, copied as JSON while they are read."""

import re

from stator.core.tools.json_text import MAX_DEPTH, MAX_SCALAR_CHARS, Emit, inside_quotes, quoted
from stator.core.tools.reader import NotACall, Steps, TextReader, run_of

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_SCALAR = run_of(r"\w+.\-")
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_INSIDE = {quote: re.compile(f"[\\\\{quote}]") for quote in "'\""}
_ESCAPES = {
    "n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "a": "\\u0007", "v": "\\u000b",
    "\\": "\\\\", "'": "'", '"': '\\"', "\n": "",
}  # fmt: skip
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_HEX = re.compile(r"[0-9a-fA-F]+")
_OCTAL = re.compile(r"[0-7]")


def copy_literal(reader: TextReader, emit: Emit, depth: int = 0) -> Steps[None]:
    """One literal. NotACall where it breaks, and deeper than MAX_DEPTH."""
    char = yield from reader.peek()
    if char in _INSIDE:
        yield from _copy_string(reader, emit)
    elif char in _CLOSING:
        if depth == MAX_DEPTH:
            raise NotACall
        yield from _copy_composite(reader, emit, depth)
    else:
        emit(_scalar_as_json((yield from reader.run(_SCALAR, MAX_SCALAR_CHARS))))


def _scalar_as_json(text: str) -> str:
    if text in _WORDS:
        return _WORDS[text]
    if _NUMBER.fullmatch(text):
        return text
    try:
        return str(int(text, 0)) if len(text) < 64 else _refuse()
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        raise NotACall from None
    return repr(value) if abs(value) != float("inf") and value == value else _refuse()


def _refuse() -> str:
    raise NotACall


def _copy_composite(reader: TextReader, emit: Emit, depth: int) -> Steps[None]:
    opening = yield from reader.expect(*_CLOSING)
    closing = _CLOSING[opening]
    is_object = opening == "{"
    emit("{" if is_object else "[")
    yield from reader.space()
    closed = yield from reader.accept(closing)
    while not closed:
        if is_object:
            yield from _copy_key(reader, emit)
        yield from copy_literal(reader, emit, depth + 1)
        yield from reader.space()
        closed = (yield from reader.expect(",", closing)) == closing
        if not closed:
            yield from reader.space()
            closed = yield from reader.accept(closing)
            emit("" if closed else ", ")
    emit("}" if is_object else "]")


def _copy_key(reader: TextReader, emit: Emit) -> Steps[None]:
    """A dict's key and its colon. JSON has strings only, so a number or word is quoted."""
    if (yield from reader.peek()) in _INSIDE:
        yield from _copy_string(reader, emit)
    else:
        emit(quoted(_scalar_as_json((yield from reader.run(_SCALAR, MAX_SCALAR_CHARS)))))
    yield from reader.space()
    yield from reader.expect(":")
    yield from reader.space()
    emit(": ")


def _copy_string(reader: TextReader, emit: Emit) -> Steps[None]:
    """In single, double or tripled quotes. The decoding of escapes is Python's; no prefixes."""
    quote = yield from reader.expect("'", '"')
    end = quote
    if (yield from reader.accept(quote)):
        if not (yield from reader.accept(quote)):
            emit('""')
            return
        end = quote * 3
    emit('"')
    inside = _INSIDE[quote]
    while not (yield from reader.accept(end)):
        text, start = yield from reader.available()
        found = inside.search(text, start)
        if found is None or found.start() > start:
            emit(inside_quotes(reader.take_to(len(text) if found is None else found.start())))
        elif found.group() == quote:
            emit(inside_quotes(reader.take_to(start + 1)))
        else:
            reader.take_to(start + 1)
            yield from _copy_escape(reader, emit)
    emit('"')


def _copy_escape(reader: TextReader, emit: Emit) -> Steps[None]:
    _, start = yield from reader.available()
    char = reader.take_to(start + 1)
    if char in _ESCAPES:
        emit(_ESCAPES[char])
    elif char in _HEX_DIGITS:
        digits = yield from _digits(reader, _HEX, _HEX_DIGITS[char])
        emit(_escaped(int(digits, 16)))
    elif _OCTAL.match(char):
        digits = char
        while len(digits) < 3 and _OCTAL.match((yield from reader.peek())):
            digits += yield from _digits(reader, _OCTAL, 1)
        emit(_escaped(int(digits, 8)))
    else:
        emit(inside_quotes("\\" + char))


def _digits(reader: TextReader, pattern: re.Pattern[str], num: int) -> Steps[str]:
    digits = ""
    while len(digits) < num:
        text, start = yield from reader.available()
        if not pattern.match(text, start):
            raise NotACall
        digits += reader.take_to(start + 1)
    return digits


def _escaped(code: int) -> str:
    """A character of a JSON string. Halves of a surrogate pair stay escapes: two of them make one character."""
    if code > 0x10FFFF:
        raise NotACall
    return f"\\u{code:04x}" if 0xD800 <= code <= 0xDFFF else inside_quotes(chr(code))
