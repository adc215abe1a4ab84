"""openai-node and Vercel's AI SDK, as their users call them."""

import json
from typing import Any

import pytest

from clients.conftest import HERE, MODEL, Deployment, Result

pytestmark = pytest.mark.timeout(240)

PROVIDERS = ["compatible", "openai"]
PLACES = ("sea", "moon")


def assert_is_mood(found: Any) -> None:
    assert found.keys() == {"mood", "age"} and found["mood"] in ("calm", "cross") and 0 <= found["age"] <= 99, found


def test_packages_are_pinned_wherever_they_come_from() -> None:
    packages = json.loads((HERE / "node" / "package-lock.json").read_text())["packages"]
    others = [package for path, package in packages.items() if path]
    assert others and all("integrity" in package and "resolved" not in package for package in others)


def test_openai_node_lists_models(openai_node: Result) -> None:
    assert openai_node["models"] == {"ids": [MODEL], "one": MODEL}


@pytest.mark.parametrize("use", ["chat", "stream", "stream_helper"])
def test_openai_node_chats_and_streams(openai_node: Result, deployment: Deployment, use: str) -> None:
    found = openai_node[use]
    usage = found["usage"]
    assert found["text"] == found.get("deltas", found["text"]) == deployment.text
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == deployment.num_tokens
    assert found.get("num_with_text", 2) > 1
    assert found.get("finish_reason", "length") == "length"
    assert openai_node["completions"]


def test_openai_node_leaves_a_stream(openai_node: Result, deployment: Deployment) -> None:
    assert openai_node["left_early"] == {"aborted": True, "text": deployment.text}


def test_openai_node_parses(openai_node: Result) -> None:
    assert_is_mood(openai_node["parse"])
    assert_is_mood(openai_node["parse_streamed"])


def test_openai_node_calls_tools(openai_node: Result) -> None:
    (call,) = openai_node["tool_parsed"]
    assert call["name"] == "look" and call["parsed_arguments"]["at"] in PLACES
    streamed = openai_node["tool_streamed"]
    (call,) = streamed["calls"]
    assert call["arguments"] == streamed["deltas"] and call["parsed_arguments"]["at"] in PLACES
    assert streamed["finish_reason"] == "tool_calls"
    assert len(openai_node["tools_run"]["seen"]) == 1
    assert openai_node["tools_run"]["roles"] == ["system", "user", "assistant", "tool"]


def test_openai_node_tells_failures_apart(openai_node: Result) -> None:
    refusals = openai_node["refusals"]
    assert refusals["model"] == {
        "name": "NotFoundError",
        "status": 404,
        "code": "model_not_found",
        "param": "model",
    }
    assert refusals["field"]["name"] == "BadRequestError" and refusals["field"]["param"] == "modalities"
    assert refusals["too_long"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ai_sdk_writes_text(ai_sdk: Result, deployment: Deployment, provider: str) -> None:
    for use in ("text", "text_streamed"):
        found = ai_sdk[f"{provider}_{use}"]
        usage = found["usage"]
        assert found["text"] == deployment.text and found["finishReason"] == "length"
        assert (usage["inputTokens"], usage["outputTokens"], usage["totalTokens"]) == deployment.num_tokens
        assert not found.get("warnings") and not found.get("failed")
    assert ai_sdk[f"{provider}_text_streamed"]["deltas"] > 1


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ai_sdk_gets_objects(ai_sdk: Result, provider: str) -> None:
    assert_is_mood(ai_sdk[f"{provider}_object"])
    assert_is_mood(ai_sdk[f"{provider}_object_as_output"])
    assert_is_mood(ai_sdk[f"{provider}_object_streamed"]["object"])
    assert ai_sdk[f"{provider}_object_streamed"]["parts"] > 1
    assert ai_sdk[f"{provider}_choice_as_output"] in ("calm", "cross")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ai_sdk_calls_tools(ai_sdk: Result, provider: str) -> None:
    found = ai_sdk[f"{provider}_tool"]
    (call,) = found["calls"]
    assert call["toolName"] == "look" and found["finishReason"] == "tool-calls"
    assert found["results"] == [f"The {call['input']['at']} is bright."]
    streamed = ai_sdk[f"{provider}_tool_streamed"]
    assert [call["input"].keys() for call in streamed["calls"]] == [{"at"}]
    assert {"tool-input-start", "tool-input-delta", "tool-input-end", "tool-call", "tool-result"} <= {
        *streamed["kinds"]
    }
    assert not {"text-delta", "error", "tool-error"} & {*streamed["kinds"]}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ai_sdk_goes_on_after_a_call(ai_sdk: Result, provider: str) -> None:
    first, second = ai_sdk[f"{provider}_steps"]["finishReasons"]
    assert first == "tool-calls" and second in ("stop", "length")
    assert ai_sdk[f"{provider}_steps"]["text"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ai_sdk_shows_failures(ai_sdk: Result, provider: str) -> None:
    refusals = ai_sdk[f"{provider}_refusals"]
    assert refusals["model"]["api"] and refusals["model"]["status"] == 404 and "another" in refusals["model"]["message"]
    assert refusals["too_long"]["status"] == 400 and "2048" in refusals["too_long"]["message"]
