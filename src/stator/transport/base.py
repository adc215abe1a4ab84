"""The transport seam: how one instance calls an endpoint of another.

Streams are pushed. `TransportClient.open(target, request, sink)` returns a handle at once; the sink then gets lists
of items and one ending. There are no tasks and no `await` between the socket and the sink: that decides the cost of a
streamed token. `stator.transport.calls` has `async for` and single-answer conveniences on top.

Three carriers (in process, Unix socket, TCP) have one semantics, and one contract suite
(`stator.testing.contracts.transport`) runs on all of them:

- A sink's `end` is called exactly once, after every `items`; nothing is called after it. Both are called on the
  event loop and never from inside `open`.
- Items arrive in the order sent. None is lost before a normal end: `end(None)` means that all were delivered.
- A deadline in the context ends the stream on both sides with ErrorCode.DEADLINE.
- Cancelling the handle ends the sink with CANCELLED soon and, wherever the handler is, tells it (`Call.on_cancel`).
- A lost connection, or a peer that is silent for longer than the heartbeat bound, ends each of its streams with
  INSTANCE_LOST on the client and with cancellation on the server.
- A `StatorError` raised or ended with by a handler arrives as the same code, message, param and retry_after_s.
  Any other exception arrives as INTERNAL without its text, and is logged where it happened.
- Flow control is per stream. A sender never blocks: `Call.items` buffers, `Call.writable` waits for room, and a
  stream whose buffer passes its bound ends with SLOW_READER. A stream that nobody reads does not delay another.
- Requests and items are frozen msgspec structs (or builtins), at most `max_frame_bytes` encoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from stator.errors import StatorError
from stator.ids import InstanceId
from stator.runtime.context import CallContext

if TYPE_CHECKING:
    from stator.transport.settings import Identity


class Sink(Protocol):
    """Where a stream goes. Implementations return quickly and do not raise; what they raise is logged and cancels."""

    def items(self, items: Sequence[Any], /) -> None: ...

    def end(self, error: StatorError | None = None, /) -> None: ...


class Lane(StrEnum):
    """Streams of different lanes never share a connection: KV bulk must not delay tokens and heartbeats."""

    CALLS = "calls"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Target:
    """addresses: tried in order. instance_id: if set, a server that is another instance is refused (STALE_INSTANCE)."""

    addresses: tuple[str, ...]
    endpoint: str
    instance_id: InstanceId | None = None
    lane: Lane = Lane.CALLS


class StreamHandle(Protocol):
    def cancel(self) -> None:
        """The client wants no more. Idempotent; after it the sink gets no items, only its one `end` (CANCELLED)."""
        ...

    def pause(self) -> None:
        """Stop delivering items; at most one window of them is then buffered here, the rest at the sender."""
        ...

    def resume(self) -> None: ...


class TransportClient(Protocol):
    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        """Call an endpoint. Never raises and never waits: failures to connect arrive at the sink too.

        item_type: what items are decoded to. Connections are made on demand, shared per (address, lane), and closed
        when idle.
        """
        ...

    async def close(self) -> None:
        """End every open stream with CANCELLED and close every connection."""
        ...


class Call(Sink, Protocol):
    """The server's side of one stream, handed to the endpoint's handler; it is the sink that the handler fills."""

    request: Any
    context: CallContext

    @property
    def cancelled(self) -> bool: ...

    def on_cancel(self, callback: Callable[[], None], /) -> None:
        """Run callback once if the call ends before `end`: cancel, deadline, lost peer, overrun. Runs at once if that
        has happened already. Replaces an earlier callback."""
        ...

    async def writable(self) -> None:
        """Wait until nothing is buffered for this stream. Raises StatorError(CANCELLED) once it was cancelled."""
        ...


Handler = Callable[[Call], None]
"""Takes the call and returns at once; later, from the event loop, pushes items and one end into it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """request_type: what the request is decoded to; one that does not decode is refused with PROTOCOL."""

    name: str
    request_type: Any
    handler: Handler


class TransportServer(Protocol):
    @property
    def identity(self) -> "Identity":
        """As it was made; the instance may have another id by now."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where peers reach this server, best first; valid after start."""
        ...

    def register(self, endpoint: Endpoint) -> None:
        """Raises ValueError if the name is taken. May be called before and after start."""
        ...

    async def start(self) -> None: ...

    def mute(self) -> None:
        """Send nothing more to other processes, not even what is ready. May be called from a signal handler; calls
        are cancelled soon after. `close` is still to come."""
        ...

    async def close(self) -> None:
        """Stop listening, cancel every call, flush what was ended, close every connection."""
        ...
