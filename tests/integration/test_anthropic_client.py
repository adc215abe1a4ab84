"""Anthropic's own client, as its users write it, against a real HTTP server and a model that computes."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import pytest
from answers_world import MODEL, World, local_engine, world

from stator.frontend.server import FrontendServer

SEA: Any = [{"role": "user", "content": "Tell me of the sea"}]
GREEDY = {"temperature": 0}
CITIES: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TIME: Any = {"name": "get_time", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}


def run(test: Callable[[anthropic.AsyncAnthropic, World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(50), world(local_engine()) as made:
            server = FrontendServer(made.app, host="127.0.0.1", port=0)
            await server.start()
            try:
                url = f"http://127.0.0.1:{server.port}"
                async with anthropic.AsyncAnthropic(base_url=url, api_key="any", max_retries=0) as client:
                    await test(client, made)
            finally:
                await server.stop()

    asyncio.run(main())


def ask(client: anthropic.AsyncAnthropic, **fields: Any) -> Awaitable[anthropic.types.Message]:
    return client.messages.create(**{"model": MODEL, "messages": SEA, "max_tokens": 12, "extra_body": GREEDY, **fields})


def test_text_whole_and_streamed_is_what_chat_says() -> None:
    async def test(client: anthropic.AsyncAnthropic, made: World) -> None:
        chat = await made.chat(SEA[0]["content"], temperature=0, ignore_eos=False)
        message = await ask(client)
        (block,) = message.content
        assert block.type == "text" and block.text == chat["choices"][0]["message"]["content"]
        assert (message.stop_reason, message.role, message.model) == ("max_tokens", "assistant", MODEL)
        assert message.id.startswith("msg_") and message._request_id
        used = message.usage
        assert used.cache_read_input_tokens
        assert used.input_tokens + used.cache_read_input_tokens == chat["usage"]["prompt_tokens"]
        assert used.output_tokens == 12
        async with client.messages.stream(model=MODEL, messages=SEA, max_tokens=12, extra_body=GREEDY) as stream:
            pieces = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
            opened = stream.request_id
        assert len(pieces) > 1 and "".join(pieces) == block.text and opened
        assert (final.stop_reason, final.usage) == (message.stop_reason, message.usage)

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_is_told(stream: bool) -> None:
    async def test(client: anthropic.AsyncAnthropic, made: World) -> None:
        message = await ask(client, stop_sequences=["never said", " much"])
        if stream:
            events = await ask(client, stop_sequences=["never said", " much"], stream=True)
            last = [event async for event in events if event.type == "message_delta"][0]  # type: ignore[attr-defined]
            assert (last.delta.stop_reason, last.delta.stop_sequence) == ("stop_sequence", " much")
        (block,) = message.content
        assert block.type == "text" and " much" not in block.text
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " much")

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_and_its_result(stream: bool) -> None:
    async def test(client: anthropic.AsyncAnthropic, made: World) -> None:
        for choice in ({"type": "tool", "name": "get_weather"}, {"type": "any", "disable_parallel_tool_use": True}):
            asked: Any = {"model": MODEL, "messages": SEA, "max_tokens": 120, "tools": [CITIES, TIME]}
            asked |= {"tool_choice": choice, "extra_body": GREEDY}
            if stream:
                async with client.messages.stream(**asked) as events:
                    message: Any = await events.get_final_message()
            else:
                message = await client.messages.create(**asked)
            (call,) = message.content
            assert call.type == "tool_use" and call.name in ("get_weather", "get_time") and call.id
            if call.name == "get_weather":
                assert call.input["city"] in ("Oslo", "Rome")
            assert message.stop_reason == "tool_use"

    run(test)


def test_structured_outputs() -> None:
    async def test(client: anthropic.AsyncAnthropic, made: World) -> None:
        schema = {
            "type": "object",
            "properties": {"mood": {"enum": ["calm", "cross"]}},
            "required": ["mood"],
            "additionalProperties": False,
        }
        output: Any = {"format": {"type": "json_schema", "schema": schema}}
        message = await ask(client, max_tokens=60, output_config=output)
        (block,) = message.content
        assert block.type == "text" and block.text.replace(" ", "") in ('{"mood":"calm"}', '{"mood":"cross"}')
        assert message.stop_reason == "end_turn"

    run(test)


def test_counting_tells_what_a_message_uses() -> None:
    async def test(client: anthropic.AsyncAnthropic, made: World) -> None:
        long: Any = [{"role": "user", "content": "The sea is wide. " * 1000}]
        short = await client.messages.count_tokens(model=MODEL, messages=SEA, system="Be brief.")
        used = (await ask(client, system="Be brief.")).usage
        assert short.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)
        # Longer than the model's context, and long enough to be encoded on a thread.
        assert (await client.messages.count_tokens(model=MODEL, messages=long)).input_tokens > 4000
        assert made.processor.num_open == 0

    run(test)


def test_errors() -> None:
    async def test(client: anthropic.AsyncAnthropic, made: World) -> None:
        image: Any = {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}
        cases: list[tuple[dict[str, Any], type[anthropic.APIStatusError], str, str]] = [
            ({"model": "nobody"}, anthropic.NotFoundError, "not_found_error", "nobody"),
            ({"messages": [image]}, anthropic.BadRequestError, "invalid_request_error", "messages[0].content[0].type"),
            ({"max_tokens": 5000}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
            ({"tools": [TIME]}, anthropic.BadRequestError, "invalid_request_error", "tools"),
            (
                {"tools": [TIME], "tool_choice": {"type": "tool", "name": "x"}},
                anthropic.BadRequestError,
                "invalid_request_error",
                "tool_choice.name",
            ),
            ({"stop_sequences": ["x"] * 17}, anthropic.BadRequestError, "invalid_request_error", "stop_sequences"),
            (
                {"output_config": {"effort": "low"}},
                anthropic.BadRequestError,
                "invalid_request_error",
                "output_config.effort",
            ),
            ({"max_tokens": -1}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
        ]
        for fields, kind, type_name, named in cases:
            for stream in (False, True):
                with pytest.raises(kind) as refused:
                    await ask(client, stream=stream, **fields)
                body: Any = refused.value.body
                assert body["error"]["type"] == type_name and named in body["error"]["message"]
                assert refused.value.request_id == body["request_id"]
        # Nothing to be kept from: this model does not think.
        assert (await ask(client, thinking={"type": "disabled"})).content
        made.app.generation.drain()
        with pytest.raises(anthropic.InternalServerError) as drained:
            await ask(client)
        assert drained.value.status_code == 529

    run(test)
