"""Request bodies to OpenAI structs. Pure: every body, whatever its bytes, is a request or INVALID_REQUEST."""

import operator
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.frontend.bounds import check_bounds, check_messages, check_model
from stator.messages.embeddings import EmbeddingsRequest
from stator.messages.openai import ChatCompletionRequest, ChatMessage, CompletionRequest
from stator.messages.tokenize import DetokenizeRequest, TokenizeRequest
from stator.messages.tools import Tool

CHAT = "chat"
COMPLETIONS = "completions"

MAX_DEPTH = 64
"""Of values whose fields no schema declares, such as tools. They cross a wire that is encoded recursively."""

MAX_DETAIL_CHARS = 300

_DECODE_CHAT = msgspec.json.Decoder(ChatCompletionRequest).decode
_DECODE_COMPLETION = msgspec.json.Decoder(CompletionRequest).decode
_DECODE_TOKENIZE = msgspec.json.Decoder(TokenizeRequest).decode
_DECODE_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest).decode
_DECODE_EMBEDDINGS = msgspec.json.Decoder(EmbeddingsRequest).decode
_DECODE_NAMES = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_PART_TYPE = re.compile(r"messages\[\d+\]\.content\[\d+\]\.type")
_MESSAGE_FIELDS = ("function_call", "audio", "refusal")
_NONE_OF_MESSAGE = (None,) * len(_MESSAGE_FIELDS)
_REFUSED_OF_MESSAGE = operator.attrgetter(*_MESSAGE_FIELDS)

MAX_NAMED_FIELDS = 16
MAX_NAME_CHARS = 64

_T = TypeVar("_T")


def decode_request(endpoint: str, body: bytes) -> ChatCompletionRequest | CompletionRequest:
    """endpoint: CHAT or COMPLETIONS. Raises StatorError(INVALID_REQUEST), with the field in `param` if one is at
    fault and the byte in the message if the JSON is."""
    request = decode_body(_DECODE_CHAT if endpoint == CHAT else _DECODE_COMPLETION, body)
    check_request(request)
    return request


def decode_tokenize(body: bytes) -> TokenizeRequest:
    """Raises as decode_request."""
    request = decode_body(_DECODE_TOKENIZE, body)
    _check_tools(request.tools)
    _check_free_forms(request)
    _check_messages(request.messages or ())
    check_model(request.model)
    check_messages(request.messages or ())
    return request


def decode_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises as decode_request."""
    request = decode_body(_DECODE_DETOKENIZE, body)
    check_model(request.model)
    return request


def decode_embeddings(body: bytes) -> EmbeddingsRequest:
    """Raises as decode_request."""
    request = decode_body(_DECODE_EMBEDDINGS, body)
    _check_free_forms(request)
    _check_not_mixed(request.input, "input")
    return request


def decode_body(decode: Callable[[bytes], _T], body: bytes) -> _T:
    """decode: of a msgspec decoder. Raises as decode_request."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        refuse_field(str(error))
    except msgspec.DecodeError as error:
        _refuse(_json_fault(str(error), body))
    except UnicodeDecodeError as error:
        _refuse(f"The request body is not valid JSON: a string is not UTF-8 ({error.reason}).")
    except RecursionError:
        _refuse("The request body is nested too deeply.")


def undeclared_fields(request: msgspec.Struct, body: bytes) -> list[str]:
    """Names of the fields of a body that was decoded which nothing here knows: other vendors' extensions, ignored."""
    names = [name for name in _DECODE_NAMES(body) if name not in request.__struct_fields__]
    return [name[:MAX_NAME_CHARS] for name in names[:MAX_NAMED_FIELDS]]


def _refuse(message: str, param: str | None = None) -> NoReturn:
    raise StatorError(ErrorCode.INVALID_REQUEST, message, param=param) from None


def _json_fault(text: str, body: bytes) -> str:
    if not body.strip():
        return "The request body is empty; expected a JSON object."
    if text == "Input data was truncated":
        text = f"it ends too early (byte {len(body)})"
    return f"The request body is not valid JSON: {text.removeprefix('JSON is malformed: ')}."


