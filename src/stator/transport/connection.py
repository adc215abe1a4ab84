"""What both ends of a socket connection do: frames in and out, heartbeats, bounds, and one clean end.

Rules. Everything that one iteration of the event loop sends is collected in one buffer and leaves in one write at its
end. A peer counts as lost when nothing came from it, or when it took nothing of what waits for it, for
`heartbeat_timeout_s`. A frame that cannot be understood ends the connection, and only it, with PROTOCOL. `lost` is
called exactly once, whatever ends the connection, before or when the socket closes.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from stator.errors import DECODE_ERRORS, ErrorCode, StatorError
from stator.messages.control import Frame, Ping, Pong
from stator.transport.base import Lane
from stator.transport.encoding import FrameSplitter, FrameTooLong, append_frame
from stator.transport.settings import KIB, TransportSettings
from stator.transport.tls import TlsSession

logger = logging.getLogger(__name__)

ENVELOPE_BYTES = 64 * KIB
"""What a frame may be longer than the request or item it carries."""

_decoder = msgspec.msgpack.Decoder[Frame](Frame)


@dataclass(slots=True)
class TransportStats:
    """Counters that only grow, over all socket connections of a client or a server."""

    writes: int = 0
    frames_sent: int = 0
    data_frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0
    connections: int = 0


class Connection(asyncio.Protocol):
    """Subclasses define handshake_frame, frame, collect, lost and idle.

    tls: what the bytes of this connection go through. Frames wait until its hands are shaken, too.
    """

    def __init__(self, settings: TransportSettings, stats: TransportStats, lane: Lane) -> None:
        self.settings = settings
        self.stats = stats
        self.limit = settings.frame_limit(lane)
        self.peer = "?"
        self.tls: TlsSession | None = None
        self.ready = False
        self.is_closed = False
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._splitter = FrameSplitter(settings.max_handshake_frame_bytes)
        self._out = bytearray()
        self._flush_scheduled = False
        self._congested = False
        self._timer: asyncio.TimerHandle | None = None
        self._tick_due = 0.0
        self._heard = False
        self._silent_since = 0.0
        self._said = False
        self._quiet_since = 0.0
        self._num_written = 0
        self._num_drained = 0
        self._stalled_since = 0.0

    # For subclasses to define.

    def handshake_frame(self, frame: memoryview) -> None:
        raise NotImplementedError

    def frame(self, frame: Frame) -> None:
        raise NotImplementedError

    def collect(self, out: bytearray) -> None:
        """Append what is to leave in this write."""

    def lost(self, error: StatorError) -> None:
        """End every stream."""
        raise NotImplementedError

    def refuse(self, error: StatorError) -> None:
        """Tell the peer why the connection ends, if it can be told."""

    def idle(self, now: float) -> None:
        """Called now and then."""

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self.settings.write_high_water_bytes)
        self.peer = str(transport.get_extra_info("peername") or "a local process")
        self.stats.connections += 1
        self._timer = self._loop.call_later(self.settings.handshake_timeout_s, self._handshake_late)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        stats = self.stats
        stats.bytes_received += len(data)
        try:
            if self.tls is not None and not (data := self._unseal(self.tls, data)):
                return
            for frame in self._splitter.feed(data):
                if self.is_closed:
                    return
                stats.frames_received += 1
                if not self.ready:
                    self.handshake_frame(frame)
                    continue
                message = _decoder.decode(frame)
                if isinstance(message, Ping):
                    # A peer that leaves us congested hears from us as soon as it reads.
                    if not self._congested:
                        self.send(Pong(message.number))
                elif not isinstance(message, Pong):
                    self.frame(message)
        except StatorError as error:
            self.fail(error)
        except (FrameTooLong, *DECODE_ERRORS) as error:
            self.fail(StatorError(ErrorCode.PROTOCOL, f"a frame from {self.peer} cannot be read: {error}"))
        except Exception:
            logger.exception("failed to handle a frame from %s", self.peer)
            self.fail(StatorError(ErrorCode.INTERNAL, "failed to handle a frame; this process's log has the reason"))

    def pause_writing(self) -> None:
        self._congested = True

    def resume_writing(self) -> None:
        self._congested = False

    def connection_lost(self, exc: Exception | None) -> None:
        if self.tls is not None and not self.ready:
            self._end(self.tls.lost())
        reason = f": {exc}" if exc is not None else ""
        self._end(StatorError(ErrorCode.INSTANCE_LOST, f"the connection to {self.peer} was lost{reason}"))
        if not self.closed.done():
            self.closed.set_result(None)

    # Sending.

    @property
    def congested(self) -> bool:
        return self._congested

    @property
    def write_backlog(self) -> int:
        """Bytes that the peer has not taken yet."""
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return waiting + len(self._out)

    def send(self, message: Any) -> None:
        """Send one frame with this iteration's write. Raises FrameTooLong or one of encoding.ENCODE_ERRORS."""
        if self.is_closed:
            return
        append_frame(self._out, message, self.limit + ENVELOPE_BYTES)
        self.stats.frames_sent += 1
        self.schedule_flush()

    def schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush_soon)

    def flush(self) -> None:
        """Write what has been collected."""
        if self.is_closed or self._transport is None:
            return
        if self.tls is not None and not self.tls.established:
            self._write_tls(self.tls)
            return
        self.collect(self._out)
        out = self._out
        if not out:
            return
        self._out = bytearray()
        self._said = True
        if self.tls is not None:
            self.tls.send(out)
            out = self.tls.take()
        self._num_written += len(out)
        self.stats.bytes_sent += len(out)
        self.stats.writes += 1
        self._transport.write(out)

    def _unseal(self, tls: TlsSession, data: bytes) -> bytes:
        """The plain bytes. What TLS itself has to say, an alert about what it refuses among it, is written."""
        established = tls.established
        try:
            return tls.receive(data)
        finally:
            if tls.established and not established and self._out:
                # In one write with the end of TLS's own handshake.
                self.flush()
            self._write_tls(tls)

    def _write_tls(self, tls: TlsSession) -> None:
        if (own := tls.take()) and self._transport is not None:
            self._num_written += len(own)
            self._transport.write(own)

    def _flush_soon(self) -> None:
        self._flush_scheduled = False
        self.flush()

    # Beginning and end.

    def set_ready(self, peer_limit: int) -> None:
        """The handshake is done. peer_limit: the longest request or item that the peer takes, 0 if it did not say."""
        self.ready = True
        self._splitter.limit = self.limit + ENVELOPE_BYTES
        if peer_limit > 0:
            self.limit = min(self.limit, peer_limit)
        now = self._loop.time()
        self._silent_since = self._quiet_since = self._stalled_since = now
        self._schedule_tick(now)

    def fail(self, error: StatorError) -> None:
        """End the connection because of what the peer did."""
        if self.is_closed:
            return
        self.flush()
        self.refuse(error)
        self.close(error)

    def close(self, error: StatorError) -> None:
        """Write what has been collected, then close; streams that are still open end with error."""
        self.flush()
        self._end(error)
        if self._transport is None or self._transport.is_closing():
            return
        if self.tls is not None and self.tls.established:
            self.tls.end()
            self._write_tls(self.tls)
        self._transport.close()

    def abort(self) -> None:
        """Close now; what was not sent is lost."""
        self._end(StatorError(ErrorCode.INSTANCE_LOST, f"the connection to {self.peer} was closed"))
        if self._transport is not None:
            self._transport.abort()

    def mute(self) -> None:
        """As abort, but streams end only when the loop tells that the connection is lost."""
        if self._transport is not None:
            self._transport.abort()

    def _end(self, error: StatorError) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.lost(error)

    # Time.

    def _handshake_late(self) -> None:
        seconds = self.settings.handshake_timeout_s
        self.fail(StatorError(ErrorCode.INSTANCE_LOST, f"{self.peer} did not finish its hello within {seconds:g} s"))

    def _schedule_tick(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._tick_due = now + self.settings.ping_interval_s / 2
        self._timer = self._loop.call_at(self._tick_due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        # A tick that is late by more than its period says that this process was held up; what the peer sent
        # meanwhile may still wait in the socket.
        late = now - self._tick_due > self.settings.ping_interval_s / 2
        error = self._check_peer(now, late)
        if error is not None:
            self.lose(error)
            return
        if self._said:
            self._said = False
            self._quiet_since = now
        elif now - self._quiet_since >= self.settings.ping_interval_s:
            self.send(Ping())
        self.idle(now)
        if not self.is_closed:
            self._schedule_tick(now)

    def _check_peer(self, now: float, late: bool) -> StatorError | None:
        timeout = self.settings.heartbeat_timeout_s
        if self._heard or late:
            self._heard = False
            self._silent_since = now
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        drained = self._num_written - waiting
        if not waiting or late or drained > self._num_drained:
            self._stalled_since = now
        self._num_drained = drained
        if now - self._silent_since > timeout:
            return StatorError(ErrorCode.INSTANCE_LOST, f"nothing was heard from {self.peer} for {timeout:g} s")
        if now - self._stalled_since > timeout:
            return StatorError(ErrorCode.INSTANCE_LOST, f"{self.peer} has read nothing for {timeout:g} s")
        return None

    def lose(self, error: StatorError) -> None:
        """Give the peer up: it would not hear why."""
        logger.warning("%s; closing the connection", error.message)
        self._end(error)
        if self._transport is not None:
            self._transport.abort()


def cannot_carry(endpoint: str, what: str, error: Exception) -> StatorError:
    """Why a request or an item was not sent."""
    if isinstance(error, FrameTooLong):
        return StatorError(ErrorCode.PROTOCOL, f"{what} of {endpoint} is too long for the transport: {error}")
    return StatorError(ErrorCode.INTERNAL, f"{what} of {endpoint} cannot be encoded: {error}")
