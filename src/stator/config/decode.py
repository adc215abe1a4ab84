"""From configuration trees to option structs, collecting every error on the way.

Options are struct fields. `Annotated[int, Meta(ge=1, description=..., extra={"unit": "tokens"})] = 64` declares type,
bounds, help, unit and default in one place.
"""

import difflib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from stator.config.tree import Node, canonical, describe, find

S = TypeVar("S", bound=msgspec.Struct)


class Errors:
    """Messages in the order found; a start reports all of them at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, origin: str, message: str) -> None:
        self.messages.append(f"{origin}: {message}")


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean X?)`, or nothing."""
    by_canonical = {canonical(name).lower(): name for name in known}
    close = difflib.get_close_matches(canonical(word).lower(), list(by_canonical), n=1, cutoff=0.6)
    return f" (did you mean {by_canonical[close[0]]}?)" if close else ""


def kebab(name: str) -> str:
    return name.replace("_", "-")


def decode_struct(struct: type[S], children: Mapping[str, Node], path: str, origin: str, errors: Errors) -> S | None:
    """None if errors were added. path: for messages, e.g. `VllmWorker`. origin: of the whole, for what is missing."""
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    hints = get_type_hints(struct, include_extras=True)
    num_errors = len(errors.messages)
    values: dict[str, Any] = {}
    for key, node in children.items():
        name = canonical(key)
        if name not in fields:
            known = [kebab(field) for field in fields]
            errors.add(node.origin, f"{path}.{key}: unknown key{nearest(key, known)}; known: {', '.join(known)}")
            continue
        values[name] = decode_value(hints[name], node, f"{path}.{key}", errors)
    for name, field in fields.items():
        if field.required and name not in values:
            errors.add(origin, f"{path}.{kebab(name)} is required; expected {expected(hints[name])}")
    if len(errors.messages) > num_errors:
        return None
    return struct(**values)


def decode_value(hint: Any, node: Node, path: str, errors: Errors) -> Any:
    struct = _struct_of(hint)
    if struct is not None and node.children is not None:
        return decode_struct(struct, node.children, path, node.origin, errors)
    value = node.plain()
    bare = _bare(hint)
    if bare is str and isinstance(value, (int, float)) and node.text is not None:
        value = node.text
    if isinstance(value, bool) and bare in (int, float):
        errors.add(node.origin, f"{path}: found {describe(value)}, expected {expected(hint)}")
        return None
    try:
        return msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError:
        hint_text = expected(hint)
        near = nearest(str(value), [str(c) for c in _choices(hint)]) if isinstance(value, str) else ""
        errors.add(node.origin, f"{path}: found {describe(value)}, expected {hint_text}{near}")
        return None


def unwrap(hint: Any) -> tuple[Any, list[msgspec.Meta]]:
    """The type below Annotated and Optional, and the Metas on the way."""
    metas: list[msgspec.Meta] = []
    while True:
        if get_origin(hint) is Annotated:
            hint, *extra = get_args(hint)
            metas.extend(m for m in extra if isinstance(m, msgspec.Meta))
            continue
        if get_origin(hint) in (Union, types.UnionType):
            members = [a for a in get_args(hint) if a is not type(None)]
            if len(members) == 1:
                hint = members[0]
                continue
        return hint, metas


def _bare(hint: Any) -> Any:
    return unwrap(hint)[0]


def _struct_of(hint: Any) -> type[msgspec.Struct] | None:
    bare = _bare(hint)
    return bare if isinstance(bare, type) and issubclass(bare, msgspec.Struct) else None


def _choices(hint: Any) -> tuple[Any, ...]:
    bare = _bare(hint)
    return get_args(bare) if get_origin(bare) is Literal else ()


_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def expected(hint: Any) -> str:
    """What a value must be, in words: `a whole number, at least 1`."""
    bare, metas = unwrap(hint)
    if choices := _choices(bare):
        text = f"one of {', '.join(str(c) for c in choices)}"
    elif get_origin(bare) in (Union, types.UnionType):
        text = " or ".join(expected(member) for member in get_args(bare) if member is not type(None))
    elif get_origin(bare) in (list, tuple):
        text = "a list"
    elif get_origin(bare) is dict or bare is dict or _struct_of(bare) is not None:
        text = "a mapping"
    else:
        text = _WORDS.get(bare, "another value")
    for meta in metas:
        text += f", at least {meta.ge}" if meta.ge is not None else ""
        text += f", more than {meta.gt}" if meta.gt is not None else ""
        text += f", at most {meta.le}" if meta.le is not None else ""
    return text


def lookup(children: Mapping[str, Node], key: str) -> Node | None:
    found = find(dict(children), key)
    return None if found is None else children[found]
