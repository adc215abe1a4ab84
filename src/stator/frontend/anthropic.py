"""Anthropic's messages as `Dialect`s: answers, streams and errors in its form. Pure.

An answer is a list of blocks, one after the other; the parts of a Processor's deltas (what was thought, text, calls)
are put into that order as they come.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from stator.errors import Ending, ErrorCode, StatorError
from stator.frontend.anthropic_request import Translated, decode_count_tokens, decode_messages
from stator.frontend.dialect import StreamEncoder, WholeEncoder
from stator.frontend.http import ErrorForm
from stator.messages import anthropic as api
from stator.messages.openai import ChatCompletionRequest, PromptTokensDetails, Usage
from stator.messages.processor import CompletionDelta

MESSAGES = "messages"
COUNT_TOKENS = "count_tokens"

MESSAGES_PATH = "/v1/messages"
COUNT_TOKENS_PATH = "/v1/messages/count_tokens"

SIGNATURE = "unsigned"
"""Of thinking. Clients hand back what they got; here nothing depends on it."""

INVALID_JSON = "INVALID_JSON"
"""The one key of a call's input whose JSON the model did not write to its end, or not well; its value is the text."""

_encode = msgspec.json.Encoder().encode

Json = dict[str, Any]


class _Block:
    """One of an answer, which grows. kind: of its deltas. before_text: what an event that has some begins with."""

    __slots__ = ("before_text", "call_id", "index", "kind", "name", "parts", "tool")

    def __init__(self, kind: str, index: int, *, tool: int = -1, call_id: str = "", name: str = "") -> None:
        self.kind = kind
        self.index = index
        self.tool = tool
        self.call_id = call_id
        self.name = name
        self.parts: list[str] = []
        kind_and_field = kind.encode("ascii"), _FIELDS[kind].encode("ascii")
        self.before_text = _BEFORE_TEXT % (index, *kind_and_field)

    def opening(self) -> Json:
        if self.kind == _CALL:
            return {"type": "tool_use", "id": self.call_id, "name": self.name, "input": {}}
        if self.kind == _THOUGHT:
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "text", "text": ""}

    def whole(self) -> Json:
        text = "".join(self.parts)
        if self.kind == _CALL:
            return self.opening() | {"input": _input(text)}
        if self.kind == _THOUGHT:
            return {"type": "thinking", "thinking": text, "signature": SIGNATURE}
        return {"type": "text", "text": text}


_BEFORE_TEXT = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%s","%s":'
_TEXT, _THOUGHT, _CALL = "text_delta", "thinking_delta", "input_json_delta"
_FIELDS = {_TEXT: "text", _THOUGHT: "thinking", _CALL: "partial_json"}


def _input(text: str) -> Json:
    if not text.strip():
        return {}
    try:
        found = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return {INVALID_JSON: text}
    return found if isinstance(found, dict) else {INVALID_JSON: text}


class _Blocks:
    """Puts the parts of deltas into blocks, and tells of it: begun, grown by a text, done.

    White space before a block's first other character waits for that: between calls, or before the first, it is no
    text of its own. hides_thoughts: that something was thought is told, not what.
    """

    def __init__(
        self,
        *,
        hides_thoughts: bool,
        begun: Callable[[_Block], None],
        grown: Callable[[_Block, str], None],
        done: Callable[[_Block], None],
    ) -> None:
        self._hides_thoughts = hides_thoughts
        self._begun, self._grown, self._done = begun, grown, done
        self._open: _Block | None = None
        self._blank = ""
        self._num_blocks = 0
        self.num_calls = 0

    def add(self, deltas: Sequence[CompletionDelta]) -> None:
        """Texts that wait together become one."""
        texts: list[str] = []
        for delta in deltas:
            if delta.reasoning or delta.tool_calls:
                self._add_text("".join(texts))
                texts.clear()
                if delta.reasoning.strip() or (delta.reasoning and self._is_open(_THOUGHT)):
                    self._grow(_THOUGHT, "" if self._hides_thoughts else delta.reasoning)
            texts.append(delta.text)
            for piece in delta.tool_calls:
                self._add_text("".join(texts))
                texts.clear()
                block = self._open
                if block is None or block.tool != piece.index:
                    self._begin(_CALL, tool=piece.index, call_id=piece.id or "", name=piece.name or "")
                    self.num_calls += 1
                self._grow(_CALL, piece.arguments)
        self._add_text("".join(texts))

    def finish(self) -> None:
        if self._blank and not self._num_blocks:
            self._grow(_TEXT, self._blank)
        self._end()

    def _add_text(self, text: str) -> None:
        if not text:
            return
        if not self._is_open(_TEXT):
            text = self._blank + text
            if not text.strip():
                self._blank = text
                return
            self._blank = ""
        self._grow(_TEXT, text)

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open.kind == kind

    def _grow(self, kind: str, text: str) -> None:
        if not self._is_open(kind):
            self._begin(kind)
        assert self._open is not None
        if text:
            self._grown(self._open, text)

    def _begin(self, kind: str, **of_call: Any) -> None:
        self._end()
        self._blank = ""
        self._open = _Block(kind, self._num_blocks, **of_call)
        self._num_blocks += 1
        self._begun(self._open)

    def _end(self) -> None:
        if self._open is not None:
            self._done(self._open)
            self._open = None


