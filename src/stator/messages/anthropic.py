"""Anthropic's request bodies for `/v1/messages` and `/v1/messages/count_tokens`, as far as Stator takes them.

Decoding checks types and names the field at fault; `frontend.anthropic_request` makes the request of a Processor out of
it. What becomes of each field is in `messages.anthropic_fields`. Fields nobody declared are ignored.
"""

from typing import Any, Literal

import msgspec

from stator.messages.openai import Int


class TextBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class OnlyText(msgspec.Struct, frozen=True):
    """A text block where there are no others. A tag may be left out where it decides nothing; this type may not."""

    type: Literal["text"]
    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """signature: not looked at; anybody's is taken."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[OnlyText] | None = None
    is_error: bool | None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class Message(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(msgspec.Struct, frozen=True):
    """type: absent, null or `custom` for the client's own tools, the only ones there are here; input_schema: absent for
    others."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None
    input_examples: list[Any] | None = None


class AutoChoice(msgspec.Struct, frozen=True, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool = False


class AnyChoice(msgspec.Struct, frozen=True, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool = False


class ToolChoice(msgspec.Struct, frozen=True, tag_field="type", tag="tool"):
    name: str
    disable_parallel_tool_use: bool = False


class NoneChoice(msgspec.Struct, frozen=True, tag_field="type", tag="none"):
    pass


Choice = AutoChoice | AnyChoice | ToolChoice | NoneChoice

Display = Literal["summarized", "omitted"]


class ThinkingEnabled(msgspec.Struct, frozen=True, tag_field="type", tag="enabled"):
    budget_tokens: Int
    display: Display | None = None


class ThinkingAdaptive(msgspec.Struct, frozen=True, tag_field="type", tag="adaptive"):
    display: Display | None = None


class ThinkingDisabled(msgspec.Struct, frozen=True, tag_field="type", tag="disabled"):
    pass


Thinking = ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled


class JsonOutput(msgspec.Struct, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutput | None = None


class PromptFields(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take: all that a prompt is made of."""

    model: str
    messages: list[Message]
    system: str | list[OnlyText] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    speed: str | None = None
    context_management: Any = None
    mcp_servers: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


class CountTokensRequest(PromptFields, frozen=True, kw_only=True):
    pass


class MessagesRequest(PromptFields, frozen=True, kw_only=True):
    max_tokens: Int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
