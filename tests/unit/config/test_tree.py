import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.config.tree import Node, canonical, merge, parse_flag_value, parse_override, parse_yaml
from stator.errors import ConfigError


def parse(text: str) -> Node:
    return parse_yaml(text, "f.yaml")


def test_every_value_knows_its_line() -> None:
    root = parse("A:\n  x: 1\n\n  y:\n    - a\n    - b\n  z: {k: v}\n")
    section = (root.children or {})["A"]
    assert section.origin == "f.yaml:1"
    assert {key: node.origin for key, node in (section.children or {}).items()} == {
        "x": "f.yaml:2",
        "y": "f.yaml:4",
        "z": "f.yaml:7",
    }
    assert section.plain() == {"x": 1, "y": ["a", "b"], "z": {"k": "v"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A: [1\nB: 2\n", "f.yaml:2: not valid YAML"),
        ("A:\n  x: 1\n  x: 2\n", "f.yaml:3: 'x' is given twice; first at f.yaml:2"),
        ("A:\n  block-size: 1\n  block_size: 2\n", "f.yaml:3: 'block_size' is given twice; first at f.yaml:2"),
        ("- a\n", "f.yaml:1: expected a mapping"),
        ("A: !!python/object:os.system x\n", "f.yaml:1: not valid YAML"),
        ("A: &a\n  b: *a\n", "an alias refers to the value that contains it"),
        ("? [a]\n: 1\n", "a key must be a plain word"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_an_empty_file_has_no_sections() -> None:
    assert parse("").children == {}
    assert parse("# nothing\n").children == {}


def test_aliases_and_merge_keys() -> None:
    root = parse("A: &a {x: 1, y: 1}\nB:\n  <<: *a\n  y: 2\nC: *a\n")
    assert root.plain() == {"A": {"x": 1, "y": 1}, "B": {"x": 1, "y": 2}, "C": {"x": 1, "y": 1}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0.5", 0.5),
        ("true", True),
        ("yes", "yes"),
        ("text", "text"),
        ("a: b: c", "a: b: c"),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("'8'", "8"),
        ('{"kv_connector": "N"}', {"kv_connector": "N"}),
    ],
)
def test_flag_values_are_yaml(text: str, value: object) -> None:
    node = parse_flag_value(text, "--S.k")
    assert node.plain() == value
    assert node.origin == "--S.k"


def test_an_override_is_a_branch() -> None:
    assert parse_override("--S.a.b-c", "1").plain() == {"S": {"a": {"b-c": 1}}}
    with pytest.raises(ConfigError, match="expected --Service.key=value"):
        parse_override("--S..x", "1")


def test_merging_keeps_what_is_not_mentioned() -> None:
    base = parse("S:\n  ServiceArgs:\n    workers: 1\n    resources: {gpu: 8}\n  block-size: 64\n")
    merged = merge(base, parse_override("--S.ServiceArgs.workers", "2"))
    merged = merge(merged, parse_override("--S.block_size", "16"))
    assert merged.plain() == {"S": {"ServiceArgs": {"workers": 2, "resources": {"gpu": 8}}, "block-size": 16}}


values = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from(["a", "b-c", "b_c", "d"]), inner), max_leaves=8
)


def tree(value: object) -> Node:
    if not isinstance(value, dict):
        return Node("x", value)
    children: dict[str, Node] = {}
    for key, child in value.items():
        if not any(canonical(known) == canonical(key) for known in children):
            children[key] = tree(child)
    return Node("x", children=children)


def flat(node: Node) -> object:
    if node.children is None:
        return node.value
    return {canonical(key): flat(child) for key, child in node.children.items()}


def model(base: object, over: object) -> object:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return {key: model(base[key], over[key]) if key in base and key in over else {**base, **over}[key]
            for key in {**base, **over}}  # fmt: skip


@given(values, values)
def test_merge_is_the_deep_merge_of_canonical_keys(base: object, over: object) -> None:
    assert flat(merge(tree(base), tree(over))) == model(flat(tree(base)), flat(tree(over)))
