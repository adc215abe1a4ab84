"""OpenAI's chat and text completions as `Dialect`s. A request that asks for the text of one choice, as nearly all do,
gets the encoders that make just that."""

from collections.abc import Sequence
from dataclasses import dataclass

from stator.errors import StatorError
from stator.frontend.decode import CHAT, COMPLETIONS, decode_request
from stator.frontend.detailed import DetailedAnswer, DetailedEncoder, num_choices
from stator.frontend.dialect import Request, StreamEncoder, WholeEncoder
from stator.frontend.encoding import ChunkEncoder, encode_whole
from stator.frontend.http import OPENAI_ERRORS, ErrorForm
from stator.messages.openai import Usage, is_plain, shows_prompt_only
from stator.messages.processor import CompletionDelta


@dataclass(frozen=True, slots=True)
class OpenAIAsked:
    endpoint: str
    request: Request

    @property
    def body(self) -> Request:
        return self.request

    @property
    def streams(self) -> bool:
        return bool(self.request.stream)

    @property
    def num_choices(self) -> int:
        return num_choices(self.request)

    @property
    def may_be_empty(self) -> bool:
        return shows_prompt_only(self.request)

    def named(self, error: StatorError) -> StatorError:
        return error

    def stream_encoder(self, call_id: str, created: int, first: CompletionDelta) -> StreamEncoder:
        request = self.request
        if first.parsed or not is_plain(request):
            return DetailedEncoder(self.endpoint, call_id, request, created)
        options = request.stream_options
        usage = options is not None and options.include_usage
        return ChunkEncoder(self.endpoint, call_id, request.model, created, include_usage=usage)

    def whole_encoder(self, call_id: str, created: int, first: CompletionDelta) -> WholeEncoder:
        request = self.request
        if first.parsed or not is_plain(request):
            return DetailedAnswer(self.endpoint, call_id, request, created)
        return _PlainAnswer(self.endpoint, call_id, request.model, created)


class _PlainAnswer:
    __slots__ = ("_head", "_last", "_texts")

    def __init__(self, endpoint: str, call_id: str, model: str, created: int) -> None:
        self._head = (endpoint, call_id, model, created)
        self._texts: list[str] = []
        self._last = CompletionDelta()

    def add(self, deltas: Sequence[CompletionDelta]) -> None:
        self._texts += [delta.text for delta in deltas]
        self._last = deltas[-1]

    def encode(self, usage: Usage) -> bytes:
        assert self._last.ending is not None
        return encode_whole(*self._head, self._texts, self._last.ending.value, usage)


@dataclass(frozen=True, slots=True)
class OpenAIDialect:
    endpoint: str
    errors: ErrorForm = OPENAI_ERRORS
    generates: bool = True

    @property
    def label(self) -> str:
        return self.endpoint

    def decode(self, body: bytes) -> OpenAIAsked:
        return OpenAIAsked(self.endpoint, decode_request(self.endpoint, body))


CHAT_DIALECT = OpenAIDialect(CHAT)
COMPLETIONS_DIALECT = OpenAIDialect(COMPLETIONS)
