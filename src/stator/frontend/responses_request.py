"""A request for a response as one for a chat completion. Pure.

The conversation is a list of items in one form: every item has `type` and `id`, the content of messages is a list of
parts. So they are kept, shown and turned into messages.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.frontend.decode import check_free_form, decode_body, refuse_field
from stator.messages.openai import ChatCompletionRequest, ChatMessage, TextPart
from stator.messages.responses import (
    AllowedChoice,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionChoice,
    FunctionTool,
    Json,
    JsonSchemaText,
    MessageItem,
    ReasoningItem,
    ReferenceItem,
    ResponsesRequest,
    TextContent,
)
from stator.messages.responses_fields import HARMLESS, HARMLESS_INSIDE, INCLUDABLE, PASSED_ON
from stator.messages.tools import (
    AllowedToolChoice,
    AllowedTools,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolChoice,
)

MAX_METADATA = (16, 64, 512)
"""Pairs, characters of a key, characters of a value."""

MAX_ID_CHARS = 128
LOGPROBS = "message.output_text.logprobs"

_DECODE = msgspec.json.Decoder(ResponsesRequest).decode
_FREE_FORM = ("input", "tools", "tool_choice", "chat_template_kwargs")
_OWN_ID = re.compile(r"[a-z]+_([0-9a-f]{48})_[0-9]{1,9}")

_S = TypeVar("_S", bound=msgspec.Struct)


def _invalid(param: str, what: str) -> NoReturn:
    raise StatorError(ErrorCode.INVALID_REQUEST, f"Invalid value for '{param}': {what}.", param=param)


def _unsupported(param: str, what: str = "leave it out") -> NoReturn:
    raise StatorError(ErrorCode.UNSUPPORTED, f"{param} is not supported: {what}.", param=param)


class ItemIds:
    """Ids of one response and of its items. base: 48 hexadecimal digits that nobody can guess: whoever knows the id
    of a response may read it. An item's id says in which response it is."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._number = 0

    @property
    def response_id(self) -> str:
        return f"resp_{self._base}"

    def item(self, prefix: str) -> str:
        self._number += 1
        return f"{prefix}_{self._base}_{self._number}"


def response_of(item_id: str) -> str | None:
    """The id of the response that has an item; None if the id is none of ours."""
    own = _OWN_ID.fullmatch(item_id)
    return None if own is None else f"resp_{own[1]}"


def decode_responses(body: bytes) -> ResponsesRequest:
    """Raises StatorError(INVALID_REQUEST or UNSUPPORTED) with the field in `param`, as do all others here."""
    request = decode_body(_DECODE, body)
    for name in _FREE_FORM:
        if isinstance(value := getattr(request, name), (list, dict)):
            check_free_form(value, name)
    if request.text is not None and request.text.format is not None:
        check_free_form(request.text.format, "text.format")
    if request.structured_outputs is not None and isinstance(request.structured_outputs.json, dict):
        check_free_form(request.structured_outputs.json, "structured_outputs.json")
    _check_refused(request)
    _check_rest(request)
    return request


def _check_refused(request: ResponsesRequest) -> None:
    for name, harmless in HARMLESS.items():
        _refuse_unless(getattr(request, name), harmless, name)
    if request.stream_options is not None:
        if not request.stream:
            _invalid("stream_options", "it is only allowed together with 'stream': true")
        if request.stream_options.include_obfuscation:
            _unsupported("stream_options.include_obfuscation")
    for name in ("reasoning", "text"):
        config = getattr(request, name)
        for inside in config.__struct_fields__ if config is not None else ():
            path = f"{name}.{inside}"
            if path in HARMLESS_INSIDE:
                _refuse_unless(getattr(config, inside), HARMLESS_INSIDE[path], path)


def _refuse_unless(value: Any, harmless: Iterable[Any], param: str) -> None:
    if value is not None and not any(type(value) is type(each) and value == each for each in harmless):
        _unsupported(param)


def _check_rest(request: ResponsesRequest) -> None:
    for index, name in enumerate(request.include or ()):
        if name not in INCLUDABLE:
            _invalid(f"include[{index}]", f"{name[:64]!r} is not known")
    if request.input is None and request.previous_response_id is None:
        raise StatorError(ErrorCode.INVALID_REQUEST, "Missing required field: 'input'.", param="input")
    pairs, key_chars, value_chars = MAX_METADATA
    metadata = request.metadata or {}
    if len(metadata) > pairs or any(
        len(key) > key_chars or len(value) > value_chars for key, value in metadata.items()
    ):
        _invalid("metadata", f"at most {pairs} pairs, of keys of {key_chars} and values of {value_chars} characters")


