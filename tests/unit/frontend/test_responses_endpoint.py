"""The Responses endpoint in front of a Processor by script: what reaches it, what is kept, what bounds it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from frontend_fakes import MODEL, Fixture, ask, delta, frontend, say_hello

from stator.errors import ErrorCode, StatorError
from stator.frontend.settings import FrontendSettings
from stator.messages.openai import ChatMessage
from stator.transport import Call

PATH = "/v1/responses"


def run(
    test: Callable[[Fixture], Awaitable[None]],
    script: Callable[[Call], None] = say_hello,
    settings: FrontendSettings | None = None,
) -> None:
    async def main() -> None:
        async with frontend(script, settings) as fe:
            await test(fe)

    asyncio.run(main())


async def create(fe: Fixture, status: int = 200, **fields: Any) -> Any:
    answer = await ask(fe.app, "POST", PATH, json.dumps({"model": MODEL, "input": "hi", **fields}).encode())
    assert answer.status == status, answer.body
    return answer.error if status != 200 else answer.json


def events_of(body: bytes) -> list[Any]:
    return [json.loads(event.split(b"\ndata: ")[1]) for event in body.removesuffix(b"\n\n").split(b"\n\n")]


def test_instructions_are_of_one_turn_and_the_conversation_of_all() -> None:
    async def test(fe: Fixture) -> None:
        first = await create(fe, instructions="Be brief.")
        await create(fe, input="more", instructions="Be long.", previous_response_id=first["id"])
        assert fe.calls[1].request.messages == [
            ChatMessage("system", "Be long."),
            ChatMessage("user", "hi"),
            ChatMessage("assistant", "Hello world"),
            ChatMessage("user", "more"),
        ]

    run(test)


def test_a_tool_round_by_previous_response_and_by_items() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "fog"}

    async def test(fe: Fixture) -> None:
        await create(fe, input=[{"role": "user", "content": "hi"}, call, output])
        first = await create(fe, input=[{"role": "user", "content": "hi"}, call])
        await create(fe, input=[output], previous_response_id=first["id"])
        whole, _, continued = [each.request.messages for each in fe.calls]
        assert [each.role for each in whole] == ["user", "assistant", "tool"]
        assert whole[2] == continued[-1] == ChatMessage("tool", "fog", name="look", tool_call_id="c")

    run(test)


def test_what_is_not_to_be_stored_is_not() -> None:
    async def test(fe: Fixture) -> None:
        response = await create(fe, store=False)
        assert response["store"] is False
        assert (await ask(fe.app, "GET", f"{PATH}/{response['id']}")).status == 404
        error = await create(fe, 404, previous_response_id=response["id"])
        assert (error["param"], error["code"]) == ("previous_response_id", "not_found")

    run(test)


def test_a_failure_in_the_midst_ends_the_stream_and_keeps_nothing() -> None:
    def breaks(call: Call) -> None:
        call.items([delta("Hel")])
        call.end(StatorError(ErrorCode.INSTANCE_LOST, "It was lost."))

    async def test(fe: Fixture) -> None:
        body = json.dumps({"model": MODEL, "input": "hi", "stream": True}).encode()
        answer = await ask(fe.app, "POST", PATH, body)
        last = events_of(answer.body)[-1]
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"
        assert (await ask(fe.app, "GET", f"{PATH}/{last['response']['id']}")).status == 404

    run(test, breaks)


def test_a_conversation_is_as_long_as_a_body_at_most() -> None:
    async def test(fe: Fixture) -> None:
        previous: dict[str, Any] = {}
        for _ in range(4):
            response = await create(fe, input="x" * 700, **previous)
            previous = {"previous_response_id": response["id"]}
        error = await create(fe, 400, **previous)
        assert error["param"] == "previous_response_id" and "4000 bytes" in error["message"]

    run(test, settings=FrontendSettings(max_body_bytes=4000))


def test_few_bytes_that_refer_to_many_are_bounded_as_well() -> None:
    async def test(fe: Fixture) -> None:
        first = await create(fe, input="x" * 1500)
        (item,) = (await ask(fe.app, "GET", f"{PATH}/{first['id']}/input_items")).json["data"]
        reference = {"type": "item_reference", "id": item["id"]}
        await create(fe, input=[reference])
        error = await create(fe, 400, input=[reference, reference])
        assert error["param"] == "input[1].id"

    run(test, settings=FrontendSettings(max_body_bytes=2000))


@pytest.mark.parametrize(
    ("query", "param"), [("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=msg_1", "after")]
)
def test_pages_are_asked_for_rightly(query: str, param: str) -> None:
    async def test(fe: Fixture) -> None:
        response = await create(fe)
        answer = await ask(fe.app, "GET", f"{PATH}/{response['id']}/input_items", query=query)
        assert (answer.status, answer.error["param"]) == (400, param)

    run(test)


def test_a_kept_response_is_not_streamed_again() -> None:
    async def test(fe: Fixture) -> None:
        response = await create(fe)
        answer = await ask(fe.app, "GET", f"{PATH}/{response['id']}", query="stream=true")
        assert (answer.status, answer.error["param"]) == (400, "stream")

    run(test)
