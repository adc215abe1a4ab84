"""Anthropic's requests as requests for chat completions, and errors about those in Anthropic's names. Pure.

A turn of Anthropic's is often several of chat's: the system prompt is a message, and so is each result of a tool. Where
each message came from is kept, to name it in errors.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.frontend.decode import check_free_form, check_request, decode_body
from stator.messages import anthropic as api
from stator.messages.anthropic_fields import TOOL_UNSUPPORTED_UNLESS, UNSUPPORTED_UNLESS
from stator.messages.openai import ChatCompletionRequest, ChatMessage, StreamOptions, TextPart
from stator.messages.tools import (
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolChoice,
)

_DECODE_MESSAGES = msgspec.json.Decoder(api.MessagesRequest).decode
_DECODE_COUNT = msgspec.json.Decoder(api.CountTokensRequest).decode
_to_json = msgspec.json.Encoder().encode

_BLOCK_TYPE = re.compile(r"(messages\[\d+\]\.content|system)\[\d+\](\.content\[\d+\])?\.type")
_EFFORTS = {"xhigh": "high", "max": "high"}
_FORMAT_NAME = "output"

OPENING_USAGE = StreamOptions(include_usage=True, continuous_usage_stats=True)
"""A stream opens with the length of its prompt, which a plain one would tell at its end."""

Body = api.MessagesRequest | api.CountTokensRequest


@dataclass(frozen=True, slots=True)
class Translated:
    """body: as it came. request: for a Processor. origins: of each message of the request, what it is in the body."""

    body: Body
    request: ChatCompletionRequest
    origins: tuple[str, ...]

    def named(self, error: StatorError) -> StatorError:
        """With Anthropic's names of the fields."""
        if error.param is None:
            return error

        def rename(text: str) -> str:
            for pattern, put in _RENAMED:
                text = pattern.sub(put, text)
            return _MESSAGE.sub(self._origin, text)

        param, message = rename(error.param), rename(error.message)
        if error.param == "reasoning_effort" and isinstance(self.body.thinking, api.ThinkingDisabled):
            param, message = "thinking", message.replace("output_config.effort", "thinking")
        return StatorError(error.code, message, param=param, retry_after_s=error.retry_after_s)

    def _origin(self, found: re.Match[str]) -> str:
        index = int(found[1])
        return self.origins[index] if index < len(self.origins) else found[0]


_RENAMED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), put)
    for pattern, put in (
        (r"\btools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
        (r"\b(tools\[\d+\]|tool_choice)\.function\b", r"\1"),
        (r"\bresponse_format\.json_schema\b", "output_config.format"),
        (r"\bresponse_format\b", "output_config.format"),
        (r"\breasoning_effort\b", "output_config.effort"),
        (r"^stop\b", "stop_sequences"),
    )
)
_MESSAGE = re.compile(r"\bmessages\[(\d+)\]")


def decode_messages(body: bytes) -> Translated:
    """Raises StatorError(INVALID_REQUEST or UNSUPPORTED) that names the field at fault, for whatever bytes."""
    return _decoded(_DECODE_MESSAGES, body)


def decode_count_tokens(body: bytes) -> Translated:
    """As decode_messages."""
    return _decoded(_DECODE_COUNT, body)


def _decoded(decode: Callable[[bytes], Body], body: bytes) -> Translated:
    try:
        request = decode_body(decode, body)
    except StatorError as error:
        if error.param is not None and _BLOCK_TYPE.fullmatch(error.param):
            known = "'text'" if error.param.count("content[") != 1 else "'text', 'thinking', 'tool_use', 'tool_result'"
            message = f"Invalid value for '{error.param}': only blocks of the types {known} are supported."
            raise StatorError(error.code, message, param=error.param) from None
        raise
    translated = translate(request)
    try:
        check_request(translated.request)
    except StatorError as error:
        raise translated.named(error) from None
    return translated


def translate(body: Body) -> Translated:
    """Raises as decode_messages."""
    _refuse_unsupported(body, UNSUPPORTED_UNLESS, "")
    turns = _Turns()
    if body.system is not None:
        turns.add(ChatMessage("system", _content(body.system)), "system")
    for index, message in enumerate(body.messages):
        _add_turn(turns, message, f"messages[{index}]")
    if body.messages and body.messages[-1].role == "assistant":
        where = f"messages[{len(body.messages) - 1}]"
        _refuse(f"{where}.role: an assistant's turn cannot be continued here; end with the user's", f"{where}.role")
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": turns.messages,
        "tools": None if body.tools is None else [_tool(tool, index) for index, tool in enumerate(body.tools)],
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": _parallel(body.tool_choice),
        **_form(body),
    }
    if isinstance(body, api.MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "stream": body.stream,
            "stream_options": OPENING_USAGE if body.stream else None,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
        }
    return Translated(body, ChatCompletionRequest(**fields), tuple(turns.origins))


@dataclass(slots=True)
class _Turns:
    messages: list[ChatMessage] = field(default_factory=list[ChatMessage])
    origins: list[str] = field(default_factory=list[str])

    def add(self, message: ChatMessage, origin: str) -> None:
        self.messages.append(message)
        self.origins.append(origin)


