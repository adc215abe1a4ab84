"""What a client gets for a request that fails, and that no body makes the server fail."""

import asyncio
import json
from typing import Any

import msgspec
import pytest
from frontend_fakes import MODEL, AsgiClient, ask, chat_body, delta, frontend, text_body
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.core.public_errors import TOLD
from stator.errors import ERRORS, Ending, ErrorCode, StatorError
from stator.frontend.decode import CHAT, COMPLETIONS, decode_request
from stator.frontend.health import HealthReport
from stator.frontend.settings import FrontendSettings
from stator.messages.openai import CompletionRequest, PromptTokensDetails, RequestFields, Usage
from stator.messages.processor import CompletionDelta
from stator.transport import Call

CHAT_PATH = "/v1/chat/completions"


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "empty"),
        (b'{"model":', None, "not valid JSON: it ends too early (byte 9)"),
        (b'{"model": yes}', None, "invalid character (byte 10)"),
        (b'{"model": "\xff"}', None, "UTF-8"),
        (b"[1, 2]", None, "must be a JSON object"),
        (b'"text"', None, "must be a JSON object"),
        (b'{"messages": []}', "model", "Missing required field: 'model'"),
        (chat_body(messages=[{"content": "hi"}]), "messages[0].role", "Missing"),
        (chat_body(messages=[{"role": "king", "content": "hi"}]), "messages[0].role", "'king'"),
        (chat_body(messages=[{"role": "user", "content": 5}]), "messages[0].content", "`int`"),
        (chat_body(messages="hi"), "messages", "`array`"),
        (chat_body(temperature="hot"), "temperature", "`str`"),
        (chat_body(metadata={"a": 1}), "metadata", "`int`"),
        (chat_body(seed=2**63), "seed", "9223372036854775807"),
        (chat_body(stop=[1]), "stop[0]", "`int`"),
        (chat_body(stream_options={"include_usage": True}), "stream_options", "stream"),
        (chat_body(tools=[tool({"a": 2**70})]), "tools[0].function.parameters", "64 bits"),
        (chat_body(tools=[tool(json.loads('{"a":' * 80 + "1" + "}" * 80))]), "tools[0].function.parameters", "deep"),
        (b'{"model": ' + b"[" * 200_000, "model", "`array`"),
        (b'{"extension": ' + b"[" * 200_000, None, "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bodies_that_are_refused(body: bytes, param: str | None, words: str):
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, body)
            assert not fe.calls
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["code"] == "invalid_request"
        assert answer.error["param"] == param
        assert words in answer.error["message"]
        assert "x-request-id" in answer.headers

    asyncio.run(run())


@pytest.mark.parametrize("prompt", [["a", 1], [[1], "a"], [1, [2]], {"a": 1}, 5, None, [1.5], [-1], [2**32]])
def test_prompts_that_are_refused(prompt: object):
    with pytest.raises(StatorError) as refused:
        decode_request(COMPLETIONS, text_body(prompt=prompt))
    assert refused.value.param is not None
    assert refused.value.param.startswith("prompt")


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]], [], ""])
def test_prompts_that_are_taken(prompt: object):
    assert decode_request(COMPLETIONS, text_body(prompt=prompt)).prompt == prompt  # type: ignore[union-attr]


def test_duplicate_and_unknown_fields_are_harmless():
    request = decode_request(
        CHAT, b'{"model":"a","model":"b","messages":[],"vendor":{"x":[1e999999]}}'.replace(b"1e999999", b"1")
    )
    assert request.model == "b"


NAMES = [*RequestFields.__struct_fields__, "messages", "prompt", "tools", "tool_choice", "max_tokens", "audio"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def decoded_or_refused(endpoint: str, body: bytes) -> None:
    try:
        msgspec.msgpack.encode(decode_request(endpoint, body))
    except StatorError as error:
        assert error.code is ErrorCode.INVALID_REQUEST
        assert error.message.endswith(".")
        assert len(error.message) < 1000


@pytest.mark.parametrize(
    "name", ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "audio", "function_call", "prediction"]
)
@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_a_number_that_the_wire_cannot_carry_is_refused_in_any_field_of_any_json(name: str, value: int):
    for endpoint, body in ((CHAT, chat_body), (COMPLETIONS, text_body)):
        if endpoint == COMPLETIONS and name not in CompletionRequest.__struct_fields__:
            continue
        for held in ([{"a": value}], value):
            if name == "audio":
                held = {"a": value}
            with pytest.raises(StatorError, match="64 bits") as refused:
                decode_request(endpoint, body(**{name: held}))
            assert refused.value.param == name


