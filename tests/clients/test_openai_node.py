"""openai-node."""

import json

import pytest

from clients.programs import (
    HERE,
    MODEL,
    PLACES,
    Deployment,
    Result,
    RunClient,
    assert_is_mood,
    run_uses,
)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def openai_node(run_client: RunClient, deployment: Deployment) -> Result:
    return run_uses(run_client, deployment, "node/openai_uses.mjs")


def test_packages_are_pinned_wherever_they_come_from() -> None:
    packages = json.loads((HERE / "node" / "package-lock.json").read_text())["packages"]
    others = [package for path, package in packages.items() if path]
    assert others and all("integrity" in package and "resolved" not in package for package in others)


def test_it_lists_models(openai_node: Result) -> None:
    assert openai_node["models"] == {"ids": [MODEL], "one": MODEL}


@pytest.mark.parametrize("use", ["chat", "stream", "stream_helper"])
def test_it_chats_and_streams(openai_node: Result, deployment: Deployment, use: str) -> None:
    found = openai_node[use]
    usage = found["usage"]
    assert found["text"] == found.get("deltas", found["text"]) == deployment.text
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == deployment.num_tokens
    assert found.get("finish_reason", "length") == "length"
    assert openai_node["completions"]


def test_it_leaves_a_stream(openai_node: Result, deployment: Deployment) -> None:
    assert openai_node["left_early"] == {"aborted": True, "text": deployment.text}


def test_it_parses(openai_node: Result) -> None:
    assert_is_mood(openai_node["parse"])
    assert_is_mood(openai_node["parse_streamed"])


def test_it_calls_tools(openai_node: Result) -> None:
    (call,) = openai_node["tool_parsed"]
    assert call["name"] == "look" and call["parsed_arguments"]["at"] in PLACES
    streamed = openai_node["tool_streamed"]
    (call,) = streamed["calls"]
    assert call["arguments"] == streamed["deltas"] and call["parsed_arguments"]["at"] in PLACES
    assert streamed["finish_reason"] == "tool_calls"
    assert len(openai_node["tools_run"]["seen"]) == 1
    assert openai_node["tools_run"]["roles"] == ["system", "user", "assistant", "tool"]


def test_it_tells_failures_apart(openai_node: Result) -> None:
    refusals = openai_node["refusals"]
    assert refusals["model"] == {
        "name": "NotFoundError",
        "status": 404,
        "code": "model_not_found",
        "param": "model",
    }
    assert refusals["field"]["name"] == "BadRequestError" and refusals["field"]["param"] == "modalities"
    assert refusals["too_long"]["code"] == "context_length_exceeded"