def _add_turn(turns: _Turns, message: api.Message, where: str) -> None:
    if not message.content and not isinstance(message.content, str):
        _refuse(f"{where}.content must not be empty", f"{where}.content")
    if isinstance(message.content, str):
        turns.add(ChatMessage(message.role, message.content), where)
    elif message.role == "assistant":
        turns.add(_assistant(message.content, where), where)
    else:
        _add_blocks(turns, message.role, message.content, where)


def _assistant(blocks: Iterable[api.Block], where: str) -> ChatMessage:
    """Chat knows no order of text, thinking and calls."""
    texts: list[api.TextBlock] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        at = f"{where}.content[{index}]"
        match block:
            case api.TextBlock():
                texts.append(block)
            case api.ThinkingBlock():
                thoughts.append(block.thinking)
            case api.ToolUseBlock():
                check_free_form(block.input, f"{at}.input")
                function = {"name": block.name, "arguments": _to_json(block.input).decode()}
                calls.append({"id": block.id, "type": "function", "function": function})
            case api.ToolResultBlock():
                _refuse(f"{at}.type: a tool's result belongs into a user's turn", f"{at}.type")
    return ChatMessage(
        "assistant",
        _content(texts) if texts else None if calls else "",
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) or None,
    )


def _add_blocks(turns: _Turns, role: str, blocks: Iterable[api.Block], where: str) -> None:
    """Of a user's or the system's turn: results of tools, and what stands between them together."""
    texts: list[api.TextBlock] = []

    def add_texts() -> None:
        if texts:
            turns.add(ChatMessage("system" if role == "system" else "user", _content(texts)), where)
            texts.clear()

    for index, block in enumerate(blocks):
        at = f"{where}.content[{index}]"
        match block:
            case api.TextBlock():
                texts.append(block)
            case api.ToolResultBlock() if role == "user":
                add_texts()
                content = "" if block.content is None else _content(block.content)
                turns.add(ChatMessage("tool", content, tool_call_id=block.tool_use_id), at)
            case _:
                _refuse(f"{at}.type: a block of this type does not belong into a turn of the {role}", f"{at}.type")
    add_texts()


def _content(content: str | Iterable[api.TextBlock | api.OnlyText]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    parts = [TextPart(block.text) for block in content]
    return parts[0].text if len(parts) == 1 else parts


def _tool(tool: api.ToolDefinition, index: int) -> Tool:
    where = f"tools[{index}]"
    _refuse_unsupported(tool, TOOL_UNSUPPORTED_UNLESS, f"{where}.")
    if tool.input_schema is None:
        _refuse(f"Missing required field: '{where}.input_schema'.", f"{where}.input_schema")
    return Tool("function", FunctionDefinition(tool.name, tool.description, tool.input_schema, tool.strict))


def _choice(choice: api.Choice | None) -> ToolChoice | None:
    match choice:
        case None:
            return None
        case api.AutoChoice():
            return "auto"
        case api.AnyChoice():
            return "required"
        case api.ToolChoice():
            return NamedToolChoice(FunctionName(choice.name))
        case api.NoneChoice():
            return "none"


def _parallel(choice: api.Choice | None) -> bool | None:
    if choice is None or isinstance(choice, api.NoneChoice) or not choice.disable_parallel_tool_use:
        return None
    return False


def _form(body: Body) -> dict[str, Any]:
    """Of thinking and output_config. To think is allowed, by the names that chat templates have for it: one that has
    none of them loses nothing. Not to think is a demand, and so is an effort: they are kept or refused."""
    made: dict[str, Any] = {}
    config = body.output_config or api.OutputConfig()
    if config.effort is not None:
        made["reasoning_effort"] = _EFFORTS.get(config.effort, config.effort)
    match body.thinking:
        case None:
            pass
        case api.ThinkingDisabled():
            made["reasoning_effort"] = "none"
        case api.ThinkingEnabled(budget_tokens=budget):
            if budget < 1:
                _refuse("thinking.budget_tokens must be at least 1", "thinking.budget_tokens")
            made["chat_template_kwargs"] = {"enable_thinking": True, "thinking": True, "thinking_budget": budget}
        case api.ThinkingAdaptive():
            made["chat_template_kwargs"] = {"enable_thinking": True, "thinking": True}
    if config.format is not None:
        schema = JsonSchemaFormat(_FORMAT_NAME, config.format.schema)
        made["response_format"] = ResponseFormat("json_schema", schema)
    return made


def _refuse_unsupported(given: msgspec.Struct, unless: Mapping[str, tuple[object, ...]], where: str) -> None:
    for name, harmless in unless.items():
        value = getattr(given, name, None)
        if value is not None and value not in harmless:
            raise StatorError(
                ErrorCode.UNSUPPORTED, f"{where}{name} is not supported: leave it out.", param=f"{where}{name}"
            )


def _refuse(message: str, param: str) -> NoReturn:
    raise StatorError(ErrorCode.INVALID_REQUEST, message, param=param)