def read_input(given: str | list[Json] | None, ids: ItemIds) -> list[Json]:
    """Items in our form; references to others as they are. An id that the client gave stays."""
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_item(raw, f"input[{index}]", ids) for index, raw in enumerate(given)]


def _item(raw: Json, where: str, ids: ItemIds) -> Json:
    kind = raw.get("type")
    if kind is None:
        kind = "item_reference" if "id" in raw and "role" not in raw else "message"
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        supported = ", ".join(_READERS)
        _unsupported(f"{where}.type", f"{str(kind)[:64]!r} is none of {supported}")
    for name in ("encrypted_content", "caller", "namespace", "async"):
        _refuse_unless(raw.get(name), HARMLESS_INSIDE[f"input.{name}"], f"{where}.{name}")
    item = read(raw, where)
    given = raw.get("id")
    if isinstance(given, str) and 0 < len(given) <= MAX_ID_CHARS:
        item["id"] = given
    elif given is not None:
        _invalid(f"{where}.id", f"it must be a string of 1 to {MAX_ID_CHARS} characters")
    else:
        item["id"] = ids.item(_PREFIXES[kind])
    return item


def _convert(raw: Json, kind: type[_S], where: str) -> _S:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        refuse_field(str(error), where)


def _texts(parts: str | list[Json] | None, where: str, *types: str) -> list[str]:
    """The texts of parts, all of which must have one of the types."""
    if parts is None:
        return []
    if isinstance(parts, str):
        return [parts]
    texts: list[str] = []
    for index, raw in enumerate(parts):
        path = f"{where}[{index}]"
        kind = raw.get("type")
        if kind not in types:
            _unsupported(f"{path}.type", f"{str(kind)[:64]!r} is not {' or '.join(types)}")
        part = _convert(raw, TextContent, path)
        if part.prompt_cache_breakpoint is not None:
            _unsupported(f"{path}.prompt_cache_breakpoint")
        texts.append(part.text)
    return texts


def _message(raw: Json, where: str) -> Json:
    message = _convert(raw, MessageItem, where)
    texts = _texts(message.content, f"{where}.content", "input_text", "output_text")
    if message.role == "assistant":
        content: list[Json] = [output_text(text) for text in texts]
    else:
        content = [{"type": "input_text", "text": text} for text in texts]
    return {"type": "message", "role": message.role, "status": "completed", "content": content}


def output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_call(raw: Json, where: str) -> Json:
    call = _convert(raw, FunctionCallItem, where)
    return {
        "type": "function_call",
        "call_id": call.call_id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _function_call_output(raw: Json, where: str) -> Json:
    given = _convert(raw, FunctionCallOutputItem, where)
    output = "\n".join(_texts(given.output, f"{where}.output", "input_text"))
    return {"type": "function_call_output", "call_id": given.call_id, "output": output, "status": "completed"}


def _reasoning(raw: Json, where: str) -> Json:
    given = _convert(raw, ReasoningItem, where)
    summary = _texts(given.summary, f"{where}.summary", "summary_text")
    content = _texts(given.content, f"{where}.content", "reasoning_text")
    return {
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": text} for text in summary],
        "content": [{"type": "reasoning_text", "text": text} for text in content],
        "status": "completed",
    }


def _reference(raw: Json, where: str) -> Json:
    return {"type": "item_reference", "id": _convert(raw, ReferenceItem, where).id}


_READERS: dict[str, Callable[[Json, str], Json]] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
    "reasoning": _reasoning,
    "item_reference": _reference,
}
_PREFIXES = {
    "message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs", "item_reference": "ref",
}  # fmt: skip


@dataclass(slots=True)
class _Assistant:
    """Items of one turn of the model's, which are one message in chat."""

    reasoning: list[str] = field(default_factory=list[str])
    content: list[Json] | None = None
    calls: list[Json] = field(default_factory=list[Json])

    def message(self) -> ChatMessage:
        return ChatMessage(
            "assistant",
            _content(self.content or []),
            tool_calls=self.calls or None,
            reasoning_content="\n".join(self.reasoning) or None,
        )


def chat_messages(items: Iterable[Json], instructions: str | None = None) -> list[ChatMessage]:
    """items: in our form, without references."""
    messages: list[ChatMessage] = []
    names: dict[str, str] = {}
    current: _Assistant | None = None
    if instructions is not None:
        messages.append(ChatMessage("system", instructions))
    for item in items:
        kind = item["type"]
        if kind == "reasoning" or (kind == "message" and item["role"] == "assistant"):
            if current is None or current.content is not None or current.calls:
                current = _flush(current, messages, _Assistant())
            if kind == "message":
                current.content = item["content"]
            else:
                current.reasoning += [part["text"] for part in item["content"] or item["summary"]]
        elif kind == "function_call":
            current = current or _Assistant()
            names[item["call_id"]] = item["name"]
            function = {"name": item["name"], "arguments": item["arguments"]}
            current.calls.append({"id": item["call_id"], "type": "function", "function": function})
        else:
            current = _flush(current, messages, None)
            messages.append(_other_message(item, names))
    _flush(current, messages, None)
    return messages


