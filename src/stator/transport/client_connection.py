"""The caller's end of a socket connection."""

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from stator.errors import DECODE_ERRORS, ErrorCode, StatorError
from stator.messages.control import Cancel, Challenge, Credit, Data, Frame, GoAway, Open, Proof, Welcome
from stator.transport import handshake
from stator.transport.base import Lane, Target
from stator.transport.client_stream import ClientStream
from stator.transport.connection import Connection, TransportStats, cannot_carry
from stator.transport.encoding import ENCODE_ERRORS, FrameTooLong, encode_request
from stator.transport.refusals import too_many_streams
from stator.transport.server_call import deadline_passed
from stator.transport.settings import Identity, TransportSettings
from stator.transport.tls import TlsSession

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=256)
def _items_decoder(item_type: Any) -> msgspec.msgpack.Decoder[list[Any]]:
    return msgspec.msgpack.Decoder(list[item_type])


class ClientConnection(Connection):
    """Implements StreamLink. `connected` is done when the handshake is, or carries the StatorError that ended it."""

    def __init__(
        self,
        identity: Identity,
        lane: Lane,
        settings: TransportSettings,
        stats: TransportStats,
        *,
        nonce: bytes,
        address: str,
        on_unusable: Callable[["ClientConnection"], None],
        tls: TlsSession | None = None,
    ) -> None:
        super().__init__(settings, stats, lane)
        self.tls = tls
        self.address = address
        self.usable = False
        self.connected: asyncio.Future[None] = self._loop.create_future()
        self._identity = identity
        self._lane = lane
        self._hello = handshake.hello(identity, lane, nonce, self.limit)
        self._challenge: Challenge | None = None
        self._on_unusable = on_unusable
        self._streams: dict[int, tuple[ClientStream, msgspec.msgpack.Decoder[list[Any]]]] = {}
        self._next_stream_id = 0
        self._idle_since: float | None = None

    @property
    def instance_id(self) -> str | None:
        """Of the server; None before its challenge came."""
        return None if self._challenge is None else self._challenge.instance_id

    def open(self, stream: ClientStream, target: Target, request: Any) -> None:
        """Begin a stream; what cannot be sent ends it."""
        try:
            self._open(stream, target, request)
        except StatorError as error:
            stream.break_soon(error)

    # Connection.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.peer = self.address
        self.send(self._hello)

    def handshake_frame(self, frame: memoryview) -> None:
        message = handshake.decode(frame)
        token = self._identity.token
        if isinstance(message, Challenge) and self._challenge is None:
            handshake.check_challenge(self._identity, message)
            if not token:
                raise handshake.missing_token()
            self._challenge = message
            self.send(Proof(handshake.proof(token, handshake.CALLER, self._hello, message)))
        elif isinstance(message, Welcome) and self._challenge is not None and token:
            if not handshake.proved(message.mac, token, handshake.SERVER, self._hello, self._challenge):
                raise handshake.wrong_token_of_server()
            self.set_ready(self._challenge.max_frame_bytes)
            self.usable = True
            if not self.connected.done():
                self.connected.set_result(None)
        else:
            raise StatorError(ErrorCode.PROTOCOL, f"{self.peer} answered the hello with {type(message).__name__}")

    def frame(self, frame: Frame) -> None:
        match frame:
            case Data():
                self._fan_out(frame)
            case GoAway():
                self._unusable()
                if frame.error is not None:
                    raise frame.error.to_error()
            case _:
                raise StatorError(ErrorCode.PROTOCOL, f"a server does not send {type(frame).__name__} frames")

    def lost(self, error: StatorError) -> None:
        self._unusable()
        if not self.connected.done():
            self.connected.set_exception(error)
            # Whoever waits raises it; with nobody waiting any more there is nothing to report.
            self.connected.exception()
        for stream, _ in list(self._streams.values()):
            stream.lose(error)

    def idle(self, now: float) -> None:
        if self._streams:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= self.settings.idle_close_s or not self.usable:
            self.close(StatorError(ErrorCode.CANCELLED, "the connection was idle"))

    # StreamLink.

    def send_cancel(self, stream: ClientStream) -> None:
        self.send(Cancel(stream.stream_id))

    def send_credit(self, stream: ClientStream, num_items: int) -> None:
        self.send(Credit(stream.stream_id, num_items))

    def release(self, stream: ClientStream) -> None:
        self._streams.pop(stream.stream_id, None)

    # Inside.

    def _fan_out(self, frame: Data) -> None:
        streams = self._streams
        for entry in frame.entries:
            found = streams.get(entry.stream_id)
            if found is None:
                continue
            stream, decoder = found
            try:
                items = decoder.decode(entry.items)
            except DECODE_ERRORS as error:
                stream.break_soon(
                    StatorError(ErrorCode.PROTOCOL, f"an item of {stream.endpoint} is not what was expected: {error}")
                )
                continue
            if items:
                stream.deliver(items)
            if entry.ended:
                stream.finish(None if entry.error is None else entry.error.to_error())

    def _open(self, stream: ClientStream, target: Target, request: Any) -> None:
        """Raises StatorError for a stream that cannot be opened."""
        if self.is_closed:
            # Lost between its handshake and this stream, which came too late to be ended with the others.
            raise StatorError(ErrorCode.INSTANCE_LOST, f"the connection to {self.peer} was lost")
        if len(self._streams) >= self.settings.max_streams:
            raise too_many_streams(self.settings.max_streams)
        if self.write_backlog > self.settings.max_write_buffer_bytes:
            raise StatorError(ErrorCode.OVERLOADED, f"{self.peer} does not read its requests; try again later")
        try:
            decoder = _items_decoder(stream.item_type)
        except TypeError as error:
            raise StatorError(ErrorCode.INTERNAL, f"the item type of {target.endpoint} is unusable: {error}") from error
        encoded = encode_request(target.endpoint, request, self.limit)
        left = stream.context.seconds_left(self._loop.time())
        if left is not None and left <= 0:
            raise deadline_passed(target.endpoint)
        self._next_stream_id += 1
        frame = Open(
            self._next_stream_id,
            target.endpoint,
            msgspec.Raw(encoded),
            stream.window,
            stream.context.request_id,
            None if left is None else left * 1000,
            target.instance_id,
            stream.context.headers,
        )
        try:
            self.send(frame)
        except (FrameTooLong, *ENCODE_ERRORS) as error:
            raise cannot_carry(target.endpoint, "the request", error) from error
        self._streams[self._next_stream_id] = (stream, decoder)
        stream.attach(self, self._next_stream_id)

    def _unusable(self) -> None:
        self.usable = False
        self._on_unusable(self)
