"""How much of anything a request may have, where no schema and no model says so. Pure.

What needs the model's vocabulary, context or chat template is bounded by the Processor: ranges, n, log-probabilities,
stop strings, schemas, grammars, tools and the length of the prompt (`processor.validation`, `core.structured`,
`core.json_schema`, `core.tools.request`).
"""

from collections.abc import Sequence
from operator import attrgetter

from stator.errors import ErrorCode, StatorError
from stator.messages.openai import ChatCompletionRequest, ChatMessage, CompletionRequest, RequestFields
from stator.messages.openai_limits import MAX_CHOICES

MAX_MODEL_CHARS = 256
MAX_MESSAGES = 2048
"""As OpenAI."""
MAX_CONTENT_PARTS = 2048
"""Of one message."""
MAX_CALLS = 128
"""Of one message; as many as a request may have tools."""
MAX_NAME_CHARS = 256
MAX_PROMPTS = MAX_CHOICES
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
"""These three are OpenAI's."""
MAX_LABEL_CHARS = 512
"""Of `user` and what else says who asks, and of `cache_salt`."""
MAX_WORD_CHARS = 64
"""Of fields that take one of a few words."""

_LABELS = ("user", "cache_salt")
_CHAT_LABELS = (*_LABELS, "safety_identifier", "prompt_cache_key")
_CHAT_WORDS = ("reasoning_effort", "service_tier", "verbosity", "prompt_cache_retention")

_TEXT = tuple((name, MAX_LABEL_CHARS) for name in _LABELS)
_CHAT_TEXT = (
    *((name, MAX_LABEL_CHARS) for name in _CHAT_LABELS),
    *((name, MAX_WORD_CHARS) for name in _CHAT_WORDS),
)
_read_text, _read_chat_text = attrgetter(*_LABELS), attrgetter(*_CHAT_LABELS, *_CHAT_WORDS)
_NO_TEXT, _NO_CHAT_TEXT = (None,) * len(_TEXT), (None,) * len(_CHAT_TEXT)


def check_bounds(request: ChatCompletionRequest | CompletionRequest) -> None:
    """Raises StatorError(INVALID_REQUEST) that names the field; so do the others."""
    check_model(request.model)
    if request.metadata:
        _check_metadata(request.metadata)
    if isinstance(request, CompletionRequest):
        if _read_text(request) != _NO_TEXT:
            _check_texts(request, _TEXT)
        prompt = request.prompt
        if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
            raise _too_many(len(prompt), "prompt", MAX_PROMPTS)
        return
    if _read_chat_text(request) != _NO_CHAT_TEXT:
        _check_texts(request, _CHAT_TEXT)
    check_messages(request.messages)


def check_model(name: str | None) -> None:
    _check_text(name, "model", MAX_MODEL_CHARS)


def check_messages(messages: Sequence[ChatMessage]) -> None:
    if len(messages) > MAX_MESSAGES:
        raise _too_many(len(messages), "messages", MAX_MESSAGES)
    for index, message in enumerate(messages):
        if type(message.content) is list or message.name is not None or message.tool_calls is not None:
            _check_message(message, f"messages[{index}]")


def _check_message(message: ChatMessage, where: str) -> None:
    content, calls = message.content, message.tool_calls
    if isinstance(content, list) and len(content) > MAX_CONTENT_PARTS:
        raise _too_many(len(content), f"{where}.content", MAX_CONTENT_PARTS)
    if calls is not None and len(calls) > MAX_CALLS:
        raise _too_many(len(calls), f"{where}.tool_calls", MAX_CALLS)
    _check_text(message.name, f"{where}.name", MAX_NAME_CHARS)


def _check_metadata(metadata: dict[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise _too_many(len(metadata), "metadata", MAX_METADATA)
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS:
            raise _too_long(len(key), "metadata", "a key", MAX_METADATA_KEY_CHARS)
        if len(value) > MAX_METADATA_VALUE_CHARS:
            raise _too_long(len(value), "metadata", "a value", MAX_METADATA_VALUE_CHARS)


def _check_texts(request: RequestFields, bounds: tuple[tuple[str, int], ...]) -> None:
    for name, max_chars in bounds:
        _check_text(getattr(request, name), name, max_chars)


def _check_text(text: str | None, where: str, max_chars: int) -> None:
    if text is not None and len(text) > max_chars:
        raise _too_long(len(text), where, "the text", max_chars)


def _too_long(num_chars: int, where: str, what: str, max_chars: int) -> StatorError:
    message = f"Invalid value for '{where}': {what} has {num_chars} characters, at most {max_chars} are taken."
    return StatorError(ErrorCode.INVALID_REQUEST, message, param=where)


def _too_many(count: int, where: str, most: int) -> StatorError:
    message = f"Invalid value for '{where}': it has {count} entries, at most {most} are taken."
    return StatorError(ErrorCode.INVALID_REQUEST, message, param=where)
