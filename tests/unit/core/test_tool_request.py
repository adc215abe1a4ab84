from typing import Any

import msgspec
import pytest

from stator.core.json_schema import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, check_schema
from stator.core.structured import (
    normalize_response_format,
    normalize_structured_outputs,
    one_grammar,
)
from stator.core.tools.request import MAX_TOOLS, NO_TOOLS, CallMode, ToolRequest, normalize_tools
from stator.errors import ErrorCode, StatorError
from stator.messages.grammar import Choice, Grammar, Json, Literal, OwnGrammar, Regex
from stator.messages.tools import ResponseFormat, StructuredOutputs, Tool, ToolChoice


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def normalized(tools: Any, choice: Any = None, parallel: bool | None = None) -> ToolRequest:
    """As a body is: decoded, then checked."""
    return normalize_tools(
        msgspec.convert(tools, list[Tool] | None), msgspec.convert(choice, ToolChoice | None), parallel
    )


def refusal(tools: Any, choice: Any = None) -> tuple[str | None, str]:
    with pytest.raises(StatorError) as caught:
        normalized(tools, choice)
    assert caught.value.code in (ErrorCode.INVALID_REQUEST, ErrorCode.UNSUPPORTED)
    assert caught.value.info.status == 400
    return caught.value.param, caught.value.message


def test_no_tools() -> None:
    for tools in (None, []):
        for choice in (None, "none", "auto"):
            assert normalized(tools, choice) is NO_TOOLS
        for choice in ("required", {"type": "function", "function": {"name": "f"}}):
            assert refusal(tools, choice)[0] == "tool_choice"
    assert not NO_TOOLS.parses_calls and not NO_TOOLS.is_forced


def test_tools_and_what_may_be_called() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = [tool("f", description="d", parameters=schema, strict=True), tool("g")]
    auto = normalized(tools)
    assert (auto.mode, auto.names, auto.parallel) == (CallMode.AUTO, ("f", "g"), True)
    assert auto.tools.parameters == {"f": schema, "g": None}
    assert auto.definitions == (
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}},
        {"type": "function", "function": {"name": "g"}},
    )
    assert auto.parses_calls and not auto.is_forced
    assert normalized(tools, "required", False).parallel is False
    assert normalized(tools, "required").is_forced


def test_none_shows_the_tools_and_reads_no_calls() -> None:
    request = normalized([tool()], "none")
    assert (request.mode, request.names, len(request.definitions)) == (CallMode.NONE, (), 1)
    assert not request.parses_calls


def test_a_named_function_is_called_once() -> None:
    request = normalized([tool("f"), tool("g")], {"type": "function", "function": {"name": "g"}}, True)
    assert (request.mode, request.names, request.parallel) == (CallMode.NAMED, ("g",), False)


def test_allowed_tools_are_those_of_a_list() -> None:
    def allowed(mode: str, *names: str) -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    tools = [tool("f"), tool("g"), tool("h")]
    assert normalized(tools, allowed("required", "h", "f")).names == ("h", "f")
    assert normalized(tools, allowed("auto", "g")).mode is CallMode.AUTO
    assert refusal(tools, allowed("auto"))[0] == "tool_choice.allowed_tools.tools"
    assert refusal(tools, allowed("auto", "f", "x"))[0] == "tool_choice.allowed_tools.tools[1].function.name"


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


REFUSED: list[tuple[list[Any], str]] = [
    ([tool(), {"type": "custom", "custom": {"name": "x"}}], "tools[1].type"),
    ([{"type": "function"}], "tools[0].function"),
    ([tool("a b")], "tools[0].function.name"),
    ([tool("")], "tools[0].function.name"),
    ([tool("x" * 65)], "tools[0].function.name"),
    ([tool("f\n")], "tools[0].function.name"),
    ([tool("f"), tool("f")], "tools[1].function.name"),
    ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], "tools"),
    ([tool(f"f{i}", description="x" * 10_000) for i in range(60)], "tools"),
    ([tool("f", parameters={"type": "array"})], "tools[0].function.parameters.type"),
    ([tool("f", parameters={"properties": []})], "tools[0].function.parameters.properties"),
    ([tool("f", parameters={"required": "a"})], "tools[0].function.parameters.required"),
    ([tool("f", parameters={"description": "x" * MAX_SCHEMA_BYTES})], "tools[0].function.parameters"),
    ([tool("f", parameters={"enum": list(range(9000))})], "tools[0].function.parameters"),
    (
        [tool("f", parameters={"properties": {"a": {"$ref": "http://x/y"}}})],
        "tools[0].function.parameters.properties.a.$ref",
    ),
    (
        [tool("f", parameters={"properties": {"a b": {"pattern": "x" * 3000}}})],
        "tools[0].function.parameters.properties.….pattern",
    ),
]