@settings(deadline=None)
@given(st.sampled_from([CHAT, COMPLETIONS]), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_no_json_body_is_more_than_refused(endpoint: str, fields: dict[str, Any]):
    whole = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "prompt": "a", **fields}
    decoded_or_refused(endpoint, json.dumps(whole).encode())
    decoded_or_refused(endpoint, json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass"))


@settings(deadline=None)
@given(
    st.sampled_from([CHAT, COMPLETIONS]), st.binary(max_size=40) | st.text('{}[]",:1e\\u', max_size=40).map(str.encode)
)
def test_no_bytes_are_more_than_refused(endpoint: str, body: bytes):
    decoded_or_refused(endpoint, body)


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/", 404, None),
        ("GET", "/v1/models/", 404, None),
        ("POST", "/v1/chat/completions/", 404, None),
        ("GET", "/V1/models", 404, None),
        ("GET", CHAT_PATH, 405, "POST"),
        ("OPTIONS", CHAT_PATH, 405, "POST"),
        ("HEAD", CHAT_PATH, 405, "POST"),
        ("POST", "/v1/models", 405, "GET, HEAD"),
        ("DELETE", f"/v1/models/{MODEL}", 405, "GET, HEAD"),
        ("POST", "/health", 405, "GET, HEAD"),
    ],
)
def test_paths_and_methods(method: str, path: str, status: int, allow: str | None):
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, method, path)
        assert (answer.status, answer.headers.get("allow")) == (status, allow)
        assert answer.error["type"] == "invalid_request_error"

    asyncio.run(run())


@pytest.mark.parametrize("code", list(ErrorCode))
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_text_has_its_status(code: ErrorCode, stream: bool):
    def script(call: Call) -> None:
        call.end(StatorError(code, "It failed.", param="p", retry_after_s=1.2))

    async def run() -> None:
        async with frontend(script) as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body(stream=stream))
        assert answer.status == ERRORS[code].status
        assert answer.error == {
            "message": TOLD.get(code, "It failed."),
            "type": ERRORS[code].openai_type,
            "param": "p",
            "code": code.value,
        }
        assert answer.headers["retry-after"] == "2"

    asyncio.run(run())


def test_an_error_in_mid_stream_is_its_last_event():
    def script(call: Call) -> None:
        call.items([delta("a")])
        call.end(StatorError(ErrorCode.INSTANCE_LOST, "The worker is gone."))

    async def run() -> None:
        async with frontend(script) as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body(stream=True))
            assert b'code="502"' in fe.metrics.render()
        assert answer.status == 200
        assert answer.complete
        assert "[DONE]" not in answer.events
        assert answer.events[-1]["error"]["code"] == "instance_lost"
        assert answer.events[-2]["choices"][0]["delta"] == {"content": "a"}

    asyncio.run(run())


NO_TOKENS = CompletionDelta("", 0, Ending.STOP, Usage(7, 0, 7, PromptTokensDetails(0)))


@pytest.mark.parametrize("items", [[], [NO_TOKENS], [CompletionDelta("", 0, Ending.STOP)], [CompletionDelta()]])
@pytest.mark.parametrize("stream", [False, True])
def test_there_is_no_empty_200(items: list[CompletionDelta], stream: bool):
    def script(call: Call) -> None:
        if items:
            call.items(items)
        call.end()

    async def run() -> None:
        async with frontend(script) as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body(stream=stream))
            assert fe.app.generation.num_open == 0
        if stream and answer.status == 200:
            # Something was said before the stream broke off.
            assert items == [CompletionDelta()]
            assert "[DONE]" not in answer.events and answer.events[-1]["error"]["code"] == "internal"
        else:
            assert (answer.status, answer.error["code"]) == (500, "internal")

    asyncio.run(run())


def test_a_poison_request_is_not_to_be_sent_again():
    def script(call: Call) -> None:
        call.end(StatorError(ErrorCode.POISON_REQUEST, "Two engines crashed."))

    async def run() -> None:
        async with frontend(script) as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body())
        assert (answer.status, answer.headers["x-should-retry"]) == (500, "false")
        assert "retry-after" not in answer.headers

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_without_an_ending_is_an_error(stream: bool):
    def script(call: Call) -> None:
        call.items([delta("a")])
        call.end()

    async def run() -> None:
        async with frontend(script) as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body(stream=stream))
        error = answer.events[-1]["error"] if stream else answer.error
        assert error["code"] == "internal"

    asyncio.run(run())


