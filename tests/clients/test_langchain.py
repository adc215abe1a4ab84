"""LangChain's ChatOpenAI."""

import pytest

from clients.programs import MODEL, PLACES, Deployment, Result, RunClient, assert_is_mood, run_uses

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
