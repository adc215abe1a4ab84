"""openai-node."""

import json

import pytest

from clients.programs import (
    AND_THEN,
    HERE,
    MODEL,
    PLACES,
    QUESTION,
    TEXTS,
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


@pytest.mark.parametrize("use", ["response", "response_streamed", "response_stream_helper"])
def test_it_gets_a_response(openai_node: Result, deployment: Deployment, use: str) -> None:
    found = openai_node[use]
    usage = found["usage"]
    assert found["text"] == found.get("deltas", found["text"]) == deployment.text
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == deployment.num_tokens
    assert found["status"] == "incomplete" and found.get("reason", "max_output_tokens") == "max_output_tokens"


def test_it_gets_the_events_of_a_response(openai_node: Result, deployment: Deployment) -> None:
    found = openai_node["response_streamed"]
    assert found["numbers"] == list(range(len(found["types"])))
    assert list(dict.fromkeys(found["types"])) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert found["types"].count("response.output_text.delta") > 1
    assert found["done"] == deployment.text and found["same"]


def test_it_leaves_a_response(openai_node: Result, deployment: Deployment) -> None:
    assert openai_node["response_left_early"] == {"aborted": True, "text": deployment.text}


def test_it_goes_on_after_a_response(openai_node: Result, deployment: Deployment) -> None:
    texts = deployment.two_turns()
    expected = {"texts": texts, "went_in": [QUESTION, texts[0], AND_THEN], "gone": "NotFoundError"}
    assert openai_node["response_goes_on"] == expected


def test_it_parses_responses(openai_node: Result) -> None:
    assert_is_mood(openai_node["response_parsed"]["whole"])
    assert openai_node["response_parsed"]["streamed"] == openai_node["response_parsed"]["whole"]


def test_it_calls_tools_in_responses(openai_node: Result) -> None:
    (call,) = openai_node["response_tool_parsed"]["calls"]
    assert openai_node["response_tool_parsed"]["status"] == "completed"
    assert (call["type"], call["name"]) == ("function_call", "look") and call["parsed_arguments"]["at"] in PLACES
    answered = openai_node["response_tool_answered"]
    assert answered["by_items"] == answered["by_id"] != ""


def test_it_gets_the_events_of_a_call(openai_node: Result) -> None:
    found = openai_node["response_tool_streamed"]
    assert list(dict.fromkeys(found["types"])) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    (call,) = found["output"]
    assert call["arguments"] == found["deltas"] == found["done"] and json.loads(found["done"])["at"] in PLACES
    assert {**found["added"], "arguments": found["done"], "status": "completed"} == call


def test_it_tells_failures_of_responses_apart(openai_node: Result) -> None:
    refusals = openai_node["response_refusals"]
    not_found = {"name": "NotFoundError", "status": 404}
    assert refusals["model"] == {**not_found, "code": "model_not_found", "param": "model"}
    assert refusals["forgotten"] == {**not_found, "code": "not_found", "param": "previous_response_id"}
    assert refusals["field"]["name"] == "BadRequestError" and refusals["field"]["param"] == "truncation"
    for use in ("too_long", "too_long_streamed"):
        assert refusals[use]["code"] == "context_length_exceeded" and refusals[use]["param"] == "input"


@pytest.mark.parametrize("use", ["embedded_default", "embedded_float", "embedded_base64"])
def test_it_embeds(openai_node: Result, deployment: Deployment, use: str) -> None:
    found = openai_node[use]
    vectors = [read_base64(vector) if use == "embedded_base64" else vector for vector in found["vectors"]]
    assert_are_near(vectors, deployment.vectors)
    assert found["order"] == list(range(len(TEXTS)))
    num_tokens = deployment.num_embedded
    assert found["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_it_embeds_token_ids(openai_node: Result, deployment: Deployment) -> None:
    assert_are_near(openai_node["embedded_tokens"], deployment.embed_tokens(TOKENS))


def test_it_shows_why_nothing_is_embedded(openai_node: Result) -> None:
    bad = {"name": "BadRequestError"}
    assert openai_node["embedding_refusals"] == {
        "model": {"name": "NotFoundError", "code": "model_not_found", "param": "model"},
        "dimensions": {**bad, "code": "unsupported", "param": "dimensions"},
        "too_long": {**bad, "code": "context_length_exceeded", "param": "input"},
    }
