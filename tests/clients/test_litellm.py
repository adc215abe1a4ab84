"""LiteLLM, as OpenAI's client and as vLLM's."""

import json

import pytest

from clients.programs import (
    PLACES,
    Deployment,
    Result,
    RunClient,
    assert_is_mood,
    run_uses,
)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def litellm(run_client: RunClient, deployment: Deployment) -> Result:
    return run_uses(run_client, deployment, "python/litellm_uses.py")


@pytest.mark.parametrize("use", ["chat", "stream", "chat_as_vllm", "stream_as_vllm"])
def test_it_chats_and_streams(litellm: Result, deployment: Deployment, use: str) -> None:
    found = litellm[use]
    assert found["text"] == deployment.text and found["finish_reason"] == "length"
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == deployment.num_tokens


def test_it_asks_without_threads(litellm: Result, deployment: Deployment) -> None:
    assert len(litellm["many_at_once"]) == 8 and all(litellm["many_at_once"])
    assert litellm["stream_without_threads"] == deployment.text
    assert litellm["completions"]


def test_it_gets_the_form_it_asks_for(litellm: Result) -> None:
    assert litellm["json_schema"]["finish_reason"] == "stop"
    assert_is_mood(json.loads(litellm["json_schema"]["text"]))


def test_it_calls_tools_and_sends_their_results(litellm: Result) -> None:
    for use in ("tool_named", "tool_required_streamed"):
        (call,) = litellm[use]["calls"]
        assert litellm[use]["finish_reason"] == "tool_calls" and not litellm[use]["text"]
        assert call["name"] == "look" and json.loads(call["arguments"])["at"] in PLACES
    assert litellm["tool_answered"]["text"] and not litellm["tool_answered"]["calls"]


def test_it_tells_failures_apart(litellm: Result) -> None:
    assert litellm["refusals"].keys() == {"too_long", "model", "field"}
    assert "modalities" in litellm["refusals"]["field"]