@pytest.mark.parametrize(("tools", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_what_is_refused_is_named(tools: list[Any], param: str) -> None:
    found, message = refusal(tools)
    assert found == param
    assert param in message and len(message) < 300


def test_a_choice_of_what_is_not_there() -> None:
    assert refusal([tool()], {"type": "function", "function": {"name": "g"}})[0] == "tool_choice.function.name"


def test_the_depth_of_a_schema_is_bounded() -> None:
    check_schema(nested(MAX_SCHEMA_DEPTH), "s")
    with pytest.raises(StatorError, match=f"{MAX_SCHEMA_DEPTH} levels") as caught:
        check_schema(nested(MAX_SCHEMA_DEPTH + 1), "s")
    assert caught.value.param == "s" + ".items" * MAX_SCHEMA_DEPTH
    with pytest.raises(StatorError):
        check_schema(nested(100_000), "s")


@pytest.mark.parametrize("choice", ["always", {"type": "function"}, {"type": "custom"}, 3])
def test_a_choice_of_another_shape_does_not_decode(choice: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        normalized([tool()], choice)


def response_format(value: Any) -> Grammar | None:
    return normalize_response_format(msgspec.convert(value, ResponseFormat | None))


def test_response_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert response_format(None) is response_format({"type": "text"}) is None
    assert response_format({"type": "json_object"}) == Json({"type": "object"})
    assert response_format({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}) == Json(schema)


@pytest.mark.parametrize(
    ("json_schema", "param"),
    [
        (None, "response_format.json_schema"),
        ({"name": "a b", "schema": {}}, "response_format.json_schema.name"),
        ({"name": "x"}, "response_format.json_schema.schema"),
        ({"name": "x", "schema": nested(40)}, "response_format.json_schema.schema" + ".items" * MAX_SCHEMA_DEPTH),
    ],
)
def test_response_formats_that_are_refused(json_schema: Any, param: str) -> None:
    with pytest.raises(StatorError) as caught:
        response_format({"type": "json_schema", "json_schema": json_schema})
    assert caught.value.param == param


def test_structured_outputs() -> None:
    assert normalize_structured_outputs(None) is None
    assert normalize_structured_outputs(StructuredOutputs(json={})) == Json({})
    assert normalize_structured_outputs(StructuredOutputs(json='{"type": "object"}')) == Json({"type": "object"})
    assert normalize_structured_outputs(StructuredOutputs(json_object=True)) == Json({"type": "object"})
    assert normalize_structured_outputs(StructuredOutputs(regex="a+")) == Regex("a+")
    assert normalize_structured_outputs(StructuredOutputs(choice=["b", "a", "b"])) == Choice(
        (Literal("b"), Literal("a"))
    )
    assert normalize_structured_outputs(StructuredOutputs(grammar="root ::= x")) == OwnGrammar("root ::= x")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (StructuredOutputs(), "structured_outputs"),
        (StructuredOutputs(regex="a", choice=["b"]), "structured_outputs"),
        (StructuredOutputs(json_object=False), "structured_outputs"),
        (StructuredOutputs(regex="a" * 3000), "structured_outputs.regex"),
        (StructuredOutputs(regex=""), "structured_outputs.regex"),
        (StructuredOutputs(choice=[]), "structured_outputs.choice"),
        (StructuredOutputs(choice=["a", ""]), "structured_outputs.choice[1]"),
        (StructuredOutputs(grammar="a" * 70_000), "structured_outputs.grammar"),
        (StructuredOutputs(json="[1]"), "structured_outputs.json"),
        (StructuredOutputs(json="[" * 100_000), "structured_outputs.json"),
        (StructuredOutputs(json={"$ref": "file:x"}), "structured_outputs.json.$ref"),
    ],
)
def test_structured_outputs_that_are_refused(asked: StructuredOutputs, param: str) -> None:
    with pytest.raises(StatorError) as caught:
        normalize_structured_outputs(asked)
    assert caught.value.param == param


def test_one_grammar_a_request() -> None:
    constraint = Regex("a")
    assert one_grammar(None, None) is None
    assert one_grammar(constraint, None) is one_grammar(None, constraint) is constraint
    with pytest.raises(StatorError, match="together"):
        one_grammar(constraint, constraint)
