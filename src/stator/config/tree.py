"""Configuration as a tree that remembers where each value was written.

A `Node` is a scalar, a list or a mapping, with the place it came from: `configs/tiny.yaml:12`, or the flag itself.
Keys match with dashes and underscores alike; the spelling of the first place wins.
"""

import json
from pathlib import Path
from typing import Any

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from stator.errors import ConfigError


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    """value: a scalar or a list of plain values, unless `children` is set. text: a scalar as it was written."""

    origin: str
    value: Any = None
    text: str | None = None
    children: dict[str, "Node"] | None = None

    def plain(self) -> Any:
        """Builtin values, keys as they were written."""
        if self.children is None:
            return self.value
        return {key: child.plain() for key, child in self.children.items()}


def canonical(key: str) -> str:
    return key.replace("-", "_")


def find(children: dict[str, Node], key: str) -> str | None:
    """The spelling under which `key` is there, if it is."""
    if key in children:
        return key
    wanted = canonical(key)
    return next((name for name in children if canonical(name) == wanted), None)


def merge(base: Node, over: Node) -> Node:
    """`over` wins; mappings are merged key by key, anything else replaces what was there."""
    if base.children is None or over.children is None:
        return over
    merged = dict(base.children)
    for key, child in over.children.items():
        known = find(merged, key)
        if known is None:
            merged[key] = child
        else:
            merged[known] = merge(merged[known], child)
    return Node(over.origin if not base.children else base.origin, children=merged)


def parse_yaml(text: str, name: str) -> Node:
    """The document as a mapping node. name: how the file is called in messages. Raises ConfigError with file:line."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        return Node(name, children={}) if root is None else _Converter(yaml, name).document(root)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None


def read_yaml(path: Path, name: str) -> Node:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{name}: the configuration file cannot be read: {reason}") from None
    return parse_yaml(text, name)


class _Converter:
    def __init__(self, yaml: YAML, name: str) -> None:
        self._constructor: Any = yaml.constructor
        self._name = name
        self._open: set[int] = set()

    def document(self, root: Any) -> Node:
        node = self.convert(root)
        if node.children is None:
            raise ConfigError(f"{node.origin}: expected a mapping with one section per service")
        return node

    def convert(self, node: Any) -> Node:
        origin = self._origin(node)
        if isinstance(node, ScalarNode):
            return Node(origin, self._constructor.construct_object(node), text=str(node.value))
        if id(node) in self._open:
            raise ConfigError(f"{origin}: an alias refers to the value that contains it")
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                items: list[Any] = [self.convert(item).plain() for item in node.value]
                return Node(origin, items)
            return self._mapping(node, origin)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: MappingNode, origin: str) -> Node:
        children: dict[str, Node] = {}
        inherited: list[Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                sources = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                inherited.extend(self.convert(source) for source in sources)
                continue
            key = self._key(key_node)
            value = self.convert(value_node)
            # Lists and mappings start on a later line than their key, which is what a reader looks for.
            value = msgspec.structs.replace(value, origin=self._origin(key_node))
            if (known := find(children, key)) is not None:
                raise ConfigError(f"{value.origin}: {key!r} is given twice; first at {children[known].origin}")
            children[key] = value
        result = Node(origin, children=children)
        for source in inherited:
            if source.children is None:
                raise ConfigError(f"{origin}: `<<` expects a mapping")
            result = merge(source, result)
        return result

    def _key(self, node: Any) -> str:
        if not isinstance(node, ScalarNode):
            raise ConfigError(f"{self._origin(node)}: a key must be a plain word")
        return str(node.value)

    def _origin(self, node: Any) -> str:
        return f"{self._name}:{node.start_mark.line + 1}"


def parse_flag_value(text: str, origin: str) -> Node:
    """A flag's value is read as YAML, so that 8, true and '{"a": 1}' are what they would be in the file."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except YAMLError:
        return Node(origin, text, text=text)
    if root is None:
        return Node(origin, None, text="")
    node = _Converter(yaml, origin).convert(root)
    return _with_origin(node, origin)


def _with_origin(node: Node, origin: str) -> Node:
    if node.children is None:
        return msgspec.structs.replace(node, origin=origin)
    return Node(origin, children={key: _with_origin(child, origin) for key, child in node.children.items()})


def parse_override(flag: str, value: str) -> Node:
    """`--Service.key.sub` and its value as a tree of one branch. Raises ConfigError for an empty part."""
    origin = f"{flag}={value}"
    parts = flag.removeprefix("--").split(".")
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"{origin}: expected --Service.key=value")
    node = parse_flag_value(value, origin)
    for part in reversed(parts):
        node = Node(origin, children={part: node})
    return node


def describe(value: Any) -> str:
    """A found value for a message: JSON, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
