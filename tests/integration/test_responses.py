"""The Responses API on a model that computes, over HTTP, with OpenAI's own client as the judge."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import openai
import pytest
from answers_world import MODEL, World, world
from pydantic import BaseModel

from stator.frontend.server import FrontendServer

HOST = "127.0.0.1"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Mood(BaseModel):
    mood: Literal["calm", "cross"]
    sure: bool


@asynccontextmanager
async def served() -> AsyncIterator[tuple[World, openai.AsyncOpenAI]]:
    async with world() as made:
        server = FrontendServer(made.app, host=HOST, port=0)
        await server.start()
        try:
            url = f"http://{HOST}:{server.port}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                yield made, client
        finally:
            await server.stop()


def run(test: Callable[[World, openai.AsyncOpenAI], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(50), served() as (made, client):
            await test(made, client)

    asyncio.run(main())


async def said_in_chat(made: World, messages: list[dict[str, Any]]) -> str:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12}
    answer = await made.post("/v1/chat/completions", body)
    return answer.json["choices"][0]["message"]["content"]


def test_a_response_is_what_chat_says_and_can_be_fetched_listed_and_deleted() -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        response = await client.responses.create(**GREEDY, input="Tell me of the sea", metadata={"a": "b"})
        assert response.output_text == await said_in_chat(made, [{"role": "user", "content": "Tell me of the sea"}])
        assert response.usage is not None and response.usage.output_tokens == 12
        assert response.usage.total_tokens == response.usage.input_tokens + 12
        assert (response.status, response.metadata, response.model) == ("incomplete", {"a": "b"}, MODEL)
        assert await client.responses.retrieve(response.id) == response
        items = await client.responses.input_items.list(response.id)
        assert [item.content[0].text for item in items.data] == ["Tell me of the sea"]  # type: ignore[union-attr]
        await client.responses.delete(response.id)
        for gone in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError, match="frontend process that made it"):
                await gone(response.id)

    run(test)


def test_a_conversation_goes_on_after_a_response() -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        first = await client.responses.create(**GREEDY, input="Tell me of the sea", instructions="Be brief.")
        second = await client.responses.create(**GREEDY, input="And then?", previous_response_id=first.id)
        messages = [
            {"role": "user", "content": "Tell me of the sea"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And then?"},
        ]
        assert second.output_text == await said_in_chat(made, messages)
        assert second.usage is not None and second.usage.input_tokens_details.cached_tokens is not None
        # The turns that went before stay with a response when theirs are gone.
        await client.responses.delete(first.id)
        third = await client.responses.create(**GREEDY, input="Why?", previous_response_id=second.id, store=False)
        messages += [{"role": "assistant", "content": second.output_text}, {"role": "user", "content": "Why?"}]
        assert third.output_text == await said_in_chat(made, messages)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(third.id)
        ids = [item.id async for item in client.responses.input_items.list(second.id, limit=2, order="asc")]
        assert len(ids) == 3
        assert ids[::-1] == [item.id async for item in client.responses.input_items.list(second.id, limit=1)]

    run(test)


def test_items_may_be_referred_to() -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        first = await client.responses.create(**GREEDY, input="Tell me of the sea")
        again: Any = [
            {"role": "user", "content": "Tell me of the sea"},
            {"type": "item_reference", "id": first.output[0].id},
            {"role": "user", "content": "And then?"},
        ]
        by_reference = await client.responses.create(**GREEDY, input=again)
        again[1] = first.output[0].to_dict()
        assert by_reference.output_text == (await client.responses.create(**GREEDY, input=again)).output_text
        for unknown in ("msg_1", f"msg_{'0' * 48}_1", f"{first.output[0].id}99"):
            again[1] = {"type": "item_reference", "id": unknown}
            with pytest.raises(openai.NotFoundError) as refused:
                await client.responses.create(**GREEDY, input=again)
            assert refused.value.param == "input[1].id"

    run(test)


def test_a_stream_says_what_the_response_says() -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        whole = await client.responses.create(**GREEDY, input="Tell me of the sea")
        async with client.responses.stream(**GREEDY, input="Tell me of the sea") as stream:
            events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta")
        last = events[-1]
        assert last.type == "response.incomplete" and last.response.output_text == whole.output_text
        assert last.response.usage is not None and whole.usage is not None
        assert last.response.usage.total_tokens == whole.usage.total_tokens
        assert (await client.responses.retrieve(last.response.id)).to_dict() == last.response.to_dict()

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept_and_parsed(stream: bool) -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        fields: dict[str, Any] = {**GREEDY, "max_output_tokens": 60, "input": "How are you?", "text_format": Mood}
        if stream:
            async with client.responses.stream(**fields) as events:
                response: Any = await events.get_final_response()
        else:
            response = await client.responses.parse(**fields)
        assert isinstance(response.output_parsed, Mood) and response.status == "completed"

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call(stream: bool) -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        fields: dict[str, Any] = {
            **GREEDY,
            "max_output_tokens": 100,
            "input": "How is the weather?",
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "name": "get_weather"},
        }
        if stream:
            async with client.responses.stream(**fields) as events:
                pieces = [each.delta async for each in events if each.type == "response.function_call_arguments.delta"]
                response: Any = await events.get_final_response()
        else:
            response = await client.responses.create(**fields)
            pieces = [response.output[0].arguments]
        (call,) = response.output
        assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
        assert call.call_id.startswith("call_") and json.loads(call.arguments)["city"] in ("Oslo", "Rome")
        assert "".join(pieces) == call.arguments
        # The bundled model's template takes no calls, and says so under the name of this API.
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(**GREEDY, input=[output], previous_response_id=response.id)
        assert refused.value.param == "input"

    run(test)


def test_probabilities() -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        response: Any = await client.responses.create(
            **GREEDY, input="Tell me", include=["message.output_text.logprobs"], top_logprobs=2
        )
        (part,) = response.output[0].content
        assert len(part.logprobs) == 12 and all(len(each.top_logprobs) == 2 for each in part.logprobs)

    run(test)


def test_what_cannot_be_is_refused_by_name() -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        cases: list[tuple[dict[str, Any], str, int]] = [
            ({"previous_response_id": "resp_1"}, "previous_response_id", 404),
            ({"model": "other"}, "model", 404),
            ({"reasoning": {"effort": "high"}}, "reasoning.effort", 400),
            ({"max_output_tokens": 0}, "max_output_tokens", 400),
            ({"temperature": 9}, "temperature", 400),
            ({"tools": [WEATHER]}, "tools", 400),
            ({"tools": [{**WEATHER, "name": "?"}], "tool_choice": "required"}, "tools[0].name", 400),
            ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", 400),
            ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 1}}}}, "text.format", 400),
            ({"input": []}, "input", 400),
        ]
        for fields, param, status in cases:
            answer = await made.post("/v1/responses", {"input": "hi", **fields})
            error = answer.json["error"]
            assert answer.status == status and error["param"].startswith(param), error
            assert not any(name in error["message"] for name in ("response_format", "reasoning_effort", ".function."))

    run(test)


def test_paths_and_methods() -> None:
    async def test(made: World, client: openai.AsyncOpenAI) -> None:
        for method, path, status, allow in (
            ("GET", "/v1/responses", 405, "POST"),
            ("POST", "/v1/responses/resp_1", 405, "GET, HEAD, DELETE"),
            ("DELETE", "/v1/responses/resp_1/input_items", 405, "GET, HEAD"),
            ("GET", "/v1/responses/", 404, None),
            ("GET", "/v1/responses/a/b", 404, None),
        ):
            answer = await made.client().request(method, path)
            assert (answer.status, answer.headers.get("allow")) == (status, allow)

    run(test)
