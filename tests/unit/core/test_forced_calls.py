"""What a forced call's grammar allows is what the format's parser reads: texts are drawn from the grammar's tree."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from output_samples import calls, content, parser, reasoning, run

from stator.core.tools.base import ToolSet
from stator.core.tools.forced import constrained_answer, force
from stator.core.tools.grammar import NOTHING, optional, to_lark, to_structural_tag
from stator.core.tools.registry import TOOL_FORMATS, make_parser, reasoning_format, tool_format
from stator.errors import StatorError
from stator.messages.grammar import Choice, Json, Literal, Node, Regex, Repeat, Sequence, TextUntil

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "days": {"type": "integer"},
        "city": {"type": "string"},
        "unit": {"$ref": "#/$defs/Unit"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
    "$defs": {"Unit": {"type": "string", "enum": ["C", "F"]}},
}
TOOLS = ToolSet({"get_weather": SCHEMA, "ping": None, "free": {"type": "object", "properties": {"a": {}, "b": {}}}})
THINK = reasoning_format("qwen3").tags


def value_of(schema: Any, root: Any) -> st.SearchStrategy[Any]:
    """Values of the small part of JSON schema that is used here."""
    if "$ref" in schema:
        schema = root["$defs"]["Unit"]
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "integer":
            return st.integers()
        case "string":
            return st.text()
        case "array":
            return st.lists(value_of(schema["items"], root), max_size=3)
        case "object":
            properties = schema.get("properties", {})
            required = {
                name: value_of(each, root) for name, each in properties.items() if name in schema.get("required", ())
            }
            others = {name: value_of(each, root) for name, each in properties.items() if name not in required}
            return st.fixed_dictionaries(required, optional=others)
        case _:
            return st.none() | st.integers() | st.text()


def draw_text(node: Node, draw: Any) -> str:
    match node:
        case Literal(text):
            return text
        case Regex():
            raise AssertionError
        case Json(schema):
            return json.dumps(draw(value_of(schema, schema)), ensure_ascii=draw(st.booleans()))
        case TextUntil(end):
            text = draw(st.text().map(lambda text: text.strip().replace("<", "")))
            return text + end
        case Sequence(parts):
            return "".join(draw_text(part, draw) for part in parts)
        case Choice(options):
            return draw_text(draw(st.sampled_from(options)), draw)
        case Repeat(item, separator):
            return separator.join(draw_text(item, draw) for _ in range(draw(st.integers(1, 3))))


@st.composite
def forced_outputs(draw: Any) -> tuple[str, str | None, bool, str, bool, list[str]]:
    name = draw(st.sampled_from(sorted(TOOL_FORMATS)))
    names = draw(st.lists(st.sampled_from(sorted(TOOLS.parameters)), min_size=1, unique=True))
    parallel = draw(st.booleans())
    thinks = draw(st.booleans()) and name != "openai"
    is_open = thinks and draw(st.booleans())
    special = draw(st.sampled_from([(), ("[ARGS]",)]))
    node = force(
        tool_format(name).styles, TOOLS, names, parallel=parallel, special_tokens=special,
        reasoning=THINK if thinks else None, is_open=is_open,
    )  # fmt: skip
    return name, "qwen3" if thinks else None, is_open, draw_text(node, draw), parallel, names


@given(forced_outputs())
def test_what_the_grammar_allows_the_parser_reads_as_calls(
    case: tuple[str, str | None, bool, str, bool, list[str]],
) -> None:
    name, thinks, is_open, text, parallel, names = case
    ids = iter(range(100))
    made = make_parser(name, thinks, tools=TOOLS, new_id=lambda: str(next(ids)), is_open=is_open)
    assert made is not None
    events = run(made, [text])
    found = calls(events)
    assert content(events) == ""
    assert found and {called for called, _ in found} <= set(names)
    assert parallel or len(found) == 1
    for called, arguments in found:
        if called == "get_weather":
            assert isinstance(arguments["city"], str) and isinstance(arguments.get("days", 0), int)
            assert arguments.get("unit", "C") in ("C", "F") and isinstance(arguments.get("tags", []), list)


def test_the_grammar_of_one_named_function() -> None:
    node = force(tool_format("hermes").styles, TOOLS, ["ping"], parallel=False)
    spaced = '"x-guidance": {"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}'
    assert to_lark(node).splitlines() == [
        "%llguidance {}",
        "start: r0",
        'r1: "<tool_call>\\n{\\"name\\": \\"ping\\", \\"arguments\\": "',
        f'r2: %json {{"type": "object", "properties": {{}}, "additionalProperties": false, {spaced}}}',
        'r3: "}\\n</tool_call>"',
        "r0: r1 r2 r3",
    ]
    assert to_structural_tag(node)["format"]["elements"][1] == {
        "type": "json_schema",
        "json_schema": {"type": "object", "properties": {}, "additionalProperties": False},
        "max_whitespace_cnt": 2,
    }


def test_special_tokens_are_tokens_in_a_grammar() -> None:
    node = force(tool_format("mistral").styles, TOOLS, ["ping"], parallel=True, special_tokens=["[ARGS]"])
    ids = {"[TOOL_CALLS]": 5, "[ARGS]": 32}
    assert 'r1: <[5]> "ping" <[32]>' not in to_lark(node)  # literals are rules of their own
    assert ': <[5]> "ping" <[32]>' in to_lark(node, ids)
    assert {"type": "token", "token": 5} in _formats(to_structural_tag(node, ids))
    thinking = optional(Sequence((Literal("<think>"), TextUntil("</think>"))))
    assert "[lazy]: /(?s:.*)<\\/think>/" in to_lark(thinking)
    assert "/(?s:.*)/ <[8]>" in to_lark(thinking, {"</think>": 8})
    assert to_structural_tag(thinking)["format"]["type"] == "optional"


def _formats(tag: Any) -> list[Any]:
    if isinstance(tag, dict):
        return [tag, *(each for value in tag.values() for each in _formats(value))]
    return [each for value in tag for each in _formats(value)] if isinstance(tag, list) else []


def test_older_mistral_tokenizers_write_a_list() -> None:
    styles = tool_format("mistral").styles
    assert "[TOOL_CALLS][" in str(force(styles, TOOLS, ["ping"], parallel=True))
    assert "[TOOL_CALLS]ping[ARGS]" in str(force(styles, TOOLS, ["ping"], parallel=True, special_tokens=["[ARGS]"]))


def test_harmony_thinks_first_and_calls_once() -> None:
    node = force(tool_format("openai").styles, TOOLS, ["ping"], parallel=True)
    assert isinstance(node, Sequence)
    assert isinstance(node.parts[0], Choice) and NOTHING in node.parts[0].options
    assert not any(isinstance(part, Repeat) for part in node.parts)


def test_an_unknown_function_cannot_be_forced() -> None:
    with pytest.raises(KeyError):
        force(tool_format("hermes").styles, TOOLS, ["nobody"], parallel=False)


def test_reasoning_of_a_sample_is_read_back() -> None:
    node = force(tool_format("hermes").styles, TOOLS, ["ping"], parallel=False, reasoning=THINK, is_open=True)
    assert isinstance(node, Sequence) and str(node).count("TextUntil") == 1
    text = 'Hm.\n</think>\n\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    assert reasoning(run(parser("hermes", "qwen3", is_open=True), [text])) == "Hm."


def test_a_constrained_answer_comes_behind_free_reasoning() -> None:
    answer = Json({"type": "object"})
    assert constrained_answer(answer) is answer
    assert to_lark(constrained_answer(answer, reasoning=THINK, is_open=True)).count("[lazy]") == 1
    final = constrained_answer(answer, is_harmony=True)
    assert isinstance(final, Sequence) and final.parts[1] == Literal("<|channel|>final<|message|>")


def test_a_regular_expression_and_a_choice() -> None:
    pattern, choice = Regex("a/b\\/c\nd"), Choice((Literal("a"), Literal('b"')))
    assert "start: /a\\/b\\/c\\nd/" in to_lark(pattern)
    assert to_structural_tag(pattern)["format"] == {"type": "regex", "pattern": "a/b\\/c\nd"}
    assert to_lark(choice).splitlines()[1:] == ["start: r0 | r1", 'r0: "a"', 'r1: "b\\""']
    assert [each["value"] for each in to_structural_tag(choice)["format"]["elements"]] == ["a", 'b"']


HOSTILE: list[dict[str, Any]] = [
    {"properties": {f"p{i}": {} for i in range(256)}},
    {"properties": {f"p{i}": {} for i in range(256)}, "required": ["p1"]},
    {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 100}, "b": {"$ref": "#/properties/b"}}},
    {"properties": {"a": {"type": 5, "enum": "x", "anyOf": {}}, "b": True, "c": {"type": [1, "integer"]}}},
    {"properties": None, "required": None},
]


@pytest.mark.parametrize("schema", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", ["qwen3_coder", "pythonic", "hermes"])
def test_odd_and_big_schemas_make_grammars_all_the_same(name: str, schema: dict[str, Any]) -> None:
    node = force(tool_format(name).styles, ToolSet({"f": schema}), ["f"], parallel=True)
    assert len(to_lark(node)) < 4_000_000
    assert to_structural_tag(node)["type"] == "structural_tag"
    text = "<function=f>\n<parameter=a>\n5\n</parameter>\n<parameter=b>\n5\n</parameter>\n</function>"
    made = make_parser("qwen3_coder", None, tools=ToolSet({"f": schema}), new_id=str, is_open=False)
    assert made is not None
    assert calls(run(made, [text]))[0][0] == "f"


def test_what_a_format_cannot_write_is_refused() -> None:
    shared = {"$defs": {"X": {"description": "x" * 60_000}}}
    for name, schema in (
        ("pythonic", {"properties": {"a b": {}}}),
        ("qwen3_coder", {"properties": {"a>b": {}}}),
        ("qwen3_coder", {"properties": {f"p{i}": {} for i in range(257)}}),
        ("pythonic", {"properties": {f"p{i}": {"$ref": "#/$defs/X"} for i in range(50)}, **shared}),
    ):
        with pytest.raises(StatorError, match="leave tool_choice at auto") as caught:
            force(tool_format(name).styles, ToolSet({"f": schema}), ["f"], parallel=False)
        assert caught.value.param == "tools"
