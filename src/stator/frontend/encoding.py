"""Answers in OpenAI's form. Pure.

A streamed chunk differs from the next in one string, so that everything around it is encoded once per request.
"""

from collections.abc import Sequence

import msgspec

from stator.errors import StatorError
from stator.frontend.decode import CHAT
from stator.frontend.http import error_event
from stator.messages.openai import ChatAnswer, ChatChoice, ChatCompletion, TextChoice, TextCompletion, Usage
from stator.messages.processor import CompletionDelta

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class OpenAIEvents:
    """How OpenAI's streams end."""

    __slots__ = ()

    def closing(self) -> bytes:
        return DONE

    def failure(self, error: StatorError) -> bytes:
        return error_event(error)


class ChunkEncoder(OpenAIEvents):
    """Server-sent events of one stream. With include_usage every chunk but the last carries `"usage": null`."""

    __slots__ = ("_after_choices", "_before_choices", "_chat", "_include_usage", "_text_end", "_text_start")

    def __init__(self, endpoint: str, call_id: str, model: str, created: int, *, include_usage: bool) -> None:
        self._chat = endpoint == CHAT
        self._include_usage = include_usage
        kind, name = (b"chatcmpl-", b"chat.completion.chunk") if self._chat else (b"cmpl-", b"text_completion")
        self._before_choices = b'data: {"id":"%s%s","object":"%s","created":%d,"model":%s,"choices":[' % (
            kind,
            call_id.encode("ascii"),
            name,
            created,
            _encode(model),
        )
        usage = b',"usage":null' if include_usage else b""
        self._after_choices = b"]" + usage + b"}\n\n"
        opening, closing = (b'"delta":{"content":', b"}") if self._chat else (b'"text":', b"")
        self._text_start = self._before_choices + b'{"index":0,' + opening
        self._text_end = closing + b',"logprobs":null,"finish_reason":null}' + self._after_choices

    def opening(self) -> bytes:
        """What goes before the first text: the role, for chat."""
        if not self._chat:
            return b""
        return self._choice(b'"delta":{"role":"assistant","content":""}', b"null")

    def encode(self, deltas: Sequence[CompletionDelta]) -> bytes:
        """A chunk for the text of all, then one for the finish reason, then one for the usage, as far as they are
        there. Texts that wait together go out together: a chunk costs everybody on its way more than a token does."""
        last = deltas[-1]
        text = last.text if len(deltas) == 1 else "".join([delta.text for delta in deltas])
        events = self._text_start + _encode(text) + self._text_end if text else b""
        return events if last.ending is None else events + self._last(last)

    def _last(self, delta: CompletionDelta) -> bytes:
        assert delta.ending is not None
        body = b'"delta":{}' if self._chat else b'"text":""'
        events = self._choice(body, _encode(delta.ending.value))
        if self._include_usage and delta.usage is not None:
            events += b"".join((self._before_choices, b'],"usage":', _encode(delta.usage), b"}\n\n"))
        return events

    def _choice(self, body: bytes, finish_reason: bytes) -> bytes:
        return b"".join(
            (
                self._before_choices,
                b'{"index":0,',
                body,
                b',"logprobs":null,"finish_reason":',
                finish_reason,
                b"}",
                self._after_choices,
            )
        )


def encode_whole(
    endpoint: str, call_id: str, model: str, created: int, texts: Sequence[str], finish_reason: str, usage: Usage
) -> bytes:
    """The body of an answer that is not streamed."""
    text = "".join(texts)
    if endpoint == CHAT:
        choice = ChatChoice(message=ChatAnswer(text), finish_reason=finish_reason)
        return _encode(ChatCompletion(f"chatcmpl-{call_id}", created, model, [choice], usage))
    return _encode(TextCompletion(f"cmpl-{call_id}", created, model, [TextChoice(text, finish_reason)], usage))
