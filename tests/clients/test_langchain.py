"""LangChain's ChatOpenAI, by chat completions and by responses, and OpenAIEmbeddings."""

import json

import pytest

from clients.programs import (
    MODEL,
    PLACES,
    TEXTS,
    Deployment,
    Result,
    RunClient,
    assert_are_near,
    assert_is_mood,
    run_uses,
)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def langchain(run_client: RunClient, deployment: Deployment) -> Result:
    return run_uses(run_client, deployment, "python/langchain_uses.py")


def test_it_chats_and_streams(langchain: Result, deployment: Deployment) -> None:
    for use in ("chat", "stream"):
        assert langchain[use]["text"] == deployment.text
        usage = langchain[use]["usage"]
        assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == deployment.num_tokens
        assert "cache_read" in usage["input_token_details"]
    assert langchain["chat"]["about"]["finish_reason"] == "length"
    assert langchain["chat"]["about"]["model_name"] == MODEL
    assert len(langchain["batch"]) == 8 and all(langchain["batch"])
    assert langchain["completions"]["text"] == langchain["completions"]["streamed"] != ""


def test_it_reads_probabilities_and_choices(langchain: Result) -> None:
    tokens = langchain["probabilities"]
    assert len(tokens) == 5 and all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in tokens)
    assert len(langchain["several_choices"]) == 3 and len(set(langchain["several_choices"])) > 1


def test_it_gets_the_form_it_asks_for(langchain: Result) -> None:
    assert_is_mood(langchain["json_schema"])
    assert_is_mood(langchain["json_schema_streamed"])
    assert_is_mood(langchain["function_calling"]["parsed"])
    assert [call["name"] for call in langchain["function_calling"]["calls"]] == ["Mood"]


def test_it_calls_tools_and_sends_their_results(langchain: Result) -> None:
    found = langchain["tools"]
    assert found["call"]["name"] == "look" and found["call"]["args"]["at"] in PLACES
    assert found["result"] == f"The {found['call']['args']['at']} is bright."
    assert found["answer"] and not found["calls_again"]
    streamed = langchain["tools_streamed"]
    assert [call["args"].keys() for call in streamed["calls"]] == [{"at"}] and not streamed["invalid"]


def test_it_tells_failures_apart(langchain: Result) -> None:
    assert langchain["refusals"].keys() == {"too_long", "param"}
    assert langchain["refusals"]["param"] == "modalities"


@pytest.mark.parametrize("use", ["response", "response_streamed"])
def test_it_gets_a_response(langchain: Result, deployment: Deployment, use: str) -> None:
    found = langchain[use]
    assert found["text"] == deployment.text
    usage, about = found["usage"], found["about"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == deployment.num_tokens
    assert "cache_read" in usage["input_token_details"] and usage["output_token_details"] == {"reasoning": 0}
    assert about["status"] == "incomplete" and about["incomplete_details"] == {"reason": "max_output_tokens"}
    assert about["model_name"] == MODEL and about["id"].startswith("resp_")


def test_its_responses_do_not_mix(langchain: Result) -> None:
    found = langchain["responses_at_once"]
    assert len(set(found["responses"])) == 4 and found["responses"] == found["chat"]


def test_it_goes_on_after_a_response(langchain: Result, deployment: Deployment) -> None:
    found = langchain["response_goes_on"]
    assert found["texts"] == langchain["response_sent_back"] == deployment.two_turns()
    assert len(set(found["ids"])) == 2


def test_it_gets_the_form_it_asks_of_a_response(langchain: Result) -> None:
    assert_is_mood(langchain["response_in_a_form"]["whole"])
    assert langchain["response_in_a_form"]["streamed"] == langchain["response_in_a_form"]["whole"]


def test_it_calls_tools_in_responses(langchain: Result) -> None:
    found = langchain["response_tools"]
    assert found["call"]["name"] == "look" and found["call"]["args"]["at"] in PLACES
    assert found["result"] == f"The {found['call']['args']['at']} is bright."
    assert found["answer"] == found["in_chat"] != "" and not found["calls_again"]
    streamed = langchain["response_tools_streamed"]
    (call,) = streamed["calls"]
    assert call["name"] == "look" and call["args"]["at"] in PLACES and not streamed["invalid"]
    assert json.loads("".join(streamed["pieces"])) == call["args"]


def test_it_tells_failures_of_responses_apart(langchain: Result) -> None:
    assert langchain["response_refusals"].keys() == {"too_long", "param"}
    assert langchain["response_refusals"]["param"] == "truncation"


def test_it_embeds_texts(langchain: Result, deployment: Deployment) -> None:
    assert_are_near(langchain["embedded"], deployment.vectors)
    found = langchain["embedded_one_by_one"]
    assert_are_near(found["several"], deployment.vectors)
    assert_are_near([found["single"], *found["several"][1:]], deployment.vectors)


def test_it_embeds_token_ids(langchain: Result, deployment: Deployment) -> None:
    expected = deployment.embed_tokens([[*text.encode()] for text in TEXTS])
    assert_are_near(langchain["embedded_as_tokens"], expected)


def test_it_shows_why_nothing_is_embedded(langchain: Result) -> None:
    refusals = langchain["embedding_refusals"]
    assert refusals["tokens"]["param"] == "input" and "vocabulary" in refusals["tokens"]["message"]
    assert refusals["dimensions"]["param"] == "dimensions"