def refuse_field(text: str, where: str = "") -> NoReturn:
    """text: msgspec's message, "what is wrong" or "what is wrong - at `$.path`". where: the path of its `$`."""
    detail, _, path = text.rpartition(" - at `$")
    if not detail:
        detail, path = path, ""
    param = (where + path.removesuffix("`")).removeprefix(".").replace("[...]", "")
    missing = detail.removeprefix("Object missing required field `")
    if missing != detail:
        param = f"{param}.{missing.removesuffix('`')}" if param else missing.removesuffix("`")
        _refuse(f"Missing required field: '{param}'.", param)
    if len(detail) > MAX_DETAIL_CHARS:
        detail = detail[:MAX_DETAIL_CHARS] + "..."
    detail = detail[:1].lower() + detail[1:]
    if _PART_TYPE.fullmatch(param):
        _refuse(f"Invalid value for '{param}': {detail}; only parts of the type 'text' are supported.", param)
    if not param:
        _refuse(f"The request body must be a JSON object: {detail}.")
    _refuse(f"Invalid value for '{param}': {detail}.", param)


def check_request(request: ChatCompletionRequest | CompletionRequest) -> None:
    """What types cannot say. Raises as decode_request."""
    check_bounds(request)
    if request.stream_options is not None and not request.stream:
        _refuse("'stream_options' is only allowed together with 'stream': true.", "stream_options")
    if request.response_format is not None or request.structured_outputs is not None:
        _check_form(request)
    _check_free_forms(request)
    if isinstance(request, CompletionRequest):
        _check_not_mixed(request.prompt, "prompt")
        return
    _check_tools(request.tools)
    _check_messages(request.messages)


def _check_not_mixed(value: Any, name: str) -> None:
    if isinstance(value, list) and len({type(part) for part in value}) > 1:
        _refuse(f"Invalid value for '{name}': a list may not mix texts, token ids and lists of token ids.", name)


def _check_messages(messages: Sequence[ChatMessage]) -> None:
    for index, message in enumerate(messages):
        if (refused := _REFUSED_OF_MESSAGE(message)) != _NONE_OF_MESSAGE:
            _refuse_message_field(refused, f"messages[{index}]")
        if message.tool_calls is not None:
            check_free_form(message.tool_calls, f"messages[{index}].tool_calls")


def _check_tools(tools: Sequence[Tool] | None) -> None:
    for index, tool in enumerate(tools or ()):
        if tool.function is not None and tool.function.parameters is not None:
            check_free_form(tool.function.parameters, f"tools[{index}].function.parameters")


def _check_form(request: ChatCompletionRequest | CompletionRequest) -> None:
    format, asked = request.response_format, request.structured_outputs
    if format is not None and format.json_schema is not None and format.json_schema.schema is not None:
        check_free_form(format.json_schema.schema, "response_format.json_schema.schema")
    if asked is not None and isinstance(asked.json, dict):
        check_free_form(asked.json, "structured_outputs.json")


def _refuse_message_field(values: tuple[Any, ...], where: str) -> NoReturn:
    name = next(name for name, value in zip(_MESSAGE_FIELDS, values, strict=True) if value is not None)
    raise StatorError(ErrorCode.UNSUPPORTED, f"{where}.{name} is not supported; leave it out.", param=f"{where}.{name}")


@cache
def _free_forms(
    kind: type[msgspec.Struct],
) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]], tuple[None, ...]]:
    """The fields that take any JSON, all their values in one call, and those of a request that has none of them."""
    names = tuple(name for name, hint in get_type_hints(kind).items() if _takes_any(hint))
    return names, operator.attrgetter(*names), (None,) * len(names)


def _takes_any(hint: Any) -> bool:
    return hint is Any or any(_takes_any(part) for part in get_args(hint))


def _check_free_forms(request: msgspec.Struct) -> None:
    names, read, absent = _free_forms(type(request))
    if (values := read(request)) != absent:
        for name, value in zip(names, values, strict=True):
            check_free_form(value, name)


def check_free_form(value: Any, param: str) -> None:
    """Refuse what JSON can say and the wire behind cannot: numbers beyond 64 bits, endless nesting."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, int) and not -(2**63) <= item < 2**63:
                _refuse(f"Invalid value for '{param}': a number is beyond 64 bits.", param)
        if not below:
            return
        level = below
    _refuse(f"Invalid value for '{param}': nested more than {MAX_DEPTH} deep.", param)
