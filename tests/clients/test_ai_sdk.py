"""Vercel's AI SDK, with both of its providers that take an address, and both APIs of OpenAI's."""

import json

import pytest

from clients.programs import Deployment, Result, RunClient, assert_are_near, assert_is_mood, run_uses

pytestmark = pytest.mark.timeout(240)

PROVIDERS = ["compatible", "openai", "responses"]


@pytest.fixture(scope="module")
def ai_sdk(run_client: RunClient, deployment: Deployment) -> Result:
    return run_uses(run_client, deployment, "node/ai_sdk_uses.mjs")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_it_writes_text(ai_sdk: Result, deployment: Deployment, provider: str) -> None:
    for use in ("text", "text_streamed"):
        found = ai_sdk[f"{provider}_{use}"]
        usage = found["usage"]
        assert found["text"] == deployment.text and found["finishReason"] == "length"
        assert (usage["inputTokens"], usage["outputTokens"], usage["totalTokens"]) == deployment.num_tokens
        assert not found.get("warnings") and not found.get("failed")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_it_gets_objects(ai_sdk: Result, provider: str) -> None:
    assert_is_mood(ai_sdk[f"{provider}_object"])
    assert_is_mood(ai_sdk[f"{provider}_object_as_output"])
    assert_is_mood(ai_sdk[f"{provider}_object_streamed"])
    assert ai_sdk[f"{provider}_choice_as_output"] in ("calm", "cross")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_it_calls_tools(ai_sdk: Result, provider: str) -> None:
    found = ai_sdk[f"{provider}_tool"]
    (call,) = found["calls"]
    assert call["toolName"] == "look" and found["finishReason"] == "tool-calls"
    assert found["results"] == [f"The {call['input']['at']} is bright."]
    streamed = ai_sdk[f"{provider}_tool_streamed"]
    assert [call["input"].keys() for call in streamed["calls"]] == [{"at"}]
    assert json.loads(streamed["deltas"]) == streamed["calls"][0]["input"]
    assert {"tool-input-start", "tool-input-delta", "tool-input-end", "tool-call", "tool-result"} <= {
        *streamed["kinds"]
    }
    assert not {"text-delta", "error", "tool-error"} & {*streamed["kinds"]}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_it_goes_on_after_a_call(ai_sdk: Result, provider: str) -> None:
    first, second = ai_sdk[f"{provider}_steps"]["finishReasons"]
    assert first == "tool-calls" and second in ("stop", "length")
    assert ai_sdk[f"{provider}_steps"]["text"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_it_shows_failures(ai_sdk: Result, provider: str) -> None:
    refusals = ai_sdk[f"{provider}_refusals"]
    assert refusals["model"]["api"] and refusals["model"]["status"] == 404 and "another" in refusals["model"]["message"]
    assert refusals["too_long"]["status"] == 400 and "2048" in refusals["too_long"]["message"]


def test_it_goes_on_after_a_response(ai_sdk: Result, deployment: Deployment) -> None:
    texts = deployment.two_turns()
    assert ai_sdk["goes_on_by_id"]["texts"] == texts and ai_sdk["goes_on_by_id"]["id"].startswith("resp_")
    assert ai_sdk["goes_on_by_reference"] == {"texts": texts, "sent": ["user", "item_reference", "user"]}
    assert ai_sdk["goes_on_by_text"] == {"texts": texts, "sent": ["user", "assistant", "user"]}


@pytest.mark.parametrize("provider", ["compatible", "openai"])
def test_it_embeds(ai_sdk: Result, deployment: Deployment, provider: str) -> None:
    found = ai_sdk[f"{provider}_embedded"]
    assert_are_near(found["vectors"], deployment.vectors)
    assert found["tokens"] == deployment.num_embedded
    assert_are_near([found["single"], *found["vectors"][1:]], deployment.vectors)


@pytest.mark.parametrize("provider", ["compatible", "openai"])
def test_it_shows_why_nothing_is_embedded(ai_sdk: Result, provider: str) -> None:
    refusals = ai_sdk[f"{provider}_embedding_refusals"]
    assert all(refusal["api"] and refusal["status"] == 400 for refusal in refusals.values())
    assert "2048" in refusals["too_long"]["message"] and "dimensions" in refusals["dimensions"]["message"]
