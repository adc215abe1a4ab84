"""An engine's flags in a worker's section: known ones, their types, and what another engine has no use for.

vLLM's are data that tools/vllm_flags.py writes, so that a file is checked alike on a laptop and on a GPU node.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, cast

import msgspec

from stator.config.decode import Errors, decode_value, kebab, nearest
from stator.config.tree import Node, canonical, describe
from stator.engines.registry import own_flags

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])")
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "size": "a whole number (8192, 8k, 8K)",
    "float": "a number",
    "object": "a mapping or JSON text",
    "list": "a list",
    "str": "text",
}


class VllmFlag(msgspec.Struct, frozen=True):
    """types: of bool, int, size (8192, 8k), float, object (a mapping or JSON text), list, str; the first that fits
    is taken. optional: null is a value. nested: a mapping whose keys vLLM checks."""

    types: list[str]
    optional: bool = False
    default: Any = None
    choices: list[Any] = []
    nested: bool = False


class _VllmFlags(msgspec.Struct, frozen=True):
    vllm: str
    flags: dict[str, VllmFlag]


@cache
def _data() -> _VllmFlags:
    return msgspec.json.decode((files("stator.config") / "vllm_flags.json").read_bytes(), type=_VllmFlags)


def vllm_version() -> str:
    """The version that the flags are from."""
    return _data().vllm


@cache
def vllm_flags() -> dict[str, VllmFlag]:
    """By name, with underscores."""
    return {canonical(name): flag for name, flag in _data().flags.items()}


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """values, origins: what the engine is told, and where it was written. ignored: what it has no use for."""

    values: dict[str, Any]
    origins: dict[str, str]
    ignored: tuple[str, ...] = ()


def check_engine_flags(
    engine: str, path: str, flags: Mapping[str, Node], known: list[str], errors: Errors
) -> EngineFlags:
    """flags: by name with underscores. path: the section. known: its other keys, for "did you mean"."""
    described = own_flags(engine)
    own, meaningless = described if described is not None else (None, frozenset[str]())
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    ignored: list[str] = []
    for key, node in flags.items():
        if own is not None and key in own:
            value = decode_value(own[key], node, f"{path}.{kebab(key)}", errors)
            values[key], origins[key] = value, node.origin
            continue
        name, flag, negated = _find(key)
        if flag is None and key in meaningless:
            ignored.append(kebab(key))
            continue
        if flag is None:
            names = [*known, *map(kebab, own or ()), *map(kebab, vllm_flags())]
            errors.add(node.origin, f"{path}.{kebab(key)}: {_unknown(engine)}{nearest(key, names)}")
            continue
        num_errors = len(errors.messages)
        value = _convert(flag, node, f"{path}.{kebab(key)}", errors)
        if len(errors.messages) > num_errors:
            continue
        if own is not None:
            ignored.append(kebab(key))
        else:
            values[name], origins[name] = (not value if negated else value), node.origin
    return EngineFlags(values, origins, tuple(ignored))


def _unknown(engine: str) -> str:
    vllm = f"vLLM {vllm_version()}"
    if engine == "vllm":
        return f"unknown key; {vllm} has no such flag"
    return f"unknown key; neither engine {engine} nor {vllm} has such a flag"


def _find(key: str) -> tuple[str, VllmFlag | None, bool]:
    """The flag's own name, and whether `no-` stood before it."""
    flags = vllm_flags()
    positive = key.removeprefix("no_")
    if key not in flags and positive in flags and "bool" in flags[positive].types:
        return positive, flags[positive], True
    return key, flags.get(key), False


def _convert(flag: VllmFlag, node: Node, path: str, errors: Errors) -> Any:
    value = node.plain()
    if value is None:
        if flag.optional:
            return None
        errors.add(node.origin, f"{path}: found nothing, expected {expected(flag)}")
        return None
    for kind in flag.types:
        converted = _CONVERTERS[kind](value, node.text)
        if converted is not None and (chosen := _choose(flag, converted)) is not None:
            return chosen
    near = nearest(str(value), [str(choice) for choice in flag.choices]) if flag.choices else ""
    errors.add(node.origin, f"{path}: found {describe(value)}, expected {expected(flag)}{near}")
    return None


def expected(flag: VllmFlag) -> str:
    if flag.choices and "list" not in flag.types:
        return f"one of {', '.join(str(choice) for choice in flag.choices)}"
    return " or ".join(_WORDS[kind] for kind in flag.types)


def _choose(flag: VllmFlag, value: Any) -> Any:
    """The value, spelled as vLLM spells it; None if it is not among the choices."""
    if not flag.choices or isinstance(value, list) or value in flag.choices:
        return cast(Any, value)
    folded = canonical(str(value)).lower()
    return next((choice for choice in flag.choices if canonical(str(choice)).lower() == folded), None)


def _bool(value: Any, _text: str | None) -> bool | None:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value if isinstance(value, bool) else None


def _int(value: Any, _text: str | None) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _size(value: Any, text: str | None) -> int | None:
    """As on vLLM's command line: k, m, g and t are powers of 1000, K, M, G and T powers of 1024."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit = match.groups()
        power = "kmgt".index(unit.lower()) + 1
        if unit.isupper():
            return int(number) * 1024**power if number.isdigit() else None
        return round(float(number) * 1000**power)
    return _int(value, text)


def _float(value: Any, _text: str | None) -> float | None:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _object(value: Any, _text: str | None) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def _list(value: Any, _text: str | None) -> list[Any] | None:
    if isinstance(value, list):
        return cast(list[Any], value)
    return [value] if isinstance(value, (str, int, float)) else None


def _str(value: Any, text: str | None) -> str | None:
    if isinstance(value, str):
        return value
    # A number or word that YAML took for something else is the text that was written.
    return text if text is not None and isinstance(value, (int, float)) else None


_CONVERTERS: dict[str, Callable[[Any, str | None], Any]] = {
    "bool": _bool,
    "int": _int,
    "size": _size,
    "float": _float,
    "object": _object,
    "list": _list,
    "str": _str,
}
