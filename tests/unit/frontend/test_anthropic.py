"""`/v1/messages` as a translation: what of a body reaches the Processor, and what of its deltas reaches the client."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from anthropic.types import Message, RawMessageStreamEvent, message_count_tokens_params, message_create_params
from anthropic.types.shared import ErrorObject
from anthropic.types.tool_param import ToolParam
from frontend_fakes import MODEL, USAGE, ask, frontend
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from stator.errors import ERRORS, Ending, ErrorCode, StatorError
from stator.frontend.anthropic import ANTHROPIC_ERRORS, INVALID_JSON, SIGNATURE, MessageEvents, WholeMessage
from stator.frontend.anthropic_request import Translated, decode_count_tokens, decode_messages
from stator.messages.anthropic import CountTokensRequest, MessagesRequest, ToolDefinition
from stator.messages.anthropic_fields import COUNT_FIELDS, MESSAGES_FIELDS, Effect, Field
from stator.messages.openai import ChatMessage, TextPart
from stator.messages.processor import CompletionDelta
from stator.messages.tools import FunctionDefinition, FunctionName, NamedToolChoice, Tool, ToolCallDelta
from stator.transport import Call

PATH = "/v1/messages"
HI = [{"role": "user", "content": "hi"}]
WEATHER: dict[str, Any] = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "max_tokens": 5, "messages": HI, **fields}).encode()


def translated(**fields: Any) -> Translated:
    return decode_messages(body(**fields))


def refusal(**fields: Any) -> StatorError:
    with pytest.raises(StatorError) as refused:
        translated(**fields)
    assert refused.value.info.status == 400
    return refused.value


# Requests


def test_sampling_and_length():
    request = translated(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["a", "b"], metadata={"user_id": "u"}
    ).request
    assert (request.model, request.max_tokens, request.temperature) == (MODEL, 7, 0.5)
    assert (request.top_p, request.top_k, request.stop) == (0.9, 3, ["a", "b"])
    assert request.messages == [ChatMessage("user", "hi")]
    assert not request.stream and request.user is None
    assert translated(stream=True).request.stream


@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {}}]])
def test_the_system_prompt_goes_first(system: Any):
    assert translated(system=system).request.messages == [ChatMessage("system", "Be brief."), ChatMessage("user", "hi")]


def test_a_conversation_with_tools():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "I look.", "citations": None},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": [1.5, "ü"]}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "1"},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "text", "text": "And?"},
            ],
        },
        {"role": "system", "content": "Now in French."},
    ]
    made = translated(messages=messages, system="s")
    assert made.request.messages == [
        ChatMessage("system", "s"),
        ChatMessage("user", [TextPart("a"), TextPart("b")]),
        ChatMessage(
            "assistant",
            "I look.",
            tool_calls=[
                {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"x":[1.5,"ü"]}'}},
                {"id": "t2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
            reasoning_content="hm",
        ),
        ChatMessage("tool", "1", tool_call_id="t1"),
        ChatMessage("tool", "", tool_call_id="t2"),
        ChatMessage("user", "And?"),
        ChatMessage("system", "Now in French."),
    ]
    error = made.named(StatorError(ErrorCode.UNSUPPORTED, "messages[4].role: no", param="messages[4].role"))
    assert error.param == "messages[2].content[1].role" and error.message == "messages[2].content[1].role: no"


def test_tools_and_the_choice_among_them():
    made = translated(tools=[WEATHER | {"description": "d", "strict": True, "type": "custom"}]).request
    assert made.tools == [
        Tool("function", FunctionDefinition("get_weather", "d", {"type": "object", "properties": {}}, True))
    ]
    for choice, expected in (
        (None, None),
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "get_weather"}, NamedToolChoice(FunctionName("get_weather"))),
    ):
        made = translated(tools=[WEATHER], tool_choice=choice).request
        assert made.tool_choice == expected and made.parallel_tool_calls is None
    made = translated(tools=[WEATHER], tool_choice={"type": "any", "disable_parallel_tool_use": True}).request
    assert made.parallel_tool_calls is False


def test_thinking_and_the_form_of_the_answer():
    made = translated(thinking={"type": "enabled", "budget_tokens": 1024}).request
    assert made.chat_template_kwargs == {"enable_thinking": True, "thinking": True, "thinking_budget": 1024}
    assert translated(thinking={"type": "adaptive"}).request.chat_template_kwargs
    assert translated(thinking={"type": "disabled"}, output_config={"effort": "low"}).request.reasoning_effort == "none"
    assert translated(output_config={"effort": "max"}).request.reasoning_effort == "high"
    form = translated(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}}).request
    assert form.response_format is not None and form.response_format.json_schema is not None
    assert form.response_format.json_schema.schema == {"type": "object"}


def deep(levels: int) -> Any:
    return {} if not levels else {"a": deep(levels - 1)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [*HI, {"role": "assistant", "content": "I"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}, *HI]},
            "messages[0].content[0].type",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "document"}]}],
                    }
                ]
            },
            "messages[0].content[0].content[0].type",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": deep(70)}],
                    },
                    *HI,
                ]
            },
            "messages[0].content[0].input",
        ),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"system": [{"text": "x"}]}, "system[0].type"),
        ({"output_config": {"format": {"schema": {}}}}, "output_config.format.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f", "input_schema": deep(70)}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [WEATHER | {"allowed_callers": ["code_execution_20260120"]}]}, "tools[0].allowed_callers"),
        ({"tools": [WEATHER | {"input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "json_schema", "schema": deep(70)}}}, "output_config.format.schema"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"service_tier": "gold"}, "service_tier"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(fields: dict[str, Any], param: str):
    error = refusal(**fields)
    assert error.param == param and param in error.message


def test_errors_about_the_chat_request_have_anthropics_names():
    made = translated(thinking={"type": "disabled"}, system="s")
    for name, expected in (
        ("tools[3].function.parameters.properties", "tools[3].input_schema.properties"),
        ("tools[3].function.name", "tools[3].name"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("response_format", "output_config.format"),
        ("stop", "stop_sequences"),
        ("messages[0].content", "system.content"),
        ("messages[1].content", "messages[0].content"),
        ("reasoning_effort", "thinking"),
        ("max_tokens", "max_tokens"),
    ):
        error = made.named(StatorError(ErrorCode.INVALID_REQUEST, f"{name} is wrong", param=name))
        assert (error.param, error.message) == (expected, f"{expected} is wrong")
    error = StatorError(ErrorCode.OVERLOADED, "messages[0] wait", retry_after_s=2.0)
    assert made.named(error) is error


# The table of fields

OLDER = {"temperature", "top_p", "top_k"}
BETA = {"context_management", "mcp_servers"}


def test_the_tables_are_the_schema_of_the_installed_package():
    def roots(fields: tuple[Field, ...]) -> set[str]:
        return {each.name.split(".")[0] for each in fields}

    create = set(message_create_params.MessageCreateParamsBase.__annotations__) | {"stream"}
    assert roots(MESSAGES_FIELDS) == create | OLDER | BETA
    count = set(message_count_tokens_params.MessageCountTokensParams.__annotations__)
    assert roots(COUNT_FIELDS) == count | BETA
    assert set(MessagesRequest.__struct_fields__) == roots(MESSAGES_FIELDS)
    assert set(CountTokensRequest.__struct_fields__) == roots(COUNT_FIELDS)
    harmless = {"cache_control", "eager_input_streaming"}
    assert set(ToolDefinition.__struct_fields__) == set(ToolParam.__annotations__) - harmless


ASKS = {"speed": "fast", "mcp_servers": [{"type": "url"}], "inference_geo": "eu"}


@pytest.mark.parametrize(
    "field", [each for each in MESSAGES_FIELDS if each.effect is Effect.REFUSED and "." not in each.name], ids=str
)
def test_every_refused_field_is_refused_by_its_name_unless_it_asks_for_nothing(field: Field):
    assert refusal(**{field.name: ASKS.get(field.name, {"id": "x"})}).param == field.name
    for value in (None, *field.harmless):
        translated(**{field.name: value})


@settings(max_examples=80)
@given(st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_whatever_the_bytes_a_body_is_a_request_or_refused(data: bytes | str):
    raw = data if isinstance(data, bytes) else data.encode()
    for decode in (decode_messages, decode_count_tokens):
        with pytest.raises(StatorError) as refused:
            decode(raw)
        assert refused.value.info.status == 400


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "name"]), inner),
    max_leaves=4,
)


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from(MessagesRequest.__struct_fields__), _VALUE))
def test_fields_of_any_value_are_taken_or_refused(fields: dict[str, Any]):
    try:
        request = translated(**fields).request
    except StatorError as error:
        assert error.info.status == 400 and error.message
    else:
        msgspec.msgpack.encode(request)


# Answers


def delta(text: str = "", ending: Ending | None = None, **fields: Any) -> CompletionDelta:
    return CompletionDelta(text, 1, ending, USAGE, **fields)


def piece(index: int, arguments: str = "", name: str | None = None) -> list[ToolCallDelta]:
    return [ToolCallDelta(index, None if name is None else f"call_{index}", name, arguments)]


def stream_of(deltas: list[CompletionDelta], **options: Any) -> bytes:
    encoder = MessageEvents("id", MODEL, deltas[0], hides_thoughts=options.get("hides_thoughts", False))
    return encoder.opening() + b"".join(encoder.encode([each]) for each in deltas) + encoder.closing()


def message_of(stream: bytes) -> dict[str, Any]:
    """What a stream's events add up to, each checked against the package's own types."""
    message: dict[str, Any] = {}
    parts: list[str] = []
    for event in stream[:-2].split(b"\n\n"):
        name, data = event.split(b"\n")
        found = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + found["type"].encode()
        EVENTS.validate_python(found)
        match found["type"]:
            case "message_start":
                assert not message
                message = found["message"]
            case "content_block_start":
                assert found["index"] == len(message["content"])
                message["content"].append(found["content_block"])
                parts = []
            case "content_block_delta":
                block = message["content"][found["index"]]
                kind = found["delta"].pop("type")
                ((field, text),) = found["delta"].items()
                if kind == "input_json_delta":
                    parts.append(text)
                else:
                    block[field] += text
            case "content_block_stop":
                if parts:
                    message["content"][-1]["input"] = json.loads("".join(parts))
            case "message_delta":
                message |= found["delta"]
                message["usage"] |= found["usage"]
            case _:
                assert found["type"] == "message_stop"
    return message


def whole_of(deltas: list[CompletionDelta], **options: Any) -> dict[str, Any]:
    answer = WholeMessage("id", MODEL, hides_thoughts=options.get("hides_thoughts", False))
    answer.add(deltas)
    found = json.loads(answer.encode(USAGE))
    Message.model_validate(found)
    return found


TEXT = {"type": "text", "text": "Hello"}
USED = {
    "input_tokens": 3,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 4,
    "output_tokens": 3,
}


def call(index: int, **input: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"call_{index}", "name": "f", "input": input}


@pytest.mark.parametrize(
    ("deltas", "content", "stop_reason"),
    [
        ([delta("Hel"), delta("lo", Ending.STOP)], [TEXT], "end_turn"),
        ([delta("Hel"), delta("lo"), delta(ending=Ending.LENGTH)], [TEXT], "max_tokens"),
        ([delta("Hello"), delta(ending=Ending.STOP, stop_string="!")], [TEXT], "stop_sequence"),
        ([delta(ending=Ending.STOP)], [], "end_turn"),
        ([delta(" "), delta("\n", Ending.STOP)], [{"type": "text", "text": " \n"}], "end_turn"),
        (
            [delta(reasoning="h", parsed=True), delta(reasoning="m\n"), delta("\n\n"), delta("Hello", Ending.STOP)],
            [{"type": "thinking", "thinking": "hm\n", "signature": SIGNATURE}, {"type": "text", "text": "\n\nHello"}],
            "end_turn",
        ),
        ([delta(reasoning="\n", parsed=True), delta("Hello", Ending.STOP)], [TEXT], "end_turn"),
        (
            [
                delta("Hello", parsed=True, tool_calls=piece(0, '{"a', "f")),
                delta(tool_calls=piece(0, '":1}')),
                delta("\n"),
                delta(tool_calls=[*piece(1, "", "f"), *piece(2, "{}", "f")]),
                delta(ending=Ending.TOOL_CALLS),
            ],
            [TEXT, call(0, a=1), call(1), call(2)],
            "tool_use",
        ),
        # A function that the client named: chat's ending is stop.
        ([delta(parsed=True, tool_calls=piece(0, "{}", "f")), delta(ending=Ending.STOP)], [call(0)], "tool_use"),
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(deltas: list[CompletionDelta], content: Any, stop_reason: str):
    expected = {
        "id": "msg_id",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": "!" if stop_reason == "stop_sequence" else None,
        "usage": USED,
    }
    assert whole_of(deltas) == expected
    assert message_of(stream_of(deltas)) == expected


def test_deltas_that_wait_together_make_one_event():
    encoder = MessageEvents("id", MODEL, delta("a"), hides_thoughts=False)
    assert encoder.encode([delta("a"), delta("b"), delta("c")]).count(b"content_block_delta\n") == 1


def test_thoughts_may_be_left_out():
    deltas = [delta(reasoning="secret", parsed=True), delta("Hello", Ending.STOP)]
    for found in (whole_of(deltas, hides_thoughts=True), message_of(stream_of(deltas, hides_thoughts=True))):
        assert found["content"] == [{"type": "thinking", "thinking": "", "signature": SIGNATURE}, TEXT]


@pytest.mark.parametrize("arguments", ['{"a":', "[1]", "[" * 100_000])
def test_a_call_that_is_not_json_says_so(arguments: str):
    deltas = [delta(parsed=True, tool_calls=piece(0, arguments, "f")), delta(ending=Ending.LENGTH)]
    found = whole_of(deltas)
    assert found["content"] == [call(0, **{INVALID_JSON: arguments})] and found["stop_reason"] == "max_tokens"


# Errors


def test_every_failure_has_a_type_and_status_that_the_client_knows():
    objects = get_args(get_args(ErrorObject)[0])
    types = {kind for each in objects for kind in get_args(each.model_fields["type"].annotation)}
    for code in ErrorCode:
        error = StatorError(code, "why")
        found = json.loads(ANTHROPIC_ERRORS.body(error, "r1"))
        status = ANTHROPIC_ERRORS.status(error)
        kind = found["error"]["type"]
        assert found == {"type": "error", "error": {"type": kind, "message": "why"}, "request_id": "r1"}
        # The package declares no type for 413; the API's documentation does.
        assert kind in types | {"request_too_large"}
        assert (status >= 500) == (ERRORS[code].status >= 500 or ERRORS[code].status == 429)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


def test_over_http():
    async def test() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "POST", PATH, body(), headers={"anthropic-version": "2023-06-01"})
            assert answer.status == 200 and answer.json["content"] == [{"type": "text", "text": "Hello world"}]
            assert answer.headers["request-id"] == answer.headers["x-request-id"]
            streamed = await ask(fe.app, "POST", PATH, body(stream=True))
            assert message_of(streamed.body)["content"] == answer.json["content"]
            assert 'endpoint="messages"' in fe.metrics.render().decode()

    run(test)


def test_failures_over_http():
    def overloaded(call: Call) -> None:
        call.end(StatorError(ErrorCode.OVERLOADED, "too many", retry_after_s=3))

    async def test() -> None:
        async with frontend(overloaded) as fe:
            for method, path, data, status, kind in (
                ("POST", PATH, body(), 529, "overloaded_error"),
                ("POST", PATH, b"{", 400, "invalid_request_error"),
                ("GET", PATH, b"", 405, "invalid_request_error"),
                ("POST", PATH + "/batches", b"", 404, "not_found_error"),
                ("POST", PATH + "/count_tokens", body(), 529, "overloaded_error"),
                ("POST", PATH + "/count_tokens", body(messages=None), 400, "invalid_request_error"),
            ):
                answer = await ask(fe.app, method, path, data)
                assert (answer.status, answer.json["error"]["type"]) == (status, kind)
                assert answer.json["request_id"] == answer.headers["request-id"]
            assert 'stator_requests_total{code="529",endpoint="messages"' in fe.metrics.render().decode()

    run(test)


def test_a_failure_amid_a_stream_is_its_last_event():
    def breaks(call: Call) -> None:
        call.items([CompletionDelta("Hel", 1)])
        call.end(StatorError(ErrorCode.INSTANCE_LOST, "lost"))

    async def test() -> None:
        async with frontend(breaks) as fe:
            answer = await ask(fe.app, "POST", PATH, body(stream=True))
            last = answer.body[:-2].split(b"\n\n")[-1]
            assert last == b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"lost"}}'

    run(test)


def test_counting():
    def count(call: Call) -> None:
        call.items([CompletionDelta(ending=Ending.STOP, usage=msgspec.structs.replace(USAGE, completion_tokens=0))])
        call.end()

    async def test() -> None:
        async with frontend(count) as fe:
            fields = {"model": MODEL, "messages": HI, "tools": [WEATHER]}
            answer = await ask(fe.app, "POST", PATH + "/count_tokens", json.dumps(fields).encode())
            assert (answer.status, answer.json) == (200, {"input_tokens": 7})
            text = fe.metrics.render().decode()
            assert 'stator_requests_total{code="200",endpoint="count_tokens"' in text
            # What was counted was not computed.
            assert 'stator_request_input_tokens_count{endpoint="count_tokens"' not in text

    run(test)
