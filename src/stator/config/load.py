"""Loading: defaults, then the file, then flags; one section per service.

The supervisor loads and checks everything before it starts a process, and hands the merged sections on, so that every
process of a node sees the same values whatever happens to the file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import msgspec

from stator.config.decode import Errors, decode_struct, decode_value, kebab, lookup, nearest
from stator.config.engine_flags import check_engine_flags
from stator.config.schema import (
    COMMON_CONFIGS,
    COMMON_SECTION,
    SECTIONS,
    SERVICE_ARGS,
    EngineName,
    ProcessorConfig,
    RouterConfig,
    RouterName,
    ServiceArgs,
    WorkerConfig,
)
from stator.config.tree import Node, canonical, describe, merge, parse_override, read_yaml
from stator.errors import ConfigError

OLD_CONNECTOR = "DynamoNixlConnector"
NEW_CONNECTOR = "NixlConnector"


@dataclass(frozen=True, slots=True)
class Configuration:
    """sections: merged, `common-configs` filled in. notices: what a user should be told once."""

    sections: dict[str, Node] = field(default_factory=dict[str, Node])
    source: str = "the configuration"
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """config: the service's option struct, or a dict with underscores in its top-level keys if it has none."""

    args: ServiceArgs
    config: Any


def load_configuration(
    path: Path | None,
    overrides: Sequence[tuple[str, str]],
    services: Iterable[str],
    *,
    shown_as: str | None = None,
) -> Configuration:
    """services: names of the graph's services; flags may also name built-in sections and those of the file.

    overrides: (`--Service.key.sub`, value) in the order given. shown_as: the file's name in messages.
    Raises ConfigError with every problem found.
    """
    errors = Errors()
    source = "the configuration" if path is None else shown_as or str(path)
    root = Node(source, children={}) if path is None else read_yaml(path, source)
    in_file = list(root.children or {})
    known = sorted({*services, *SECTIONS, COMMON_SECTION, *in_file})
    for flag, value in overrides:
        name = flag.removeprefix("--").split(".")[0]
        if name not in known:
            errors.add(
                f"{flag}={value}", f"there is no service {name}{nearest(name, known)}; known: {', '.join(known)}"
            )
            continue
        try:
            root = merge(root, parse_override(flag, value))
        except ConfigError as error:
            errors.messages.append(str(error))
    sections = _sections(root, errors)
    raise_all(errors)
    return Configuration(sections, source, tuple(_unused(sections, services)))


def raise_all(errors: Errors) -> None:
    if errors.messages:
        raise ConfigError("\n".join(errors.messages))


def _sections(root: Node, errors: Errors) -> dict[str, Node]:
    sections: dict[str, Node] = {}
    for name, node in (root.children or {}).items():
        if node.children is None and node.value is None:
            node = Node(node.origin, children={})
        if node.children is None:
            errors.add(node.origin, f"{name}: found {describe(node.value)}, expected a section of `key: value` lines")
            continue
        sections[name] = node
    common = sections.pop(COMMON_SECTION, None)
    values = common.children or {} if common is not None else {}
    return {name: _with_common(name, node, values, errors) for name, node in sections.items()}


def _with_common(name: str, section: Node, common: dict[str, Node], errors: Errors) -> Node:
    children = dict(section.children or {})
    wanted = lookup(children, COMMON_CONFIGS)
    if wanted is None:
        return section
    keys = decode_value(list[str], wanted, f"{name}.common-configs", errors)
    for key in cast(list[str], keys or []):
        value = lookup(common, key)
        if value is None:
            known = ", ".join(common) or "nothing"
            errors.add(
                wanted.origin,
                f"{name}.common-configs: {COMMON_SECTION} has no {key!r}{nearest(key, list(common))}; it has {known}",
            )
        elif lookup(children, key) is None:
            children[key] = value
    return Node(section.origin, children=children)


def _unused(sections: dict[str, Node], services: Iterable[str]) -> list[str]:
    known = sorted({*services, *SECTIONS})
    notices: list[str] = []
    for name, node in sections.items():
        if name not in known and (near := nearest(name, known)):
            notices.append(f"{node.origin}: no service is named {name}{near}; the section is ignored")
    return notices


def decode_section(
    name: str, config_type: type[Any] | None, configuration: Configuration, errors: Errors, notices: list[str]
) -> Section | None:
    """One service's section as option structs; None if errors were added.

    config_type: a msgspec struct; None for the built-in one of that name, or a plain dict. notices: appended to.
    """
    node = configuration.sections.get(name) or Node(configuration.source, children={})
    children = dict(node.children or {})
    args_node = None
    for key in list(children):
        if canonical(key) == COMMON_CONFIGS:
            del children[key]
        elif key == SERVICE_ARGS:
            args_node = children.pop(key)
    args = _decode_args(name, args_node, errors)
    struct = config_type or SECTIONS.get(name)
    if struct is None:
        config: Any = {canonical(key): child.plain() for key, child in children.items()}
    elif issubclass(struct, WorkerConfig):
        config = _decode_worker(name, struct, children, node.origin, configuration, errors, notices)
    elif issubclass(struct, msgspec.Struct):
        config = decode_struct(struct, children, name, node.origin, errors)
    else:
        raise TypeError(f"@service(config={struct.__qualname__}) of {name}: expected a msgspec.Struct")
    if args is None or config is None:
        return None
    if isinstance(config, ProcessorConfig) and config.served_model_name is None:
        config = msgspec.structs.replace(config, served_model_name=_served_model_name(configuration))
    if isinstance(config, RouterConfig) and config.mode is None:
        config = msgspec.structs.replace(config, mode=_processor_router(configuration))
    _notices(name, config, children, notices)
    return Section(args, config)


