"""Deltas as a Response object and as typed events; OpenAI's own types are the judges of both."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from frontend_fakes import USAGE
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from stator.errors import Ending, ErrorCode, StatorError
from stator.frontend.responses_answer import ResponseForm, ResponseStream, WholeResponse
from stator.frontend.responses_request import ItemIds
from stator.messages.processor import Alternative, CompletionDelta, ScoredToken, TokenDetails
from stator.messages.responses import ResponsesRequest
from stator.messages.tools import ToolCallDelta

BASE = "0f" * 24
REQUEST = ResponsesRequest(model="m", metadata={"a": "b"}, tools=[{"type": "function", "name": "f"}])
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def last(text: str = "", ending: Ending = Ending.STOP) -> CompletionDelta:
    return CompletionDelta(text, num_tokens=1, ending=ending, usage=USAGE)


def scored(text: str) -> TokenDetails:
    token = Alternative(5, text, text.encode(), -0.5)
    return TokenDetails(scores=[ScoredToken(token, [token])])


def call(index: int, name: str | None, arguments: str) -> CompletionDelta:
    piece = ToolCallDelta(index, None if name is None else f"call_{index}", name, arguments)
    return CompletionDelta(num_tokens=1, tool_calls=[piece])


PLAIN = [[CompletionDelta("Hel", num_tokens=1), CompletionDelta("lo", num_tokens=1)], [last("!")]]
THINKS = [
    [CompletionDelta(reasoning="h", num_tokens=1, parsed=True), CompletionDelta(reasoning="m", num_tokens=1)],
    [CompletionDelta(num_tokens=1), CompletionDelta("Yes", num_tokens=1)],
    [call(0, "f", "")],
    [call(0, None, '{"a"'), call(0, None, ":1}")],
    [call(1, "f", "{}"), last(ending=Ending.TOOL_CALLS)],
]
SCORED = [[CompletionDelta("a", num_tokens=1, tokens=scored("a")), CompletionDelta(tokens=scored("b"), num_tokens=1)],
          [CompletionDelta("bc", num_tokens=1, tokens=scored("c"))], [last()]]  # fmt: skip
EMPTY = [[last()]]
CUT_OFF = [[CompletionDelta("Hel", num_tokens=1), last(ending=Ending.LENGTH)]]
CASES = {"plain": PLAIN, "thinks": THINKS, "scored": SCORED, "empty": EMPTY, "cut off": CUT_OFF}


def stream(batches: Sequence[Sequence[CompletionDelta]], error: StatorError | None = None) -> list[Any]:
    """The events, each as OpenAI's package reads it strictly."""
    kept: list[Any] = []
    ids = ItemIds(BASE)
    encoder = ResponseStream(ResponseForm(ids.response_id, REQUEST, 5), ids, lambda: 9, kept.append)
    body = encoder.opening() + b"".join([encoder.encode(batch) for batch in batches])
    body += encoder.closing() if error is None else encoder.failure(error)
    found: list[Any] = []
    for event in body.decode().removesuffix("\n\n").split("\n\n"):
        kind, data = event.split("\n")
        decoded = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {decoded['type']}"
        assert decoded["sequence_number"] == len(found)
        found.append(EVENT.validate_python(decoded))
    assert len(kept) == (error is None)
    return found


def whole(batches: Sequence[Sequence[CompletionDelta]]) -> Any:
    ids = ItemIds(BASE)
    answer = WholeResponse(ResponseForm(ids.response_id, REQUEST, 5), ids, lambda: 9, lambda response: None)
    for batch in batches:
        answer.add(batch)
    return Response.model_validate_json(answer.encode(USAGE))


@pytest.mark.parametrize("case", CASES)
def test_a_stream_ends_with_what_the_whole_answer_is(case: str) -> None:
    events = stream(CASES[case])
    response = whole(CASES[case])
    assert events[-1].response == response
    assert events[-1].type == f"response.{response.status}"
    assert [event.item for event in events if event.type == "response.output_item.done"] == response.output


@pytest.mark.parametrize("case", CASES)
def test_openais_accumulator_takes_it(case: str) -> None:
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    for event in stream(CASES[case]):
        state.handle_event(event)
    assert case == "cut off" or state._completed_response is not None


def test_a_plain_answer() -> None:
    events = stream(PLAIN)
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["Hello", "!"]
    response = events[-1].response
    assert (response.status, response.output_text, response.completed_at) == ("completed", "Hello!", 9)
    assert (response.id, response.metadata, response.created_at) == (f"resp_{BASE}", {"a": "b"}, 5)
    assert response.usage.input_tokens_details.cached_tokens == USAGE.prompt_tokens_details.cached_tokens
    assert (response.usage.input_tokens, response.usage.output_tokens) == (7, 3)


def test_reasoning_text_and_calls_are_items_in_order() -> None:
    response = whole(THINKS)
    reasoning, message, first, second = response.output
    assert [part.text for part in reasoning.content] == ["hm"]
    assert message.content[0].text == "Yes"
    assert (first.call_id, first.name, first.arguments) == ("call_0", "f", '{"a":1}')
    assert (second.call_id, second.arguments) == ("call_1", "{}")
    assert len({item.id for item in response.output}) == 4
    assert response.usage.output_tokens_details.reasoning_tokens == 3
    kinds = {event.type for event in stream(THINKS)}
    assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= kinds
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds


def test_probabilities_go_with_the_text_that_their_tokens_are() -> None:
    deltas = [event for event in stream(SCORED) if event.type == "response.output_text.delta"]
    assert [[each.token for each in event.logprobs] for event in deltas] == [["a"], ["b", "c"]]
    (part,) = whole(SCORED).output[0].content
    assert [each.token for each in part.logprobs] == ["a", "b", "c"]
    assert part.logprobs[0].top_logprobs[0].bytes == [97]


def test_an_answer_that_was_cut_off_is_incomplete() -> None:
    response = whole(CUT_OFF)
    assert response.status == response.output[-1].status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_no_content_is_an_empty_message() -> None:
    assert whole(EMPTY).output_text == "" and len(whole(EMPTY).output) == 1


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (ErrorCode.OVERLOADED, "rate_limit_exceeded"),
        (ErrorCode.INVALID_REQUEST, "invalid_prompt"),
        (ErrorCode.INSTANCE_LOST, "server_error"),
    ],
)
def test_a_failure_ends_the_stream_with_what_there_is(code: ErrorCode, told: str) -> None:
    event = stream(PLAIN[:1], StatorError(code, "It broke."))[-1]
    assert event.type == "response.failed" and event.response.status == "failed"
    assert (event.response.error.code, event.response.error.message) == (told, "It broke.")
    assert event.response.output[0].status == "incomplete" and event.response.output_text == "Hello"
