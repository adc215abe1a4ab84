"""What a client gets for a request that succeeds."""

import asyncio
import json

import pytest
from frontend_fakes import CREATED, MODEL, AsgiClient, ask, chat_body, delta, events_of, frontend, say, text_body

from stator.errors import Ending
from stator.transport import Call

USAGE_JSON = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def test_chat_answer():
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "POST", "/v1/chat/completions", chat_body(), headers={"x-request-id": "abc"})
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"] == "abc"
        body = answer.json
        assert body.pop("id").startswith("chatcmpl-abc-")
        assert body == {
            "object": "chat.completion",
            "created": CREATED,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE_JSON,
        }

    asyncio.run(run())


def test_text_answer():
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "POST", "/v1/completions", text_body())
        body = answer.json
        assert body.pop("id").startswith("cmpl-")
        assert body == {
            "object": "text_completion",
            "created": CREATED,
            "model": MODEL,
            "choices": [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}],
            "usage": USAGE_JSON,
        }

    asyncio.run(run())


def test_chat_stream():
    async def run() -> None:
        async with frontend(say("Hello", "", ' wörld "\n')) as fe:
            answer = await ask(fe.app, "POST", "/v1/chat/completions", chat_body(stream=True))
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        *chunks, done = answer.events
        assert done == "[DONE]"
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert all("usage" not in chunk for chunk in chunks)
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": ""},
            {"content": 'Hello wörld "\n'},
            {},
        ]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]

    asyncio.run(run())


def test_text_stream():
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "POST", "/v1/completions", text_body(stream=True))
        *chunks, done = answer.events
        assert done == "[DONE]"
        assert [(chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [
            ("Hello world", None),
            ("", "stop"),
        ]

    asyncio.run(run())


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", chat_body), ("/v1/completions", text_body)])
def test_stream_with_usage(path: str, body: type[bytes]):
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "POST", path, body(stream=True, stream_options={"include_usage": True}))
        *chunks, last, done = answer.events
        assert done == "[DONE]"
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"] == USAGE_JSON

    asyncio.run(run())


def test_text_that_waits_goes_out_as_one_chunk_in_one_write():
    def script(call: Call) -> None:
        call.items([delta("a")])

    async def run() -> None:
        async with frontend(script) as fe:
            client = AsgiClient(fe.app)
            task = asyncio.ensure_future(client.request("POST", "/v1/completions", text_body(stream=True)))
            call = await fe.arrivals.get()
            await client.sent.wait()
            call.items([delta("b")])
            call.items([delta("c")])
            call.items([delta("d", Ending.LENGTH)])
            call.end()
            answer = await task
        first, second = (body for body in answer.bodies if body)
        assert first.count(b"data: ") == 1
        text, reason, done = events_of(second)
        assert (text["choices"][0]["text"], reason["choices"][0]["finish_reason"], done) == ("bcd", "length", "[DONE]")

    asyncio.run(run())


def test_the_body_may_come_in_pieces_and_under_any_content_type():
    async def run() -> None:
        body = chat_body()
        async with frontend() as fe:
            answer = await ask(
                fe.app, "POST", "/v1/chat/completions", body[:5], body[5:9], body[9:], headers={"content-type": "a/b"}
            )
        assert answer.status == 200

    asyncio.run(run())


def test_what_the_processor_gets():
    async def run() -> None:
        headers = {"x-request-id": "r:1", "traceparent": "00-ab-cd-01", "x-request-timeout-s": "2.5"}
        async with frontend() as fe:
            now = asyncio.get_running_loop().time()
            await ask(fe.app, "POST", "/v1/chat/completions", chat_body(seed=5), headers=headers)
            call = fe.calls[0]
        assert call.request.seed == 5
        assert call.context.request_id.startswith("r:1-")
        assert call.context.headers == {"traceparent": "00-ab-cd-01"}
        assert call.context.deadline is not None
        assert 2.5 <= call.context.deadline - now < 5

    asyncio.run(run())


def test_one_request_id_sent_twice_makes_two_calls_with_ids_of_their_own():
    async def run() -> None:
        async with frontend() as fe:
            for _ in range(2):
                await ask(fe.app, "POST", "/v1/completions", text_body(), headers={"x-request-id": "same"})
            assert len({call.context.request_id for call in fe.calls}) == 2

    asyncio.run(run())


def test_models():
    card = {"id": MODEL, "created": CREATED, "max_model_len": 2048, "owned_by": "stator"}
    card |= {"object": "model", "parent": None}

    async def run() -> None:
        async with frontend() as fe:
            assert (await ask(fe.app, "GET", "/v1/models")).json == {"object": "list", "data": [card]}
            assert (await ask(fe.app, "GET", f"/v1/models/{MODEL}")).json == card
            missing = await ask(fe.app, "GET", "/v1/models/org/other")
        assert missing.status == 404
        assert missing.error["code"] == "model_not_found"
        assert MODEL in missing.error["message"]

    asyncio.run(run())


def test_small_endpoints():
    async def run() -> None:
        async with frontend() as fe:
            assert (await ask(fe.app, "GET", "/live")).status == 200
            assert set((await ask(fe.app, "GET", "/version")).json) == {"version"}
            assert json.loads((await ask(fe.app, "HEAD", "/live")).body) == {"status": "live"}

    asyncio.run(run())