def _decode_args(name: str, node: Node | None, errors: Errors) -> ServiceArgs | None:
    path = f"{name}.{SERVICE_ARGS}"
    if node is None or (node.children is None and node.value is None):
        return ServiceArgs()
    if node.children is None:
        errors.add(node.origin, f"{path}: found {describe(node.value)}, expected a mapping")
        return None
    children = {key: _envs(child) if canonical(key) == "envs" else child for key, child in node.children.items()}
    return decode_struct(ServiceArgs, children, path, node.origin, errors)


def _envs(node: Node) -> Node:
    """`{NAME: value}` or `[{name: NAME, value: value}]`; a number is its text, as in a shell."""
    if node.children is not None:
        texts = {key: _text(child.plain(), child.text) for key, child in node.children.items()}
        return Node(node.origin, texts)
    if isinstance(node.value, list):
        items = cast(list[Any], node.value)
        if all(isinstance(item, dict) and set(cast(dict[str, Any], item)) == {"name", "value"} for item in items):
            return Node(node.origin, {str(item["name"]): _text(item["value"], None) for item in items})
    return node


def _text(value: Any, text: str | None) -> Any:
    if text is not None:
        return text
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (int, float)) else value


def _decode_worker(
    name: str,
    struct: type[WorkerConfig],
    children: dict[str, Node],
    origin: str,
    configuration: Configuration,
    errors: Errors,
    notices: list[str],
) -> WorkerConfig | None:
    own = {field.name for field in msgspec.structs.fields(struct) if not field.name.startswith("engine_arg")}
    known = {key: node for key, node in children.items() if canonical(key) in own}
    flags = {canonical(key): node for key, node in children.items() if canonical(key) not in own}
    num_errors = len(errors.messages)
    config = decode_struct(struct, known, name, origin, errors)
    engine = config.engine if config is not None else _engine_of(known)
    checked = check_engine_flags(engine, name, flags, [kebab(key) for key in own], errors)
    if config is None or len(errors.messages) > num_errors:
        return None
    served = config.served_model_name or _served_model_name(configuration)
    return msgspec.structs.replace(
        config,
        served_model_name=served,
        kv_transfer_config=_connector(config.kv_transfer_config, name, known, errors, notices),
        engine_args=checked.values,
        engine_arg_origins=checked.origins,
        engine_args_ignored=checked.ignored,
    )


def _engine_of(known: dict[str, Node]) -> str:
    """For a section with errors elsewhere, whose flags are checked nevertheless."""
    node = lookup(known, "engine")
    return str(node.value) if node is not None and node.value in get_args(EngineName) else "vllm"


def ignored_flags(sections: Mapping[str, Section]) -> str | None:
    """One line about the vLLM flags that no engine here has a use for; None if there are none."""
    by_engine: dict[str, dict[str, None]] = {}
    for section in sections.values():
        if isinstance(section.config, WorkerConfig) and section.config.engine_args_ignored:
            by_engine.setdefault(section.config.engine, {}).update(dict.fromkeys(section.config.engine_args_ignored))
    if not by_engine:
        return None
    parts = [f"the {engine} engine has no use for {', '.join(flags)}" for engine, flags in by_engine.items()]
    return f"{'; '.join(parts)}: accepted and ignored"


def _served_model_name(configuration: Configuration) -> str | None:
    frontend = configuration.sections.get("Frontend")
    node = lookup(frontend.children or {}, "served_model_name") if frontend is not None else None
    return None if node is None or node.value is None else node.text or str(node.value)


def _processor_router(configuration: Configuration) -> RouterName | None:
    """What the Processor's section says; a wrong value is reported where the Processor runs."""
    section = configuration.sections.get("Processor")
    node = lookup(section.children or {}, "router") if section is not None else None
    return node.value if node is not None and node.value in get_args(RouterName) else None


def _connector(
    value: dict[str, Any] | str | None, name: str, known: dict[str, Node], errors: Errors, notices: list[str]
) -> dict[str, Any] | None:
    """The mapping, with the connector's old name replaced."""
    if value is None:
        return None
    node = lookup(known, "kv_transfer_config")
    origin = name if node is None else node.origin
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
        except ValueError:
            decoded = None
        if not isinstance(decoded, dict):
            errors.add(origin, f"{name}.kv-transfer-config: found {describe(value)}, expected a JSON object")
            return None
        value = cast(dict[str, Any], decoded)
    if value.get("kv_connector") == OLD_CONNECTOR:
        notices.append(f"kv-transfer-config: {OLD_CONNECTOR} is an older name; using {NEW_CONNECTOR}")
        value = {**value, "kv_connector": NEW_CONNECTOR}
    return value


def _notices(name: str, config: Any, children: dict[str, Node], notices: list[str]) -> None:
    if name == "Frontend":
        ignored = [lookup(children, key) for key in ("endpoint", "endpoint_chat", "endpoint_completions")]
        notices.extend(
            f"{node.origin}: an endpoint's `ns.Component` part is ignored: links decide who is called"
            for node in ignored
            if node is not None
        )
