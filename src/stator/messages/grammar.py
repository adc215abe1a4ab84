"""What an output must be, as it travels to an engine: a tree that says nothing of any grammar backend.

A tree's nodes may be shared where it is made. `core.tools.grammar` spells trees for two backends.
"""

from typing import Any

import msgspec


class Literal(msgspec.Struct, frozen=True, tag="literal"):
    """Exactly this text. Special tokens of the model that occur in it are meant as tokens."""

    text: str


class Json(msgspec.Struct, frozen=True, tag="json"):
    """A JSON value that the schema describes."""

    schema: dict[str, Any]


class Regex(msgspec.Struct, frozen=True, tag="regex"):
    """Text that the pattern matches as a whole; the dialect is the backend's."""

    pattern: str


class TextUntil(msgspec.Struct, frozen=True, tag="until"):
    """Any text up to the first occurrence of `end`, and that."""

    end: str


class Sequence(msgspec.Struct, frozen=True, tag="sequence"):
    parts: "tuple[Node, ...]"


class Choice(msgspec.Struct, frozen=True, tag="choice"):
    """One of the options. The empty Sequence is one of them where nothing is right too."""

    options: "tuple[Node, ...]"


class Repeat(msgspec.Struct, frozen=True, tag="repeat"):
    """The item once or more, with the separator between."""

    item: "Node"
    separator: str


class OwnGrammar(msgspec.Struct, frozen=True, tag="own"):
    """The client's own, in the dialect of the engine's backend."""

    text: str


Node = Literal | Json | Regex | TextUntil | Sequence | Choice | Repeat
Grammar = Node | OwnGrammar