def test_a_failing_handler_shows_nothing_of_itself():
    def script(call: Call) -> None:
        raise ValueError("the secret path")

    async def run() -> None:
        async with frontend(script) as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body())
        assert answer.status == 500
        assert b"secret" not in answer.body

    asyncio.run(run())


def test_a_bug_of_our_own_shows_nothing_of_itself():
    async def run() -> None:
        async with frontend() as fe:
            fe.health = None  # type: ignore[assignment]
            answer = await ask(fe.app, "GET", "/health")
        assert answer.status == 500
        assert answer.error["code"] == "internal"
        assert b"NoneType" not in answer.body

    asyncio.run(run())


def test_a_body_too_large_is_refused_whatever_was_declared():
    async def run() -> None:
        async with frontend(settings=FrontendSettings(max_body_bytes=10)) as fe:
            for headers in ({}, {"content-length": "3"}, {"content-length": "x"}, {"transfer-encoding": "chunked"}):
                answer = await ask(fe.app, "POST", CHAT_PATH, b"123456", b"123456", b"1", headers=headers)
                assert answer.status == 413
                assert answer.headers["connection"] == "close"
                assert "10 bytes" in answer.error["message"]
            endless = await ask(fe.app, "POST", CHAT_PATH, *[b"1234567890"] * 9, whole=False)
            assert endless.status == 413
            unsent = await ask(
                fe.app, "POST", CHAT_PATH, headers={"content-length": "11", "expect": "100-continue"}, whole=False
            )
            assert unsent.status == 413

    asyncio.run(run())


def test_a_body_that_never_ends_is_given_up():
    async def run() -> None:
        async with frontend(settings=FrontendSettings(receive_timeout_s=0.01)) as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, b"{", whole=False)
        assert answer.status == 408
        assert answer.headers["connection"] == "close"

    asyncio.run(run())


@pytest.mark.parametrize("given_id", ["a b", "", "x" * 129, "ü", "a\nb"])
def test_request_ids_that_are_not_taken(given_id: str):
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "GET", "/nowhere", headers={"x-request-id": given_id})
        assert len(answer.headers["x-request-id"]) == 24

    asyncio.run(run())


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_timeouts_that_are_refused(value: str):
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body(), headers={"x-request-timeout-s": value})
        assert answer.status == 400
        assert answer.error["param"] == "x-request-timeout-s"

    asyncio.run(run())


def test_a_deadline_that_passes():
    async def run() -> None:
        async with frontend(lambda call: None) as fe:
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body(), headers={"x-request-timeout-s": "0.02"})
            await fe.cancelled.get()
        assert answer.status == 504
        assert answer.error["code"] == "deadline"

    asyncio.run(run())


def test_too_many_open_requests():
    async def run() -> None:
        async with frontend(lambda call: None, FrontendSettings(max_open_requests=1)) as fe:
            first = AsgiClient(fe.app)
            task = asyncio.ensure_future(first.request("POST", CHAT_PATH, chat_body()))
            await fe.arrivals.get()
            answer = await ask(fe.app, "POST", CHAT_PATH, chat_body())
            assert (await ask(fe.app, "GET", "/live")).status == 200
            first.leave()
            await task
            assert b'stator_rejected_total{reason="overloaded"} 1.0' in fe.metrics.render()
        assert answer.status == 429
        assert answer.headers["retry-after"] == "1"

    asyncio.run(run())


def test_health_says_why_not():
    async def run() -> None:
        async with frontend() as fe:
            ready = await ask(fe.app, "GET", "/health")
            assert ready.status == 200
            assert ready.json == {
                "status": "ready",
                "reasons": [],
                "models": {MODEL: {"decode": 1, "prefill": 2}},
                "pairing_refusals": [],
            }
            fe.health = HealthReport(False, ["no worker is ready"], {})
            unready = await ask(fe.app, "GET", "/health")
            assert unready.status == 503
            assert unready.json == {
                "status": "unavailable",
                "reasons": ["no worker is ready"],
                "models": {},
                "pairing_refusals": [],
            }

    asyncio.run(run())
