"""Items as chat messages, and the rest of a request for a response as one for a chat completion."""

import json
from typing import Any

import pytest

from stator.errors import ErrorCode, StatorError
from stator.frontend.responses_request import (
    ItemIds,
    chat_messages,
    chat_request,
    decode_responses,
    in_our_names,
    read_input,
    response_of,
)
from stator.messages.openai import ChatCompletionRequest, ChatMessage, TextPart
from stator.messages.tools import (
    AllowedToolChoice,
    AllowedTools,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)

BASE = "ab" * 24
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at":1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "fog"}


def read(given: Any) -> list[dict[str, Any]]:
    return read_input(given, ItemIds(BASE))


def translate(**fields: Any) -> ChatCompletionRequest:
    request = decode_responses(json.dumps({"model": "m", "input": "hi", **fields}).encode())
    return chat_request(request, read(request.input))


def refusal(**fields: Any) -> tuple[str | None, str]:
    with pytest.raises(StatorError) as refused:
        translate(**fields)
    assert refused.value.info.status == 400
    return refused.value.param, refused.value.message


def test_a_text_is_what_the_user_says() -> None:
    assert translate().messages == [ChatMessage("user", "hi")]
    assert translate(instructions="Be brief.").messages == [
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "hi"),
    ]


def test_every_item_gets_an_id_that_names_its_response_unless_it_has_one() -> None:
    items = read([{"role": "user", "content": "a"}, {**CALL, "id": "fc_mine"}, OUTPUT])
    assert [item["id"] for item in items] == [f"msg_{BASE}_1", "fc_mine", f"fco_{BASE}_2"]
    assert response_of(items[2]["id"]) == ItemIds(BASE).response_id == f"resp_{BASE}"
    assert response_of("fc_mine") is None


def test_messages_are_kept_in_one_form() -> None:
    said = {"type": "input_text", "text": "a"}
    answered = {"type": "output_text", "text": "b", "annotations": [], "logprobs": []}
    user, assistant = read([{"role": "user", "content": "a"}, {"role": "assistant", "content": [answered]}])
    assert (user["type"], user["content"]) == ("message", [said])
    assert (assistant["type"], assistant["content"]) == ("message", [answered])


def test_one_turn_of_the_model_is_one_message() -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "?"}]}
    items = read(
        [
            {"role": "user", "content": "what is there"},
            reasoning,
            {"role": "assistant", "content": "I look."},
            CALL,
            {**CALL, "call_id": "c2"},
            OUTPUT,
            {**OUTPUT, "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
            {"role": "assistant", "content": "Fog."},
            {"role": "assistant", "content": "And sun."},
        ]
    )
    calls = [
        {"id": call_id, "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
        for call_id in ("c1", "c2")
    ]
    assert chat_messages(items) == [
        ChatMessage("user", "what is there"),
        ChatMessage("assistant", "I look.", tool_calls=calls, reasoning_content="?"),
        ChatMessage("tool", "fog", name="look", tool_call_id="c1"),
        ChatMessage("tool", "sun", name="look", tool_call_id="c2"),
        ChatMessage("assistant", "Fog."),
        ChatMessage("assistant", "And sun."),
    ]


def test_several_parts_stay_apart() -> None:
    parts = [{"type": "input_text", "text": text} for text in "ab"]
    (message,) = chat_messages(read([{"type": "message", "role": "developer", "content": parts}]))
    assert message == ChatMessage("developer", [TextPart("a"), TextPart("b")])


def test_tools_and_the_choice_among_them() -> None:
    tool = {"type": "function", "name": "look", "description": "d", "parameters": {"type": "object"}, "strict": True}
    request = translate(tools=[tool], tool_choice={"type": "function", "name": "look"}, parallel_tool_calls=False)
    assert request.tools == [Tool("function", FunctionDefinition("look", "d", {"type": "object"}, True))]
    assert request.tool_choice == NamedToolChoice(FunctionName("look"))
    assert request.parallel_tool_calls is False
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    assert translate(tools=[tool], tool_choice=allowed).tool_choice == AllowedToolChoice(
        AllowedTools("required", [NamedToolChoice(FunctionName("look"))])
    )
    assert translate(tools=[tool], tool_choice="required").tool_choice == "required"


def test_what_has_another_name_in_chat() -> None:
    schema = {"type": "object"}
    request = translate(
        max_output_tokens=5,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=3,
        seed=7,
        stop=["x"],
    )
    assert request.max_completion_tokens == 5 and request.reasoning_effort == "low"
    assert request.response_format == ResponseFormat("json_schema", JsonSchemaFormat("n", schema, None, True))
    assert (request.logprobs, request.top_logprobs, request.seed, request.stop) == (True, 3, 7, ["x"])
    assert translate(text={"format": {"type": "text"}}).response_format is None
    assert translate(text={"format": {"type": "json_object"}}).response_format == ResponseFormat("json_object")
    assert translate(top_logprobs=0).logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input[0].call_id"),
        ({"input": [{**OUTPUT, "id": ""}]}, "input[0].id"),
        ({"input": [{**OUTPUT, "x": 2**64}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"include": ["everything"]}, "include[0]"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_what_is_refused_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    named, message = refusal(**fields)
    assert named == param and param in message


@pytest.mark.parametrize(
    ("chat", "ours"),
    [
        ("messages[3].role", "input"),
        ("response_format.json_schema.schema.properties", "text.format.schema.properties"),
        ("response_format", "text.format"),
        ("max_completion_tokens", "max_output_tokens"),
        ("reasoning_effort", "reasoning.effort"),
        ("tools[2].function.name", "tools[2].name"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("tool_choice.allowed_tools.tools[1].function.name", "tool_choice.tools[1].name"),
        ("tools", "tools"),
        ("temperature", "temperature"),
        (None, None),
    ],
)
def test_what_chat_refuses_is_told_under_the_names_that_the_client_used(chat: str | None, ours: str | None) -> None:
    error = in_our_names(StatorError(ErrorCode.INVALID_REQUEST, f"{chat} is wrong", param=chat, retry_after_s=2.0))
    assert (error.param, error.message, error.retry_after_s) == (ours, f"{ours} is wrong", 2.0)
    assert in_our_names(error).param == ours
