"""OpenAI's request bodies as far as Stator takes them, and the answers' bodies.

Decoding checks types and names the field at fault; ranges and what a model can do are checked by the Processor.
A field of OpenAI's schema that is declared here but not supported yet is refused by name when it asks for something
(`UNSUPPORTED_UNLESS`); none of them is silently dropped. Fields nobody declared are other vendors' extensions.
"""

from typing import Any, Literal

import msgspec


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class RequestFields(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What both endpoints take. None means absent: the model's default, or OpenAI's."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    cache_salt: str | None = None
    priority: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None


class ChatCompletionRequest(RequestFields, frozen=True, omit_defaults=True, kw_only=True):
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    audio: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None


class CompletionRequest(RequestFields, frozen=True, omit_defaults=True, kw_only=True):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(msgspec.Struct, frozen=True):
    error: ErrorBody
