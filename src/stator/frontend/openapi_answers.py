"""The bodies of answers as `/openapi.json` describes them. What makes them is `encoding` and `detailed`, which know a
quicker way than these structs; tests hold every answer against them."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from stator.frontend.health import ModelHealth, PairingRefusal
from stator.messages.openai import Usage
from stator.messages.routing import DecisionRecord
from stator.messages.tools import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float | None
    bytes: list[Byte]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None


class PromptLogprob(msgspec.Struct):
    logprob: float | None
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TextLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatAnswer(msgspec.Struct):
    """content: null beside tool_calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionPiece(msgspec.Struct):
    arguments: str
    name: str | UnsetType = UNSET


class CallPiece(msgspec.Struct):
    index: int
    function: FunctionPiece
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallPiece] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextCompletion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextCompletionChunk(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | None | UnsetType = UNSET


class Health(msgspec.Struct):
    status: Literal["ready", "unavailable", "draining"]
    reasons: list[str]
    models: dict[str, ModelHealth]
    pairing_refusals: list[PairingRefusal]


class Liveness(msgspec.Struct):
    status: Literal["live"]


class Version(msgspec.Struct):
    version: str


class Decisions(msgspec.Struct):
    request_id: str
    decisions: list[DecisionRecord]


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    reason: Literal["max_output_tokens"]


class ResponseFailure(msgspec.Struct):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class OutputPart(msgspec.Struct):
    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[dict[str, Any]] | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET


class ConversationItem(msgspec.Struct):
    """Of each type those fields that it has. A function_call_output is input alone."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["user", "assistant", "system", "developer"] | UnsetType = UNSET
    content: list[OutputPart] | UnsetType = UNSET
    summary: list[OutputPart] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    output: str | UnsetType = UNSET


class ResponseObject(msgspec.Struct):
    """Beside these, what the request asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[ConversationItem]
    usage: ResponseUsage | None
    previous_response_id: str | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    store: bool


class ResponseEvent(msgspec.Struct):
    """Beside these, what an event of its type has."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET


class InputItems(msgspec.Struct):
    object: Literal["list"]
    data: list[ConversationItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(msgspec.Struct):
    id: str
    object: Literal["response"]
    deleted: Literal[True]
