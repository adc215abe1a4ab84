"""Arguments that a format writes as bare text, made into JSON by the types of the parameter's schema."""

import json
from collections.abc import Mapping
from typing import Any

from stator.core.tools.json_text import quoted

_MAX_REFERENCES = 8
_STRING = frozenset({"string"})
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}

Schema = Mapping[str, Any]


def property_schema(parameters: Schema | None, name: str) -> Schema | None:
    """The schema of one parameter, local references followed; None if nothing is known of it."""
    properties = None if parameters is None else parameters.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    return None if parameters is None else _resolved(found, parameters)


def allowed_types(schema: Schema | None, root: Schema | None) -> frozenset[str]:
    """JSON type names that the schema allows; empty if it does not say. An integer is a number as well."""
    types = set[str]()
    todo, seen = [schema], set[int]()
    while todo:
        current = _resolved(todo.pop(), root)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        types |= _said_types(current)
        for key in ("anyOf", "oneOf", "allOf"):
            branches = current.get(key)
            todo += branches if isinstance(branches, list) else []
    return frozenset(types)


def _said_types(schema: Schema) -> set[str]:
    said = schema.get("type")
    if isinstance(said, str):
        return {said}
    if isinstance(said, list):
        return {each for each in said if isinstance(each, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return {_type_of(value) for value in values} if isinstance(values, list) else set()


def is_plain_string(types: frozenset[str]) -> bool:
    """Whether every text is a string: it can be handed on as it comes."""
    return not types or types == _STRING


def to_json(text: str, types: frozenset[str]) -> str:
    """JSON of a bare text: as one of the types if it reads as one, else as a string."""
    if is_plain_string(types):
        return quoted(text)
    stripped = text.strip()
    word = _WORDS.get(stripped.lower())
    if word is not None and _type_of(json.loads(word)) in types:
        return word
    try:
        value = json.loads(stripped, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return quoted(text)
    kind = _type_of(value)
    if kind in types or (kind == "integer" and "number" in types):
        return stripped
    if kind == "number" and "integer" in types and isinstance(value, float) and value.is_integer():
        return str(int(value))
    return quoted(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _type_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _resolved(schema: object, root: Schema | None) -> Schema | None:
    """Follows `#/…` references inside the tool's own schema."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            return None
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        found: Any = root
        for step in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        schema = found
    return None
