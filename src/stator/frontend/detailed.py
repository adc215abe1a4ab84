"""Answers that say more than the text of one choice: several choices, probabilities, token ids, the prompt. Pure.

`encoding` makes the others, which are nearly all, and is quicker. The forms are OpenAI's; prompt_logprobs, token_ids
and prompt_token_ids stand where vLLM puts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from stator.core.output_delta import CallCollector
from stator.frontend.decode import CHAT
from stator.frontend.encoding import OpenAIEvents
from stator.messages.openai import ChatAnswer, ChatCompletionRequest, CompletionRequest, Usage
from stator.messages.processor import Alternative, CompletionDelta, PromptDetails, ScoredToken
from stator.messages.tools import ToolCallDelta

_encode = msgspec.json.Encoder().encode

Json = dict[str, Any]


def num_choices(request: ChatCompletionRequest | CompletionRequest) -> int:
    n = request.n or 1
    if isinstance(request, CompletionRequest):
        prompt = request.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return n * len(prompt)
    return n


@dataclass(frozen=True, slots=True)
class _Head:
    """What all chunks of an answer begin with, or a whole one."""

    chat: bool
    call_id: str
    model: str
    created: int

    def fields(self, *, chunk: bool) -> Json:
        name = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.call_id}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }


class DetailedEncoder(OpenAIEvents):
    """Server-sent events of one stream; used as `ChunkEncoder` is. A choice's chunks are in order, and those of several
    choices mixed. continuous_usage: every chunk has the usage so far."""

    def __init__(
        self,
        endpoint: str,
        call_id: str,
        request: ChatCompletionRequest | CompletionRequest,
        created: int,
    ) -> None:
        options = request.stream_options
        self._head = _Head(endpoint == CHAT, call_id, request.model, created)
        self._include_usage = options is not None and options.include_usage
        self._continuous_usage = self._include_usage and options is not None and options.continuous_usage_stats
        self._num_open = num_choices(request)
        self._begun: set[int] = set()

    def opening(self) -> bytes:
        """Nothing: each choice opens with its own first delta."""
        return b""

    def encode(self, deltas: Sequence[CompletionDelta]) -> bytes:
        return b"".join([self._encode(delta) for delta in deltas])

    def _encode(self, delta: CompletionDelta) -> bytes:
        events: list[bytes] = []
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            self._open(delta, events)
        tokens = delta.tokens
        if delta.reasoning or delta.tool_calls:
            events += self._parts(delta)
        if delta.text or (tokens is not None and (tokens.ids or tokens.scores)):
            fields: Json = {}
            if tokens is not None and tokens.ids is not None:
                fields["token_ids"] = tokens.ids
            scores = None if tokens is None else tokens.scores
            events.append(self._chunk(delta, self._body(delta.text), scores, None, fields))
        if delta.ending is not None:
            body: Json = {"delta": {}} if self._head.chat else {"text": ""}
            events.append(self._chunk(delta, body, None, delta.ending.value, {}))
            self._num_open -= 1
            if not self._num_open and self._include_usage:
                events.append(_event({**self._head.fields(chunk=True), "choices": [], "usage": delta.usage}))
        return b"".join(events)

    def _open(self, delta: CompletionDelta, events: list[bytes]) -> None:
        """The role, for chat; the prompt, as far as it is shown."""
        told = delta.prompt or PromptDetails()
        ids: Json = {} if told.ids is None else {"prompt_token_ids": told.ids}
        if self._head.chat:
            body: Json = {"delta": {"role": "assistant", "content": ""}}
            events.append(self._chunk(delta, body, None, None, {}, ids))
        elif told.text is not None or ids:
            events.append(self._chunk(delta, {"text": told.text or ""}, told.scores, None, ids))

    def _parts(self, delta: CompletionDelta) -> list[bytes]:
        """What a chat's delta has beside text: first what the model thought, then what it calls."""
        bodies: list[Json] = []
        if delta.reasoning:
            bodies.append(reasoning_fields(delta.reasoning))
        if delta.tool_calls:
            bodies.append({"tool_calls": [_call_piece(piece) for piece in delta.tool_calls]})
        return [self._chunk(delta, {"delta": body}, None, None, {}) for body in bodies]

    def _body(self, text: str) -> Json:
        return {"delta": {"content": text}} if self._head.chat else {"text": text}

    def _chunk(
        self,
        delta: CompletionDelta,
        body: Json,
        scores: Sequence[ScoredToken] | None,
        finish_reason: str | None,
        fields: Json,
        of_chunk: Json | None = None,
    ) -> bytes:
        logprobs = None if scores is None else _logprobs(self._head.chat, scores)
        choice = {"index": delta.choice, **body, "logprobs": logprobs, "finish_reason": finish_reason, **fields}
        chunk: Json = {**self._head.fields(chunk=True), "choices": [choice], **(of_chunk or {})}
        if self._include_usage:
            chunk["usage"] = delta.usage if self._continuous_usage else None
        return _event(chunk)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list[str])
    ids: list[int] | None = None
    scores: list[ScoredToken] | None = None
    prompt: PromptDetails = field(default_factory=PromptDetails)
    finish_reason: str | None = None
    reasoning: list[str] = field(default_factory=list[str])
    calls: CallCollector = field(default_factory=CallCollector)

    def add(self, delta: CompletionDelta) -> None:
        self.text.append(delta.text)
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
        if delta.tool_calls:
            self.calls.add(delta.tool_calls)
        if delta.prompt is not None:
            self.prompt = delta.prompt
        if delta.tokens is not None:
            if delta.tokens.ids is not None:
                self.ids = (self.ids or []) + delta.tokens.ids
            if delta.tokens.scores is not None:
                self.scores = (self.scores or []) + delta.tokens.scores
        if delta.ending is not None:
            self.finish_reason = delta.ending.value