def _usage(usage: Usage) -> Json:
    """Anthropic counts what was read from a cache apart from the rest of the prompt."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    }


def _stop(last: CompletionDelta, num_calls: int) -> Json:
    if last.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_string}
    if last.ending is Ending.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    return {"stop_reason": "tool_use" if num_calls else "end_turn", "stop_sequence": None}


def _message(call_id: str, model: str, usage: Usage, content: list[Json], stop: Json) -> Json:
    return {
        "id": f"msg_{call_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        **stop,
        "usage": _usage(usage),
    }


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode("ascii"), _encode({"type": name, **fields}))


_NOTHING_YET = Usage(0, 0, 0, PromptTokensDetails(0))


class MessageEvents:
    """A stream. first: the answer's first delta, whose usage opens it."""

    def __init__(self, call_id: str, model: str, first: CompletionDelta, *, hides_thoughts: bool) -> None:
        self._call_id = call_id
        self._model = model
        self._first = first
        self._events: list[bytes] = []
        self._blocks = _Blocks(
            hides_thoughts=hides_thoughts, begun=self._on_begun, grown=self._on_grown, done=self._on_done
        )

    def opening(self) -> bytes:
        nothing: Json = {"stop_reason": None, "stop_sequence": None}
        usage = self._first.usage or _NOTHING_YET
        return _event("message_start", message=_message(self._call_id, self._model, usage, [], nothing))

    def encode(self, deltas: Sequence[CompletionDelta]) -> bytes:
        self._blocks.add(deltas)
        last = deltas[-1]
        if last.ending is not None:
            self._blocks.finish()
            usage = _usage(last.usage or _NOTHING_YET)
            self._events.append(_event("message_delta", delta=_stop(last, self._blocks.num_calls), usage=usage))
        events = b"".join(self._events)
        self._events.clear()
        return events

    def closing(self) -> bytes:
        return _event("message_stop")

    def failure(self, error: StatorError) -> bytes:
        return _event("error", error=_error(error))

    def _on_begun(self, block: _Block) -> None:
        self._events.append(_event("content_block_start", index=block.index, content_block=block.opening()))

    def _on_grown(self, block: _Block, text: str) -> None:
        self._events.append(block.before_text + _encode(text) + b"}}\n\n")

    def _on_done(self, block: _Block) -> None:
        if block.kind == _THOUGHT:
            signature = {"type": "signature_delta", "signature": SIGNATURE}
            self._events.append(_event("content_block_delta", index=block.index, delta=signature))
        self._events.append(_event("content_block_stop", index=block.index))


class WholeMessage:
    """An answer that is not streamed."""

    def __init__(self, call_id: str, model: str, *, hides_thoughts: bool) -> None:
        self._call_id = call_id
        self._model = model
        self._content: list[Json] = []
        self._last = CompletionDelta()
        self._blocks = _Blocks(
            hides_thoughts=hides_thoughts,
            begun=lambda block: None,
            grown=lambda block, text: block.parts.append(text),
            done=lambda block: self._content.append(block.whole()),
        )

    def add(self, deltas: Sequence[CompletionDelta]) -> None:
        self._blocks.add(deltas)
        self._last = deltas[-1]

    def encode(self, usage: Usage) -> bytes:
        self._blocks.finish()
        stop = _stop(self._last, self._blocks.num_calls)
        return _encode(_message(self._call_id, self._model, usage, self._content, stop))


