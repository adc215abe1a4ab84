"""Bounds on JSON schemas that a request brings, checked before anything walks or compiles them."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from stator.errors import ErrorCode, StatorError

MAX_SCHEMA_BYTES = 1 << 16
MAX_SCHEMA_DEPTH = 32
"""Of JSON in JSON: a property of an object's property is four levels down."""
MAX_SCHEMA_NODES = 8192
MAX_PATTERN_CHARS = 2048
MAX_COUNT = 100_000
"""Of items, or properties, that a schema may ask for or allow: grammar libraries write out one after the other."""
_COUNTS = ("minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties")
_PATH_KEY = re.compile(r"[\w$\-]{1,64}")


def check_schema(schema: Mapping[str, Any], param: str) -> int:
    """Its size in bytes. Raises StatorError(INVALID_REQUEST) that names the place under `param`."""
    num_nodes = 0
    todo: list[tuple[Any, str, int]] = [(schema, param, 1)]
    while todo:
        value, path, depth = todo.pop()
        num_nodes += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise invalid(path, f"{path} is nested too deep: a schema may have {MAX_SCHEMA_DEPTH} levels")
        if num_nodes > MAX_SCHEMA_NODES:
            raise invalid(param, f"{param} has too many parts: a schema may have {MAX_SCHEMA_NODES}")
        if isinstance(value, Mapping):
            _check_keywords(value, path)
            todo += [(each, f"{path}.{_spelled(key)}", depth + 1) for key, each in value.items()]
        elif isinstance(value, list):
            todo += [(each, f"{path}[{index}]", depth + 1) for index, each in enumerate(value)]
    num_bytes = len(msgspec.json.encode(schema))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise invalid(param, f"{param} has {num_bytes} bytes: a schema may have {MAX_SCHEMA_BYTES}")
    return num_bytes


def _check_keywords(schema: Mapping[str, Any], path: str) -> None:
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise invalid(f"{path}.$ref", f"{path}.$ref: only references into the same schema (#/…) are followed")
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
        raise invalid(f"{path}.pattern", f"{path}.pattern: a pattern may have {MAX_PATTERN_CHARS} characters")
    for name in _COUNTS:
        count = schema.get(name)
        if isinstance(count, int | float) and count > MAX_COUNT:
            raise invalid(f"{path}.{name}", f"{path}.{name} is {count}; at most {MAX_COUNT} are taken")


def _spelled(key: str) -> str:
    return key if _PATH_KEY.fullmatch(key) else "…"


def check_object_schema(schema: Mapping[str, Any], param: str) -> int:
    """`check_schema` of one that describes an object, as the parameters of a function do."""
    if schema.get("type", "object") != "object":
        raise invalid(f"{param}.type", f'{param}.type must be "object"')
    kinds: tuple[tuple[str, type, str], ...] = (("properties", dict, "an object"), ("required", list, "a list"))
    for key, kind, expected in kinds:
        if not isinstance(schema.get(key, kind()), kind):
            raise invalid(f"{param}.{key}", f"{param}.{key} must be {expected}")
    return check_schema(schema, param)


def invalid(param: str, message: str) -> StatorError:
    return StatorError(ErrorCode.INVALID_REQUEST, message, param=param)