class DetailedAnswer:
    """Collects the deltas of an answer that is not streamed."""

    def __init__(
        self, endpoint: str, call_id: str, request: ChatCompletionRequest | CompletionRequest, created: int
    ) -> None:
        self._head = _Head(endpoint == CHAT, call_id, request.model, created)
        self._wants_prompt_scores = request.prompt_logprobs is not None
        self._choices = [_Choice() for _ in range(num_choices(request))]

    def add(self, deltas: Sequence[CompletionDelta]) -> None:
        for delta in deltas:
            self._choices[delta.choice].add(delta)

    def encode(self, usage: Usage) -> bytes:
        body = self._head.fields(chunk=False)
        body["choices"] = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        body["usage"] = usage
        if self._head.chat:
            body |= self._of_prompt(self._choices[0].prompt)
        return _encode(body)

    def _choice(self, index: int, choice: _Choice) -> Json:
        text = "".join(choice.text)
        scores = choice.scores
        if choice.prompt.text is not None:
            text = choice.prompt.text + text
            if choice.prompt.scores is not None:
                scores = choice.prompt.scores + (scores or [])
        body: Json = {"message": _message(text, choice)} if self._head.chat else {"text": text}
        logprobs = None if scores is None else _logprobs(self._head.chat, scores)
        made: Json = {"index": index, **body, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        if choice.ids is not None:
            made["token_ids"] = choice.ids
        if not self._head.chat:
            made |= self._of_prompt(choice.prompt)
        return made

    def _of_prompt(self, prompt: PromptDetails) -> Json:
        made: Json = {}
        if prompt.ids is not None:
            made["prompt_token_ids"] = prompt.ids
        if prompt.scores is not None and self._wants_prompt_scores:
            made["prompt_logprobs"] = [_by_id(scored) for scored in prompt.scores]
        return made


def _message(text: str, choice: _Choice) -> ChatAnswer | Json:
    calls = choice.calls.calls()
    if not calls and not choice.reasoning:
        return ChatAnswer(text)
    message: Json = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if choice.reasoning:
        message |= reasoning_fields("".join(choice.reasoning))
    if calls:
        message["tool_calls"] = calls
    return message


def reasoning_fields(text: str) -> Json:
    """Under the name that most clients read, and the newer one."""
    return {"reasoning_content": text, "reasoning": text}


def _call_piece(piece: ToolCallDelta) -> Json:
    function: Json = {"arguments": piece.arguments}
    if piece.name is None:
        return {"index": piece.index, "function": function}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name, **function}}


def _event(body: Json) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


def _logprobs(chat: bool, scores: Sequence[ScoredToken]) -> Json:
    if chat:
        content = [
            {**_entry(scored.token), "top_logprobs": [_entry(other) for other in scored.top]} for scored in scores
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [scored.token.text for scored in scores],
        "token_logprobs": [scored.token.logprob for scored in scores],
        "top_logprobs": [_by_text(scored) for scored in scores],
        "text_offset": [scored.offset for scored in scores],
    }


def _entry(token: Alternative) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}


def _by_text(scored: ScoredToken) -> dict[str, float] | None:
    """The likeliest and, if it is not among them, the one that came. Of tokens that look alike the likelier."""
    if scored.token.logprob is None:
        return None
    found: dict[str, float] = {}
    for other in (*scored.top, scored.token):
        if other.logprob is not None:
            found.setdefault(other.text, other.logprob)
    return found


def _by_id(scored: ScoredToken) -> dict[int, Json] | None:
    if scored.token.logprob is None:
        return None
    return {
        other.token_id: {"logprob": other.logprob, "rank": other.rank, "decoded_token": other.text}
        for other in (scored.token, *scored.top)
    }
