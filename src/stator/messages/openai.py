"""OpenAI's request bodies as far as Stator takes them, and the answers' bodies.

Decoding checks types and names the field at fault; ranges and what a model can do are checked by the Processor.
A field of OpenAI's schema that is declared here but not supported yet is refused by name when it asks for something
(`openai_fields`); none of them is silently dropped. Fields nobody declared are other vendors' extensions.
"""

import operator
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal

import msgspec

from stator.messages.openai_fields import UNSUPPORTED_UNLESS
from stator.messages.tools import ResponseFormat, StructuredOutputs, Tool, ToolChoice

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""JSON knows no width; the wire behind the HTTP edge carries 64 bits."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class StreamOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class GenerationFields(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What every endpoint that generates takes, the Responses API too. None means absent: the model's default, or
    OpenAI's."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    min_tokens: Int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    cache_salt: str | None = None
    priority: Int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None


class RequestFields(GenerationFields, frozen=True, omit_defaults=True, kw_only=True):
    """What chat and completions take."""

    n: Int | None = None
    prompt_logprobs: Int | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class ChatCompletionRequest(RequestFields, frozen=True, omit_defaults=True, kw_only=True):
    messages: list[ChatMessage]
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    audio: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    verbosity: str | None = None
    prediction: Any = None
    moderation: Any = None
    web_search_options: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None


class CompletionRequest(RequestFields, frozen=True, omit_defaults=True, kw_only=True):
    """prompt: one text, a list of texts, the token ids of one prompt, or a list of such: never mixed, which the
    Frontend checks (`frontend.decode`), because a decoder cannot tell one list from another by its type."""

    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Int | None = None
    best_of: Int | None = None
    echo: bool | None = None
    logprobs: Int | None = None
    suffix: str | None = None


@cache
def _unsupported(
    kind: type[RequestFields],
) -> tuple[tuple[str, ...], Callable[[RequestFields], tuple[Any, ...]], tuple[None, ...]]:
    """The fields to look at, all their values in one call, and the values of a request that has none of them."""
    names = tuple(name for name in kind.__struct_fields__ if name in UNSUPPORTED_UNLESS)
    return names, operator.attrgetter(*names), (None,) * len(names)


def unsupported_field(request: RequestFields) -> str | None:
    """The first field that asks for what is not supported yet, in the order of the schema; None if there is none."""
    names, read, absent = _unsupported(type(request))
    values = read(request)
    for name, value in zip(names, values, strict=True) if values != absent else ():
        # `0 == False` in Python, and completions' `logprobs: 0` asks for the chosen token's probability.
        if value is not None and not any(
            type(value) is type(each) and value == each for each in UNSUPPORTED_UNLESS[name]
        ):
            return name
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        return "stream_options.include_obfuscation"
    return None


_BEYOND_TEXT = (
    "n", "logprobs", "prompt_logprobs", "return_token_ids", "stream_options", "skip_special_tokens",
)  # fmt: skip
_read_beyond_text = operator.attrgetter(*_BEYOND_TEXT)
_JUST_TEXT = (None, None, None, None, None, True)


def is_plain(request: "ChatCompletionRequest | CompletionRequest") -> bool:
    """Whether it asks for the text of one choice and its usage at the end: what nearly all do, and what is made the
    quickest way."""
    if isinstance(request, CompletionRequest):
        prompt = request.prompt
        if request.echo or not (isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))):
            return False
    values = _read_beyond_text(request)
    if values == _JUST_TEXT:
        return True
    n, logprobs, prompt_logprobs, token_ids, options, skip_special_tokens = values
    return (
        n in (None, 1)
        and (logprobs is None or logprobs is False)
        and prompt_logprobs is None
        and not token_ids
        and not (options is not None and options.continuous_usage_stats)
        and skip_special_tokens
    )


def shows_prompt_only(request: "ChatCompletionRequest | CompletionRequest") -> bool:
    """Nothing is to be generated, only the prompt echoed, mostly for its probabilities."""
    return isinstance(request, CompletionRequest) and bool(request.echo) and request.max_tokens == 0


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


class ChatAnswer(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: str | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    message: ChatAnswer
    finish_reason: str
    index: int = 0
    logprobs: None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """created: Unix seconds."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class TextChoice(msgspec.Struct, frozen=True):
    text: str
    finish_reason: str
    index: int = 0
    logprobs: None = None


class TextCompletion(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    object: Literal["text_completion"] = "text_completion"


class ModelCard(msgspec.Struct, frozen=True):
    """id: the served name. max_model_len: prompt and output tokens, parent: of a LoRA adapter its model, as vLLM's
    extensions name them."""

    id: str
    created: int
    max_model_len: int | None = None
    owned_by: str = "stator"
    object: Literal["model"] = "model"
    parent: str | None = None


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"
