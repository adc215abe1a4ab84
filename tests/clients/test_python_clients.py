"""LangChain, LiteLLM and `llm`, as their users call them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.conftest import ENVIRONMENT, MODEL, QUESTION, Deployment, Result, RunClient

pytestmark = pytest.mark.timeout(240)

MOOD = {
    "type": "object",
    "properties": {
        "mood": {"type": "string", "enum": ["calm", "cross"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["mood", "age"],
    "additionalProperties": False,
}
LLM_MODELS = """
- model_id: ours
  model_name: {model}
  api_base: {url}
  supports_schema: true
  supports_tools: true
"""


def assert_is_mood(found: Any) -> None:
    assert found.keys() == {"mood", "age"} and found["mood"] in ("calm", "cross") and 0 <= found["age"] <= 99, found


def test_langchain_chats_and_streams(langchain: Result, deployment: Deployment) -> None:
    for use in ("chat", "stream"):
        assert langchain[use]["text"] == deployment.text
        usage = langchain[use]["usage"]
        assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == deployment.num_tokens
        assert "cache_read" in usage["input_token_details"]
    assert langchain["chat"]["about"]["finish_reason"] == "length"
    assert langchain["chat"]["about"]["model_name"] == MODEL
    assert langchain["stream"]["num_with_text"] > 1
    assert len(langchain["batch"]) == 8 and all(langchain["batch"])
    assert langchain["completions"]["text"] == langchain["completions"]["streamed"] != ""


def test_langchain_reads_probabilities_and_choices(langchain: Result) -> None:
    tokens = langchain["probabilities"]
    assert len(tokens) == 5 and all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in tokens)
    assert len(langchain["several_choices"]) == 3 and len(set(langchain["several_choices"])) > 1


def test_langchain_gets_the_form_it_asks_for(langchain: Result) -> None:
    assert_is_mood(langchain["json_schema"])
    assert_is_mood(langchain["json_schema_streamed"]["last"])
    assert langchain["json_schema_streamed"]["num_parts"] > 1
    assert_is_mood(langchain["function_calling"]["parsed"])
    assert [call["name"] for call in langchain["function_calling"]["calls"]] == ["Mood"]


def test_langchain_calls_tools_and_sends_their_results(langchain: Result) -> None:
    found = langchain["tools"]
    assert found["call"]["name"] == "look" and found["call"]["args"]["at"] in ("sea", "moon")
    assert found["result"] == f"The {found['call']['args']['at']} is bright."
    assert found["answer"] and not found["calls_again"]
    streamed = langchain["tools_streamed"]
    assert [call["args"].keys() for call in streamed["calls"]] == [{"at"}] and not streamed["invalid"]
    assert streamed["num_parts"] > 1


def test_langchain_tells_failures_apart(langchain: Result) -> None:
    assert langchain["refusals"].keys() == {"too_long", "param"}
    assert langchain["refusals"]["param"] == "modalities"


@pytest.mark.parametrize("use", ["chat", "stream", "chat_as_vllm", "stream_as_vllm"])
def test_litellm_chats_and_streams(litellm: Result, deployment: Deployment, use: str) -> None:
    found = litellm[use]
    assert found["text"] == deployment.text and found["finish_reason"] == "length"
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == deployment.num_tokens
    assert found.get("num_chunks", 3) > 2


def test_litellm_asks_without_threads(litellm: Result, deployment: Deployment) -> None:
    assert len(litellm["many_at_once"]) == 8 and all(litellm["many_at_once"])
    assert litellm["stream_without_threads"] == deployment.text
    assert litellm["completions"]


def test_litellm_gets_the_form_it_asks_for(litellm: Result) -> None:
    assert litellm["json_schema"]["finish_reason"] == "stop"
    assert_is_mood(json.loads(litellm["json_schema"]["text"]))


def test_litellm_calls_tools_and_sends_their_results(litellm: Result) -> None:
    for use in ("tool_named", "tool_required_streamed"):
        (call,) = litellm[use]["calls"]
        assert litellm[use]["finish_reason"] == "tool_calls" and not litellm[use]["text"]
        assert call["name"] == "look" and json.loads(call["arguments"])["at"] in ("sea", "moon")
    assert litellm["tool_answered"]["text"] and not litellm["tool_answered"]["calls"]


def test_litellm_tells_failures_apart(litellm: Result) -> None:
    assert litellm["refusals"].keys() == {"too_long", "model", "field"}
    assert "modalities" in litellm["refusals"]["field"]


@pytest.fixture(scope="module")
def llm(run_client: RunClient, deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    settings = tmp_path_factory.mktemp("llm")
    (settings / "extra-openai-models.yaml").write_text(LLM_MODELS.format(model=MODEL, url=deployment.url))

    def run(*arguments: str) -> str:
        return run_client([Path(ENVIRONMENT, "bin", "llm"), *arguments], LLM_USER_PATH=str(settings))

    return run


def test_llm_chats_and_streams(llm: Callable[..., str], deployment: Deployment) -> None:
    asked = ("-m", "ours", "-s", "Be short.", "-o", "temperature", "0", "-o", "max_tokens", "12", QUESTION)
    assert llm(*asked).rstrip("\n") == llm(*asked, "--no-stream").rstrip("\n") == deployment.text
    streamed, whole = json.loads(llm("logs", "-n", "2", "--json"))
    for logged in (streamed, whole):
        assert logged["response"] == deployment.text
        assert (logged["input_tokens"], logged["output_tokens"]) == deployment.num_tokens[:2]


def test_llm_gets_the_form_it_asks_for(llm: Callable[..., str]) -> None:
    assert_is_mood(json.loads(llm("-m", "ours", "--schema", json.dumps(MOOD), QUESTION)))


def test_llm_offers_tools(llm: Callable[..., str]) -> None:
    """It cannot force a call, and the bundled model makes none by itself."""
    function = 'def look(at: str) -> str:\n    "Look at something."\n    return at'
    assert llm("-m", "ours", "--functions", function, "-o", "max_tokens", "12", QUESTION).strip()


def test_llm_takes_an_address_without_settings(llm: Callable[..., str], deployment: Deployment) -> None:
    assert MODEL in llm("openai", "endpoint", deployment.url, "--models")
    asked = ("-s", "Be short.", "-o", "temperature", "0", "-o", "max_tokens", "12", QUESTION)
    assert llm("openai", "endpoint", deployment.url, "-m", MODEL, *asked).rstrip("\n") == deployment.text
