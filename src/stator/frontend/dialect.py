"""The seam between the life of a request, which `generate` owns, and how an API writes requests and answers.

An API is a `Dialect`: it turns a body into a request to the Processor and the Processor's deltas into bytes. Nothing
here or behind it knows of HTTP, admission, deadlines or metrics; all of it is called on the event loop and does not
wait.
"""

from collections.abc import Awaitable, Sequence
from typing import Protocol

import msgspec

from stator.errors import StatorError
from stator.frontend.http import ErrorForm
from stator.messages.openai import ChatCompletionRequest, CompletionRequest, Usage
from stator.messages.processor import CompletionDelta

Request = ChatCompletionRequest | CompletionRequest
"""What Processors take."""


class StreamEncoder(Protocol):
    """Server-sent events of one answer: opening, what encode makes of each batch of deltas, then closing or failure."""

    def opening(self) -> bytes: ...

    def encode(self, deltas: Sequence[CompletionDelta], /) -> bytes:
        """deltas: at least one, in the order in which they came. May be empty."""
        ...

    def closing(self) -> bytes:
        """After the last delta of an answer that ended well."""
        ...

    def failure(self, error: StatorError, /) -> bytes:
        """The end of an answer that failed after its opening was sent."""
        ...


class WholeEncoder(Protocol):
    """Collects the deltas of an answer that is not streamed."""

    def add(self, deltas: Sequence[CompletionDelta], /) -> None: ...

    def encode(self, usage: Usage, /) -> bytes:
        """The body, once all deltas were added and the answer ended well."""
        ...


class Asked(Protocol):
    """One request, decoded.

    body: as the client wrote it; its struct declares the fields that are known. num_choices: as many deltas with an
    ending come. may_be_empty: an answer without a token is right.
    """

    @property
    def body(self) -> msgspec.Struct: ...

    @property
    def request(self) -> Request: ...

    @property
    def streams(self) -> bool: ...

    @property
    def num_choices(self) -> int: ...

    @property
    def may_be_empty(self) -> bool: ...

    def named(self, error: StatorError, /) -> StatorError:
        """An error of the Processor, with the client's own names of the fields in `request`."""
        ...

    def stream_encoder(self, call_id: str, created: int, first: CompletionDelta, /) -> StreamEncoder:
        """call_id: unique in the deployment. created: Unix seconds. first: of the deltas, not encoded yet."""
        ...

    def whole_encoder(self, call_id: str, created: int, first: CompletionDelta, /) -> WholeEncoder: ...


class Dialect(Protocol):
    """label: the endpoint's name in metrics and the access log. endpoint: the Processor's that takes its requests.

    errors: how failures are told before an answer began. generates: whether what its answers count was computed.
    """

    @property
    def label(self) -> str: ...

    @property
    def endpoint(self) -> str: ...

    @property
    def errors(self) -> ErrorForm: ...

    @property
    def generates(self) -> bool: ...

    def decode(self, body: bytes, /) -> Asked | Awaitable[Asked]:
        """Awaitable if it has to look something up elsewhere.

        Raises StatorError that names the field at fault, for whatever bytes."""
        ...