_Next = TypeVar("_Next", bound=_Assistant | None)


def _flush(current: _Assistant | None, messages: list[ChatMessage], following: _Next) -> _Next:
    if current is not None:
        messages.append(current.message())
    return following


def _other_message(item: Json, names: dict[str, str]) -> ChatMessage:
    if item["type"] == "message":
        return ChatMessage(item["role"], _content(item["content"]))
    call_id = item["call_id"]
    return ChatMessage("tool", item["output"], name=names.get(call_id), tool_call_id=call_id)


def _content(parts: Sequence[Json]) -> str | list[TextPart]:
    if len(parts) == 1:
        return parts[0]["text"]
    return [TextPart(part["text"]) for part in parts] if parts else ""


def wants_logprobs(request: ResponsesRequest) -> bool:
    return LOGPROBS in (request.include or ()) or bool(request.top_logprobs)


def chat_request(request: ResponsesRequest, items: Iterable[Json]) -> ChatCompletionRequest:
    """items: the whole conversation. What chat refuses of it, it refuses under chat's names: `in_our_names`."""
    logprobs = wants_logprobs(request)
    passed_on: dict[str, Any] = {name: getattr(request, name) for name in PASSED_ON}
    return ChatCompletionRequest(
        model=request.model,
        messages=chat_messages(items, request.instructions),
        stream=request.stream,
        max_completion_tokens=request.max_output_tokens,
        logprobs=logprobs or None,
        top_logprobs=request.top_logprobs if logprobs else None,
        tools=[_tool(raw, f"tools[{index}]") for index, raw in enumerate(request.tools or ())] or None,
        tool_choice=_tool_choice(request.tool_choice),
        response_format=None if request.text is None else _format(request.text.format),
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        **passed_on,
    )


def _tool(raw: Json, where: str) -> Tool:
    if raw.get("type") != "function":
        _unsupported(f"{where}.type", 'only tools of the type "function" are taken')
    for name in ("defer_loading", "allowed_callers", "output_schema", "async"):
        _refuse_unless(raw.get(name), HARMLESS_INSIDE[f"tools.{name}"], f"{where}.{name}")
    tool = _convert(raw, FunctionTool, where)
    return Tool("function", FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict))


def _tool_choice(given: str | Json | None) -> ToolChoice | None:
    match given:
        case None | "none" | "auto" | "required":
            return given
        case str():
            _invalid("tool_choice", "it must be none, auto, required or an object")
        case {"type": "function"}:
            return NamedToolChoice(FunctionName(_convert(given, FunctionChoice, "tool_choice").name))
        case {"type": "allowed_tools"}:
            allowed = _convert(given, AllowedChoice, "tool_choice")
            named: list[NamedToolChoice] = []
            for index, raw in enumerate(allowed.tools):
                where = f"tool_choice.tools[{index}]"
                if raw.get("type") != "function":
                    _unsupported(f"{where}.type", 'only tools of the type "function" are taken')
                named.append(NamedToolChoice(FunctionName(_convert(raw, FunctionChoice, where).name)))
            return AllowedToolChoice(AllowedTools(allowed.mode, named))
        case _:
            _unsupported("tool_choice.type", 'only "function" and "allowed_tools" are taken')


def _format(given: Json | None) -> ResponseFormat | None:
    if given is None:
        return None
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat("json_object")
    if kind != "json_schema":
        _unsupported("text.format.type", f"{str(kind)[:64]!r} is none of text, json_object, json_schema")
    asked = _convert(given, JsonSchemaText, "text.format")
    return ResponseFormat("json_schema", JsonSchemaFormat(asked.name, asked.schema, asked.description, asked.strict))


_CHAT_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^messages\b.*$"), "input"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^(max_completion_tokens|max_tokens)$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^logprobs$"), "include"),
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"^tool_choice\.function\b"), "tool_choice"),
    (re.compile(r"^tool_choice\.allowed_tools\.tools(\[\d+\])?(\.function)?"), r"tool_choice.tools\1"),
)


def in_our_names(error: StatorError) -> StatorError:
    """A refusal with the names that the client used."""
    param = error.param or ""
    for pattern, ours in _CHAT_NAMES:
        renamed, found = pattern.subn(ours, param)
        if found and renamed != param:
            return StatorError(
                error.code,
                error.message.replace(param, renamed),
                param=renamed,
                retry_after_s=error.retry_after_s,
                instance_id=error.instance_id,
            )
    return error