class TokenCount:
    """The answer to count_tokens, all of which is its usage."""

    def add(self, deltas: Sequence[CompletionDelta]) -> None:
        pass

    def encode(self, usage: Usage) -> bytes:
        return _encode({"input_tokens": usage.prompt_tokens})


_INVALID, _API, _OVERLOADED = "invalid_request_error", "api_error", "overloaded_error"

_TYPES: dict[ErrorCode, tuple[str, int]] = {
    ErrorCode.INVALID_REQUEST: (_INVALID, 400),
    ErrorCode.UNSUPPORTED: (_INVALID, 400),
    ErrorCode.UNAUTHORIZED: ("authentication_error", 401),
    ErrorCode.MODEL_NOT_FOUND: ("not_found_error", 404),
    ErrorCode.NOT_FOUND: ("not_found_error", 404),
    ErrorCode.METHOD_NOT_ALLOWED: (_INVALID, 405),
    ErrorCode.REQUEST_TIMEOUT: (_INVALID, 408),
    ErrorCode.BODY_TOO_LARGE: ("request_too_large", 413),
    ErrorCode.CANCELLED: (_INVALID, 499),
    ErrorCode.DEADLINE: ("timeout_error", 504),
    ErrorCode.NO_INSTANCE: (_OVERLOADED, 529),
    ErrorCode.OVERLOADED: (_OVERLOADED, 529),
    ErrorCode.DRAINING: (_OVERLOADED, 529),
}
"""Type and HTTP status of the failures that are told apart; the others are api_error, 500."""


def type_and_status(code: ErrorCode) -> tuple[str, int]:
    return _TYPES.get(code, (_API, 500))


def _error(error: StatorError) -> Json:
    return {"type": type_and_status(error.code)[0], "message": error.message}


def _error_body(error: StatorError, request_id: str) -> bytes:
    return _encode({"type": "error", "error": _error(error), "request_id": request_id})


ANTHROPIC_ERRORS = ErrorForm(lambda error: type_and_status(error.code)[1], _error_body, b"request-id")


@dataclass(frozen=True, slots=True)
class AnthropicAsked:
    translated: Translated
    counts: bool

    @property
    def body(self) -> msgspec.Struct:
        return self.translated.body

    @property
    def request(self) -> ChatCompletionRequest:
        return self.translated.request

    @property
    def streams(self) -> bool:
        return bool(self.request.stream)

    @property
    def num_choices(self) -> int:
        return 1

    @property
    def may_be_empty(self) -> bool:
        return self.counts

    def named(self, error: StatorError) -> StatorError:
        return self.translated.named(error)

    @property
    def _hides_thoughts(self) -> bool:
        thinking = self.translated.body.thinking
        return isinstance(thinking, api.ThinkingEnabled | api.ThinkingAdaptive) and thinking.display == "omitted"

    def stream_encoder(self, call_id: str, created: int, first: CompletionDelta) -> StreamEncoder:
        return MessageEvents(call_id, self.request.model, first, hides_thoughts=self._hides_thoughts)

    def whole_encoder(self, call_id: str, created: int, first: CompletionDelta) -> WholeEncoder:
        if self.counts:
            return TokenCount()
        return WholeMessage(call_id, self.request.model, hides_thoughts=self._hides_thoughts)


@dataclass(frozen=True, slots=True)
class AnthropicDialect:
    """label and endpoint: as for any Dialect."""

    label: str
    endpoint: str
    generates: bool
    errors: ErrorForm = ANTHROPIC_ERRORS

    def decode(self, body: bytes) -> AnthropicAsked:
        decode = decode_messages if self.generates else decode_count_tokens
        return AnthropicAsked(decode(body), counts=not self.generates)


MESSAGES_DIALECT = AnthropicDialect(MESSAGES, "chat", generates=True)
COUNT_TOKENS_DIALECT = AnthropicDialect(COUNT_TOKENS, COUNT_TOKENS, generates=False)
