"""For each option of a section: its value, and where that came from."""

import re
from collections.abc import Iterator
from typing import Any, cast, get_type_hints

import msgspec

from stator.config.decode import kebab, lookup, unwrap
from stator.config.load import Configuration, Section
from stator.config.schema import SERVICE_ARGS, WorkerConfig
from stator.config.tree import Node

DEFAULT = "default"
HIDDEN = "(hidden)"

_SECRETS = frozenset({"token", "secret", "password", "passwd", "key", "credentials"})

_FROM_ELSEWHERE = {"served_model_name": ("Frontend", "served_model_name"), "mode": ("Processor", "router")}
"""Options whose default is what another section says."""


class Option(msgspec.Struct, frozen=True):
    """key: as in the file, `ServiceArgs.resources.gpu`. origin: `default`, `file:line`, or the flag itself."""

    key: str
    value: Any
    origin: str


def hide(key: str, value: Any) -> Any:
    """A plan is pasted into tickets: what is named like a secret is not shown, nor within a mapping."""
    if isinstance(value, dict):
        return {name: hide(name, inner) for name, inner in cast(dict[str, Any], value).items()}
    return HIDDEN if isinstance(value, str) and _SECRETS & set(re.split(r"[^a-z]+", key.lower())) else value


def options_of(name: str, section: Section, configuration: Configuration) -> list[Option]:
    """ServiceArgs last; engine flags among the others, in the order of the file."""
    root = configuration.sections.get(name) or Node(configuration.source, children={})
    config = section.config
    if isinstance(config, msgspec.Struct):
        options = [
            option if option.origin != DEFAULT or option.value is None else _elsewhere(option, configuration)
            for option in _fields(config, "", root)
            if not option.key.startswith("engine-arg")
        ]
    else:
        options = [
            Option(key, child.plain(), child.origin)
            for key, child in (root.children or {}).items()
            if key != SERVICE_ARGS
        ]
    if isinstance(config, WorkerConfig):
        options += [
            Option(kebab(key), value, config.engine_arg_origins[key]) for key, value in config.engine_args.items()
        ]
    args = lookup(root.children or {}, SERVICE_ARGS) or Node(root.origin, children={})
    options += _fields(section.args, f"{SERVICE_ARGS}.", args)
    return [_shown(option) for option in options]


def option_origins(name: str, section: Section, configuration: Configuration) -> dict[str, str]:
    """Where each option of the section was written, by its name in Python; `default` for the others."""
    return {option.key.replace("-", "_"): option.origin for option in options_of(name, section, configuration)}


def _shown(option: Option) -> Option:
    value = hide(option.key, option.value)
    if value == option.value:
        return option
    # The flag itself would tell it too.
    origin = option.origin.partition("=")[0] if option.origin.startswith("--") else option.origin
    return Option(option.key, value, origin)


def _fields(struct: msgspec.Struct, path: str, node: Node) -> Iterator[Option]:
    hints = get_type_hints(type(struct), include_extras=True)
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        child = lookup(node.children or {}, field.name)
        bare, _ = unwrap(hints[field.name])
        key = f"{path}{_spelling(node, field.name)}"
        if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
            yield from _fields(value, f"{key}.", child or Node(node.origin, children={}))
        else:
            yield Option(key, value, DEFAULT if child is None else child.origin)


def _spelling(node: Node, name: str) -> str:
    written = next((key for key in node.children or {} if key.replace("-", "_") == name), None)
    return written or kebab(name)


def _elsewhere(option: Option, configuration: Configuration) -> Option:
    """An option that another section decided names the place there."""
    source = _FROM_ELSEWHERE.get(option.key.replace("-", "_"))
    if source is None:
        return option
    section = configuration.sections.get(source[0])
    node = lookup(section.children or {}, source[1]) if section is not None else None
    return option if node is None else msgspec.structs.replace(option, origin=node.origin)
