"""A Processor's deltas as a response: its object, and the typed events of its stream. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from stator.errors import Ending, ErrorCode, Fault, StatorError
from stator.frontend.responses_request import ItemIds, output_text
from stator.messages.openai import Usage
from stator.messages.processor import Alternative, CompletionDelta, ScoredToken
from stator.messages.responses import Json, ResponsesRequest
from stator.messages.tools import ToolCallDelta

_encode = msgspec.json.Encoder().encode

Emit = Callable[[str, Json], None]
"""Takes an event's type and its fields."""


@dataclass(slots=True)
class _Open:
    """The item that is being written. number: which of the calls, for one."""

    item: Json
    index: int
    number: int = -1
    text: list[str] = field(default_factory=list[str])
    logprobs: list[Json] = field(default_factory=list[Json])
    place: Json = field(init=False)
    place_of_part: Json = field(init=False)

    def __post_init__(self) -> None:
        self.place = {"item_id": self.item["id"], "output_index": self.index}
        self.place_of_part = {**self.place, "content_index": 0}

    def part(self, text: str) -> Json:
        if self.item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {**output_text(text), "logprobs": self.logprobs}

    def so_far(self, status: str) -> Json:
        text = "".join(self.text)
        content = {"arguments": text} if self.item["type"] == "function_call" else {"content": [self.part(text)]}
        return {**self.item, **content, "status": status}


_TEXT_EVENTS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}
_DELTA_EVENTS = {kind: f"{event}.delta" for kind, event in _TEXT_EVENTS.items()}


class OutputItems:
    """Output items, as they come: one is written at a time, and is done when another begins.

    emit: gets the events of the items. reasoning_tokens: that came while reasoning was written.
    """

    def __init__(self, ids: ItemIds, emit: Emit) -> None:
        self._ids = ids
        self._emit = emit
        self._done: list[Json] = []
        self._open: _Open | None = None
        self._scores: list[ScoredToken] = []
        self.reasoning_tokens = 0

    def add(self, delta: CompletionDelta) -> None:
        if delta.tokens is not None and delta.tokens.scores is not None:
            self._scores += delta.tokens.scores
        if delta.reasoning:
            self._add_text("reasoning", delta.reasoning)
            self._scores.clear()
        if delta.text:
            self._add_text("message", delta.text)
        for piece in delta.tool_calls:
            self._add_to_call(piece)
        if self.is_reasoning:
            self.reasoning_tokens += delta.num_tokens

    @property
    def is_reasoning(self) -> bool:
        return self._open is not None and self._open.item["type"] == "reasoning"

    def so_far(self) -> list[Json]:
        """Of an answer that broke off."""
        return self._done if self._open is None else [*self._done, self._open.so_far("incomplete")]

    def finish(self, ending: Ending) -> list[Json]:
        """All items. An answer with no content at all is an empty message."""
        if self._open is None and not self._done:
            self._begin("message")
        self._close("incomplete" if ending is Ending.LENGTH else "completed")
        return self._done

    def _add_text(self, kind: str, text: str) -> None:
        open = self._open
        if open is None or open.item["type"] != kind:
            open = self._begin(kind)
        open.text.append(text)
        fields: Json = {**open.place_of_part, "delta": text}
        if kind == "message":
            fields["logprobs"] = []
            if self._scores:
                fields["logprobs"] = [_logprob(scored) for scored in self._scores]
                open.logprobs += fields["logprobs"]
                self._scores.clear()
        self._emit(_DELTA_EVENTS[kind], fields)

    def _add_to_call(self, piece: ToolCallDelta) -> None:
        open = self._open
        if open is None or open.number != piece.index:
            self._close("completed")
            item: Json = {
                "type": "function_call",
                "id": self._ids.item("fc"),
                "call_id": piece.id or "",
                "name": piece.name or "",
                "arguments": "",
                "status": "in_progress",
            }
            open = self._added(item, piece.index)
        if piece.arguments:
            open.text.append(piece.arguments)
            self._emit("response.function_call_arguments.delta", {**open.place, "delta": piece.arguments})

    def _begin(self, kind: str) -> _Open:
        self._close("completed")
        if kind == "message":
            item: Json = {"type": "message", "id": self._ids.item("msg"), "role": "assistant"}
        else:
            item = {"type": "reasoning", "id": self._ids.item("rs"), "summary": []}
        open = self._added({**item, "content": [], "status": "in_progress"})
        self._emit("response.content_part.added", {**open.place_of_part, "part": open.part("")})
        return open

    def _added(self, item: Json, number: int = -1) -> _Open:
        self._open = _Open(item, len(self._done), number)
        self._emit("response.output_item.added", {"output_index": self._open.index, "item": item})
        return self._open

    def _close(self, status: str) -> None:
        open = self._open
        if open is None:
            return
        self._open = None
        text = "".join(open.text)
        kind = open.item["type"]
        if kind == "function_call":
            self._emit("response.function_call_arguments.done", {**open.place, "arguments": text})
        else:
            more: Json = {"logprobs": open.logprobs} if kind == "message" else {}
            self._emit(f"{_TEXT_EVENTS[kind]}.done", {**open.place_of_part, "text": text, **more})
            self._emit("response.content_part.done", {**open.place_of_part, "part": open.part(text)})
        item = open.so_far(status)
        self._done.append(item)
        self._emit("response.output_item.done", {"output_index": open.index, "item": item})


