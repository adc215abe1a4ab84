"""LiteLLM, as OpenAI's client and as vLLM's."""

import json

import pytest

from clients.programs import (
    PLACES,
    TOKENS,
    Deployment,
    Result,
    RunClient,
    assert_are_near,
    assert_is_mood,
    read_base64,
    run_uses,
)

pytestmark = pytest.mark.timeout(240)

FEWEST = 16
"""Tokens that it asks of a response, whatever less it is told to ask for."""


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


@pytest.mark.parametrize("use", ["response", "response_as_vllm", "response_streamed", "response_streamed_as_vllm"])
def test_it_gets_a_response(litellm: Result, deployment: Deployment, use: str) -> None:
    in_chat = deployment.chat(max_tokens=FEWEST)
    text, num_tokens = in_chat["choices"][0]["message"]["content"], in_chat["usage"]
    found = litellm[use]
    assert found["text"] == text and found["status"] == "incomplete"
    usage = found["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (
        num_tokens["prompt_tokens"],
        num_tokens["completion_tokens"],
        num_tokens["total_tokens"],
    )
    if "streamed" in use:
        assert found["deltas"] == {"response.output_text.delta": text}
        assert found["types"][:2] == ["response.created", "response.in_progress"]
        assert found["types"][-1] == "response.incomplete" and found["types"].count("response.output_text.delta") > 1
        assert litellm["response_streamed_without_threads"] == text


def test_it_goes_on_after_a_response(litellm: Result, deployment: Deployment) -> None:
    texts = deployment.two_turns(FEWEST)
    expected = {"texts": texts, "again": texts[0], "num_items": 3, "deleted": True, "gone": True}
    assert litellm["response_goes_on"] == expected


def test_it_gets_the_form_it_asks_of_a_response(litellm: Result) -> None:
    assert litellm["response_in_a_form"]["status"] == "completed"
    assert_is_mood(json.loads(litellm["response_in_a_form"]["text"]))


def test_it_calls_tools_in_responses(litellm: Result) -> None:
    for use in ("response_tool_named", "response_tool_streamed"):
        found = litellm[use]
        (call,) = found["calls"]
        assert found["status"] == "completed" and not found["text"]
        assert call["name"] == "look" and json.loads(call["arguments"])["at"] in PLACES
        if "streamed" in use:
            assert found["deltas"] == {"response.function_call_arguments.delta": call["arguments"]}
    answered = litellm["response_tool_answered"]
    assert answered["by_items"]["text"] == answered["by_id"]["text"] != ""
    assert not answered["by_items"]["calls"] and not answered["by_id"]["calls"]


def test_it_tells_failures_of_responses_apart(litellm: Result) -> None:
    assert litellm["response_refusals"].keys() == {"too_long", "model", "field"}
    assert "truncation" in litellm["response_refusals"]["field"]


def test_it_embeds(litellm: Result, deployment: Deployment) -> None:
    for use in ("embedded", "embedded_as_vllm", "embedded_in_base64"):
        vectors, usage = litellm[use]["vectors"], litellm[use]["usage"]
        if use == "embedded_in_base64":
            vectors = [read_base64(vector) for vector in vectors]
        assert_are_near(vectors, deployment.vectors)
        assert usage["prompt_tokens"] == usage["total_tokens"] == deployment.num_embedded
    assert_are_near(litellm["embedded_tokens"]["vectors"], deployment.embed_tokens(TOKENS))
    assert litellm["embedded_tokens"]["usage"]["prompt_tokens"] == sum(map(len, TOKENS))


def test_it_shows_why_nothing_is_embedded(litellm: Result) -> None:
    assert litellm["embedding_refusals"].keys() == {"too_long", "empty"}
    assert "must not be empty" in litellm["embedding_refusals"]["empty"]
