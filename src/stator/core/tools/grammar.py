"""Trees of `messages.grammar` in the words of two grammar backends.

`to_lark` is what llguidance reads, `to_structural_tag` xgrammar (vLLM's `structural_tag`). A tree's nodes may be
shared; llguidance gets one rule for each.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from stator.messages.grammar import Choice, Json, Literal, Node, Regex, Repeat, Sequence, TextUntil

NOTHING = Sequence(())


def optional(node: Node) -> Choice:
    return Choice((node, NOTHING))


def _split_tokens(text: str, special_tokens: Mapping[str, int]) -> list[tuple[str, int | None]]:
    """Pieces of a literal, each with its id if it is a special token."""
    found = [token for token in special_tokens if token and token in text]
    if not found:
        return [(text, None)] if text else []
    pattern = "|".join(re.escape(token) for token in sorted(found, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text)
    return [(piece, special_tokens.get(piece)) for piece in pieces if piece]


def to_lark(node: Node, special_tokens: Mapping[str, int] | None = None) -> str:
    """A grammar in llguidance's dialect of Lark, with the rule `start`. special_tokens: text to id."""
    return _Lark(special_tokens or {}).grammar(node)


class _Lark:
    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._special_tokens = special_tokens
        self._rules: list[str] = []
        self._names: dict[int, str] = {}

    def grammar(self, node: Node) -> str:
        body = self._body(node)
        return "\n".join(["%llguidance {}", f"start: {body}", *self._rules, ""])

    def _name(self, node: Node) -> str:
        name = self._names.get(id(node))
        if name is None:
            name = self._names[id(node)] = f"r{len(self._names)}"
            attributes = "[lazy]" if isinstance(node, TextUntil) and not self._is_token(node.end) else ""
            self._rules.append(f"{name}{attributes}: {self._body(node)}")
        return name

    def _is_token(self, text: str) -> bool:
        return text in self._special_tokens

    def _body(self, node: Node) -> str:
        match node:
            case Literal(text):
                return self._literal(text)
            case Json(schema):
                return f"%json {json.dumps({**schema, **_SPACED_AS_TRAINED})}"
            case Regex(pattern):
                return f"/{_SLASH.sub(_escaped_slash, pattern)}/"
            case TextUntil(end) if self._is_token(end):
                return f"/(?s:.*)/ {self._literal(end)}"
            case TextUntil(end):
                return f"/(?s:.*){_in_slashes(end)}/"
            case Sequence(parts):
                return " ".join(self._name(part) for part in parts) or '""'
            case Choice(options):
                return " | ".join(self._name(option) for option in options)
            case Repeat(item, separator):
                name = self._name(item)
                return f"{name} ({self._literal(separator)} {name})*" if separator else f"{name}+"

    def _literal(self, text: str) -> str:
        pieces = _split_tokens(text, self._special_tokens)
        spelled = [json.dumps(piece) if token is None else f"<[{token}]>" for piece, token in pieces]
        return " ".join(spelled) or '""'


_SPACED_AS_TRAINED = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""As models write JSON. Where any white space is right, a small one may write nothing else until its last token."""

_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)


def _escaped_slash(found: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}.get(found[0], found[0])


def _in_slashes(text: str) -> str:
    """As a regular expression of Rust's kind, in which an escaped angle bracket is something else."""
    return re.sub(r"[.^$*+?{}\[\]\\|()/]", r"\\\g<0>", text).replace("\n", "\\n")


MAX_WHITESPACE_CHARS = 2
"""Between two parts of a JSON value: models write one space, or none; a small one might write nothing else."""


def to_structural_tag(node: Node, special_tokens: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A structural tag as xgrammar reads it (its `format` kind). special_tokens: text to id."""
    return {"type": "structural_tag", "format": _format(node, special_tokens or {})}


def _format(node: Node, special_tokens: Mapping[str, int]) -> dict[str, Any]:
    match node:
        case Literal(text):
            pieces = _split_tokens(text, special_tokens)
            return _sequence(
                [
                    {"type": "const_string", "value": piece} if token is None else {"type": "token", "token": token}
                    for piece, token in pieces
                ]
            )
        case Json(schema):
            return {"type": "json_schema", "json_schema": dict(schema), "max_whitespace_cnt": MAX_WHITESPACE_CHARS}
        case Regex(pattern):
            return {"type": "regex", "pattern": pattern}
        case TextUntil(end):
            token = special_tokens.get(end)
            ending = end if token is None else {"type": "token", "token": token}
            return {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": ending}
        case Sequence(parts):
            return _sequence([_format(part, special_tokens) for part in parts])
        case Choice(options):
            formats = [_format(option, special_tokens) for option in options if option != NOTHING]
            chosen = formats[0] if len(formats) == 1 else {"type": "or", "elements": formats}
            return {"type": "optional", "content": chosen} if NOTHING in options else chosen
        case Repeat(item, separator):
            inner = _format(item, special_tokens)
            if not separator:
                return {"type": "plus", "content": inner}
            between = _format(Literal(separator), special_tokens)
            return _sequence([inner, {"type": "star", "content": _sequence([between, inner])}])


def _sequence(formats: list[dict[str, Any]]) -> dict[str, Any]:
    if len(formats) == 1:
        return formats[0]
    return {"type": "sequence", "elements": formats} if formats else {"type": "const_string", "value": ""}
