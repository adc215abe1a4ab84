"""The server's end of a socket connection."""

import asyncio
import logging
from collections.abc import Callable

from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId
from stator.messages.control import (
    Cancel,
    Challenge,
    Credit,
    ErrorMessage,
    Frame,
    GoAway,
    Hello,
    Open,
    Proof,
    Refused,
    Welcome,
)
from stator.runtime.context import CallContext
from stator.transport import handshake
from stator.transport.base import Lane
from stator.transport.connection import ENVELOPE_BYTES, Connection, TransportStats, cannot_carry
from stator.transport.dispatch import Dispatcher
from stator.transport.encoding import append_data
from stator.transport.refusals import instance_stopped, too_many_streams
from stator.transport.server_call import Entry, ServerCall, deadline_passed
from stator.transport.settings import TransportSettings
from stator.transport.tls import (
    FIRST_BYTE,
    TlsContexts,
    caller_with_tls,
    caller_without_tls,
    told_to_caller_without_tls,
)

logger = logging.getLogger(__name__)

MAX_DEADLINE_MS = 1e9
"""Twelve days; a deadline further away is none."""


class ServerConnection(Connection):
    """Implements CallLink. token: the deployment's. new_nonce: fresh random bytes, control.NONCE_BYTES of them.

    on_made, on_proved: told when the socket is there, and when its caller has proved the token. contexts: of a server
    that takes TLS alone."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: TransportSettings,
        stats: TransportStats,
        *,
        token: str,
        new_nonce: Callable[[], bytes],
        on_made: Callable[["ServerConnection"], bool],
        on_proved: Callable[["ServerConnection"], None] = lambda _: None,
        contexts: TlsContexts | None = None,
    ) -> None:
        super().__init__(settings, stats, Lane.CALLS)
        self._dispatcher = dispatcher
        self._token = token
        self._new_nonce = new_nonce
        self._on_made = on_made
        self._on_proved = on_proved
        self._contexts = contexts
        self._began = False
        self._hello: Hello | None = None
        self._challenge: Challenge | None = None
        self._calls: dict[int, ServerCall] = {}
        self._queued: list[ServerCall] = []
        self._refusals: list[Entry] = []
        self._last_stream_id = -1

    # Connection.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._on_made(self):
            self.abort()

    def data_received(self, data: bytes) -> None:
        if not self._began:
            self._began = True
            self._begin(is_tls=data[0] == FIRST_BYTE)
        if not self.is_closed:
            super().data_received(data)

    def handshake_frame(self, frame: memoryview) -> None:
        identity = self._dispatcher.identity
        if self._hello is None or self._challenge is None:
            self._hello = handshake.decode_first(frame)
            handshake.check_namespace(identity, self._hello)
            self.limit = self.settings.frame_limit(Lane(self._hello.lane))
            self._challenge = handshake.challenge(
                identity,
                self._dispatcher.instance_id,
                self._new_nonce(),
                self.limit,
                namespace=self._hello.namespace,
            )
            self.send(self._challenge)
            return
        message = handshake.decode(frame)
        if not isinstance(message, Proof):
            raise StatorError(ErrorCode.PROTOCOL, "expected a proof of the token")
        if not handshake.proved(message.mac, self._token, handshake.CALLER, self._hello, self._challenge):
            raise handshake.wrong_token_of_caller()
        self.send(Welcome(handshake.proof(self._token, handshake.SERVER, self._hello, self._challenge)))
        self.set_ready(self._hello.max_frame_bytes)
        self._on_proved(self)

    def frame(self, frame: Frame) -> None:
        match frame:
            case Credit():
                if (call := self._calls.get(frame.stream_id)) is not None:
                    call.add_credit(frame.num_items)
            case Open():
                self._open(frame)
            case Cancel():
                if (call := self._calls.get(frame.stream_id)) is not None:
                    call.abandon()
            case _:
                raise StatorError(ErrorCode.PROTOCOL, f"a caller does not send {type(frame).__name__} frames")

    def refuse(self, error: StatorError) -> None:
        logger.warning("refused %s: %s", self.peer, error.message)
        message = ErrorMessage.of(error)
        self.send(GoAway(message) if self.ready else Refused(message))

    def lost(self, error: StatorError) -> None:
        for call in list(self._calls.values()):
            call.abandon()

    def resume_writing(self) -> None:
        super().resume_writing()
        for call in list(self._calls.values()):
            call.wake()

    def collect(self, out: bytearray) -> None:
        queued, self._queued = self._queued, []
        if queued and self.write_backlog > self.settings.max_write_buffer_bytes:
            for call in queued:
                call.reset(self._not_reading(call.endpoint))
        entries = [entry for call in queued if (entry := call.take()) is not None]
        if self._refusals:
            entries = self._refusals + entries
            self._refusals = []
        if not entries:
            return
        failed = append_data(out, entries, self.limit + ENVELOPE_BYTES)
        self.stats.frames_sent += 1
        self.stats.data_frames_sent += 1
        for entry, error in failed:
            self._item_failed(out, entry, error)

    # CallLink.

    def queue(self, call: ServerCall) -> None:
        self._queued.append(call)
        self.schedule_flush()

    def forget(self, call: ServerCall, /) -> None:
        self._calls.pop(call.stream_id, None)

    # The server.

    def go_away(self) -> None:
        """Ask the caller to open its next streams on another connection."""
        if self.ready:
            self.send(GoAway())

    def shut_down(self) -> None:
        """Flush what has ended, end the rest with INSTANCE_LOST, and close."""
        self.flush()
        stopped = instance_stopped(self._dispatcher.instance_id)
        message = ErrorMessage.of(stopped)
        for call in list(self._calls.values()):
            self._refusals.append((call.stream_id, [], True, message))
            call.abandon()
        self.go_away()
        self.close(stopped)

    # Inside.

    def _begin(self, *, is_tls: bool) -> None:
        if self._contexts is None:
            if is_tls:
                self.fail(caller_with_tls(self.peer))
        elif is_tls:
            self.tls = self._contexts.accept(self.peer)
        else:
            refusal = caller_without_tls(self.peer)
            logger.warning("refused %s: %s", self.peer, refusal.message)
            # In plain text, which is all that it reads.
            self.send(Refused(ErrorMessage.of(told_to_caller_without_tls())))
            self.close(refusal)

    def _open(self, frame: Open) -> None:
        stream_id = frame.stream_id
        if stream_id <= self._last_stream_id:
            raise StatorError(ErrorCode.PROTOCOL, f"stream {stream_id} was opened after stream {self._last_stream_id}")
        self._last_stream_id = stream_id
        if self.write_backlog > self.settings.max_write_buffer_bytes:
            self.lose(self._not_reading(frame.endpoint))
            return
        try:
            if len(self._calls) >= self.settings.max_streams:
                raise too_many_streams(self.settings.max_streams)
            self._check_names(frame)
            context = self._context(frame)
            endpoint = self._dispatcher.find(frame.endpoint, frame.instance_id)
            request = self._dispatcher.decode_request(endpoint, frame.request)
        except StatorError as error:
            self._refusals.append((stream_id, [], True, ErrorMessage.of(error)))
            self.schedule_flush()
            return
        call = ServerCall(
            self,
            stream_id,
            frame.endpoint,
            request,
            context,
            window=frame.window,
            max_buffered=self.settings.max_buffered_items,
            loop=self._loop,
        )
        self._calls[stream_id] = call
        self._dispatcher.run(endpoint, call)

    def _check_names(self, frame: Open) -> None:
        """Raises StatorError(PROTOCOL) for what is kept, or told again, and longer than anybody needs."""
        limits = self.settings
        names = (frame.endpoint, frame.request_id, frame.instance_id or "")
        if max(map(len, names)) > limits.max_name_bytes:
            raise StatorError(ErrorCode.PROTOCOL, f"a name in a call is longer than {limits.max_name_bytes} characters")
        if frame.headers:
            num_bytes = sum(len(key) + len(value) for key, value in frame.headers.items())
            if len(frame.headers) > limits.max_headers or num_bytes > limits.max_header_bytes:
                raise StatorError(
                    ErrorCode.PROTOCOL,
                    f"the headers of a call are {len(frame.headers)} with {num_bytes} characters; expected at most "
                    f"{limits.max_headers} with {limits.max_header_bytes}",
                )

    def _context(self, frame: Open) -> CallContext:
        """Raises StatorError(DEADLINE) if no time is left."""
        deadline = None
        if frame.ms_left is not None:
            if not frame.ms_left > 0:
                raise deadline_passed(frame.endpoint)
            if frame.ms_left < MAX_DEADLINE_MS:
                deadline = self._loop.time() + frame.ms_left / 1000
        return CallContext(RequestId(frame.request_id), deadline, frame.headers)

    def _item_failed(self, out: bytearray, entry: Entry, error: Exception) -> None:
        call = self._calls.get(entry[0])
        refusal = cannot_carry("a call" if call is None else call.endpoint, "an item", error)
        logger.error("%s", refusal.message)
        if call is None:
            append_data(out, [(entry[0], [], True, ErrorMessage.of(refusal))], self.limit + ENVELOPE_BYTES)
        else:
            call.reset(refusal)

    def _not_reading(self, endpoint: str) -> StatorError:
        return StatorError(
            ErrorCode.SLOW_READER,
            f"more than {self.settings.max_write_buffer_bytes} bytes wait for {self.peer}, which does not read them; "
            f"{endpoint} was stopped",
        )