def _logprob(scored: ScoredToken) -> Json:
    return {**_entry(scored.token), "top_logprobs": [_entry(other) for other in scored.top]}


def _entry(token: Alternative) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}


class ResponseForm:
    """The Response object of one request. created: Unix seconds."""

    def __init__(self, response_id: str, request: ResponsesRequest, created: int) -> None:
        reasoning, text = request.reasoning, request.text
        format = None if text is None else text.format
        self._head: Json = {"id": response_id, "object": "response", "created_at": created}
        self._rest: Json = {
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": request.model,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": request.temperature,
            "text": {"format": format or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": [_shown_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "user": request.user,
        }

    def make(
        self,
        status: str,
        output: Sequence[Json] = (),
        *,
        usage: Json | None = None,
        error: Json | None = None,
        completed_at: int | None = None,
    ) -> Json:
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "completed_at": completed_at,
            "error": error,
            "incomplete_details": reason,
            "output": output,
            "usage": usage,
            **self._rest,
        }


def _shown_tool(tool: Json) -> Json:
    return {"parameters": None, "strict": None, **tool}


def _usage(usage: Usage, reasoning_tokens: int) -> Json:
    """Which tokens are new in a cache is not known here."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": min(reasoning_tokens, usage.completion_tokens)},
        "total_tokens": usage.total_tokens,
    }


Finished = Callable[[Json], None]
"""Gets the Response object of an answer that ended well, before the client does."""


class _Answer:
    """What both kinds of answer are made from. now: Unix seconds."""

    def __init__(self, form: ResponseForm, ids: ItemIds, emit: Emit, now: Callable[[], float]) -> None:
        self._form = form
        self._now = now
        self._items = OutputItems(ids, emit)
        self._last = CompletionDelta()

    def _add(self, deltas: Sequence[CompletionDelta]) -> None:
        for delta in deltas if self._items.is_reasoning else _joined(deltas):
            self._items.add(delta)
        self._last = deltas[-1]

    def _finish(self) -> Json:
        last = self._last
        assert last.ending is not None and last.usage is not None
        output = self._items.finish(last.ending)
        usage = _usage(last.usage, self._items.reasoning_tokens)
        if last.ending is Ending.LENGTH:
            return self._form.make("incomplete", output, usage=usage)
        return self._form.make("completed", output, usage=usage, completed_at=int(self._now()))


def _joined(deltas: Sequence[CompletionDelta]) -> Sequence[CompletionDelta]:
    """Texts that wait together are one: an event costs everybody on its way more than a token does."""
    if len(deltas) == 1 or any(delta.reasoning or delta.tool_calls or delta.tokens is not None for delta in deltas):
        return deltas
    text = "".join([delta.text for delta in deltas])
    return [CompletionDelta(text, num_tokens=sum([delta.num_tokens for delta in deltas]))]


class ResponseStream(_Answer):
    """A StreamEncoder. The stream has no [DONE]: its last event is response.completed, .incomplete or .failed."""

    def __init__(self, form: ResponseForm, ids: ItemIds, now: Callable[[], float], finished: Finished) -> None:
        super().__init__(form, ids, self._emit, now)
        self._finished = finished
        self._events: list[bytes] = []
        self._number = 0

    def _emit(self, kind: str, fields: Json) -> None:
        event = _encode({"type": kind, **fields, "sequence_number": self._number})
        self._number += 1
        self._events += (b"event: ", kind.encode("ascii"), b"\ndata: ", event, b"\n\n")

    def _taken(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)

    def opening(self) -> bytes:
        response = self._form.make("in_progress")
        self._emit("response.created", {"response": response})
        self._emit("response.in_progress", {"response": response})
        return self._taken()

    def encode(self, deltas: Sequence[CompletionDelta]) -> bytes:
        self._add(deltas)
        return self._taken()

    def closing(self) -> bytes:
        response = self._finish()
        self._finished(response)
        self._emit(f"response.{response['status']}", {"response": response})
        return self._taken()

    def failure(self, error: StatorError) -> bytes:
        told: Json = {"code": _error_code(error), "message": error.message}
        response = self._form.make("failed", self._items.so_far(), error=told)
        self._emit("response.failed", {"response": response})
        return self._taken()


def _error_code(error: StatorError) -> str:
    """OpenAI's words for it, which are few."""
    if error.code is ErrorCode.OVERLOADED:
        return "rate_limit_exceeded"
    return "invalid_prompt" if error.info.status == 400 and error.info.fault is Fault.CALLER else "server_error"


class WholeResponse(_Answer):
    """A WholeEncoder."""

    def __init__(self, form: ResponseForm, ids: ItemIds, now: Callable[[], float], finished: Finished) -> None:
        super().__init__(form, ids, _nothing, now)
        self._finished = finished

    def add(self, deltas: Sequence[CompletionDelta]) -> None:
        self._add(deltas)

    def encode(self, usage: Usage) -> bytes:
        response = self._finish()
        self._finished(response)
        return _encode(response)


def _nothing(kind: str, fields: Json) -> Any:
    pass
