"""OpenAI's Responses API: the body of a request, and what frontends tell each other of responses that they keep.

Decoding checks the types of what stands here; items and tools are told apart by their `type`, and are read one by one
(`frontend.responses_request`), so that what is refused is refused by its path.
"""

from typing import Any, Literal

import msgspec

from stator.messages.openai import GenerationFields, Int

Json = dict[str, Any]


class TextConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    format: Json | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponsesRequest(GenerationFields, frozen=True, omit_defaults=True, kw_only=True):
    """None means absent."""

    input: str | list[Json] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: Int | None = None
    top_logprobs: Int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Int | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Json | None = None
    truncation: str | None = None
    background: bool | None = None
    background_options: Json | None = None
    service_tier: str | None = None
    conversation: Any = None
    context_management: list[Json] | None = None
    prompt: Any = None
    moderation: Any = None
    image: Json | None = None
    access_programs: Json | None = None
    chat_template_kwargs: Json | None = None


class TextContent(msgspec.Struct, frozen=True):
    """Of every content part that is text, whatever its type is called."""

    type: str
    text: str
    prompt_cache_breakpoint: Any = None


class MessageItem(msgspec.Struct, frozen=True):
    """The `type` of an item may be absent; it is a message then."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Json]


class FunctionCallItem(msgspec.Struct, frozen=True):
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(msgspec.Struct, frozen=True):
    call_id: str
    output: str | list[Json]


class ReasoningItem(msgspec.Struct, frozen=True):
    content: list[Json] | None = None
    summary: list[Json] = []


class ReferenceItem(msgspec.Struct, frozen=True):
    id: str


class FunctionTool(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class FunctionChoice(msgspec.Struct, frozen=True):
    name: str


class AllowedChoice(msgspec.Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: list[Json]


class JsonSchemaText(msgspec.Struct, frozen=True):
    name: str
    schema: Json
    description: str | None = None
    strict: bool | None = None


class StoredResponse(msgspec.Struct, frozen=True):
    """A response that is kept. body: the Response object, as JSON.

    turns: items as JSON arrays, in the order of the conversation: input and output of each turn from the first one on;
    the last two are this response's own. A turn's bytes are shared with the responses that went before.
    """

    id: str
    body: bytes
    turns: tuple[bytes, ...]


class ResponseLookup(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks a frontend for a response that it keeps. remove: have it forgotten."""

    id: str
    remove: bool = False


class ResponseFound(msgspec.Struct, frozen=True):
    """response: None if it is not kept there. One that was removed is told as it was."""

    response: StoredResponse | None
