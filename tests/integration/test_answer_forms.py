"""Answers of a form that was asked for, tools and reasoning: by HTTP, on a model that computes and on one by script."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from answers_world import World, world

from stator.engines.sim.args import SimEngineArgs
from stator.engines.sim.engine import SimEngine

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
USER = [{"role": "user", "content": "Hello"}]
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "mood": {"enum": ["calm", "cross"]}},
    "required": ["age", "mood"],
    "additionalProperties": False,
}


def run(test: Callable[[World], Awaitable[None]], *engines: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(50), world(*engines) as made:
            await test(made)

    asyncio.run(main())


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_json_by_a_schema() -> None:
    async def test(made: World) -> None:
        format = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        for temperature in (0.0, 1.3):
            body = await made.chat(
                response_format=format, max_tokens=60, ignore_eos=False, temperature=temperature, seed=2
            )
            (choice,) = body["choices"]
            person = json.loads(choice["message"]["content"])
            assert person.keys() == {"age", "mood"} and 0 <= person["age"] <= 99
            assert choice["finish_reason"] == "stop"
        streamed = await made.chat(
            stream=True, response_format=format, max_tokens=60, ignore_eos=False, temperature=1.3, seed=2
        )
        assert json.loads(text_of(streamed)) == person

    run(test)


def text_of(chunks: list[Any]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


@pytest.mark.parametrize("chat", [True, False])
def test_structured_outputs(chat: bool) -> None:
    async def test(made: World) -> None:
        for asked, right in (
            ({"choice": ["left", "right"]}, ("left", "right")),
            ({"regex": "a{2}b"}, ("aab",)),
            ({"grammar": 'start: "x" "y"'}, ("xy",)),
        ):
            ask = made.chat if chat else made.complete
            body = await ask(structured_outputs=asked, max_tokens=30, ignore_eos=False)
            (choice,) = body["choices"]
            assert (choice["message"]["content"] if chat else choice["text"]) in right

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_right_even_from_a_model_that_knows_no_tools(stream: bool) -> None:
    async def test(made: World) -> None:
        for choice, names, ending in (
            (named("get_weather"), {"get_weather"}, "stop"),
            ("required", {"get_weather", "get_time"}, "tool_calls"),
        ):
            answer = await made.chat(
                stream=stream,
                tools=[WEATHER, TIME],
                tool_choice=choice,
                parallel_tool_calls=False,
                max_tokens=120,
                ignore_eos=False,
            )
            content, calls, finish_reason = streamed_calls(answer) if stream else whole_calls(answer)
            assert not content
            ((call_id, name, arguments),) = calls
            assert call_id.startswith("call_") and name in names
            if name == "get_weather":
                assert json.loads(arguments)["city"] in ("Oslo", "Rome")
            else:
                assert json.loads(arguments) == {}
            assert finish_reason == ending

    run(test)


def whole_calls(body: dict[str, Any]) -> tuple[str | None, list[tuple[str, str, str]], str]:
    (choice,) = body["choices"]
    message = choice["message"]
    calls = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    return message["content"], calls, choice["finish_reason"]


def streamed_calls(chunks: list[Any]) -> tuple[str, list[tuple[str, str, str]], str]:
    calls: dict[int, tuple[str, str, str]] = {}
    for chunk in chunks:
        for piece in (p for c in chunk["choices"] for p in c["delta"].get("tool_calls", [])):
            call_id, name, arguments = calls.get(piece["index"], ("", "", ""))
            function = piece["function"]
            assert bool(piece.get("id")) == (piece["index"] not in calls) == bool(function.get("name"))
            arguments += function["arguments"]
            calls[piece["index"]] = (call_id or piece["id"], name or function["name"], arguments)
    endings = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    return text_of(chunks), list(calls.values()), endings[0]


def test_what_cannot_be_is_refused_by_name() -> None:
    async def test(made: World) -> None:
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        any_object = {"type": "json_object"}
        cases: list[tuple[dict[str, Any], str, int]] = [
            ({"tools": [WEATHER]}, "tools", 400),
            ({"tools": [WEATHER], "tool_choice": named("nobody")}, "tool_choice.function.name", 400),
            ({"tool_choice": "required"}, "tool_choice", 400),
            ({"response_format": schema}, "response_format", 400),
            ({"response_format": any_object, "ignore_eos": True}, "ignore_eos", 400),
            ({"response_format": any_object, "structured_outputs": {"regex": "a"}}, "structured_outputs", 400),
            ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", 400),
            ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", 400),
            ({"guided_json": {}}, "guided_json", 400),
            ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", 400),
            ({"reasoning_effort": "high"}, "reasoning_effort", 400),
        ]
        for fields, param, status in cases:
            answer = await made.post("/v1/chat/completions", {"messages": USER, **fields})
            error = answer.json["error"]
            assert (answer.status, error["param"]) == (status, param), error

    run(test)


def test_an_engine_without_grammars_says_so() -> None:
    async def test(made: World) -> None:
        answer = await made.post("/v1/chat/completions", {"messages": USER, "response_format": {"type": "json_object"}})
        error = answer.json["error"]
        assert (answer.status, error["param"]) == (400, "response_format")

    run(test, SimEngine(SimEngineArgs(model="stator:tiny-llama", block_size=16, step_times="tiny-llama")))
