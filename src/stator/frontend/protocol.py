"""uvicorn's HTTP/1.1 connection with the bounds that it leaves to a proxy in front."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from stator.errors import ErrorCode, StatorError
from stator.frontend.connections import OpenConnections
from stator.frontend.http import PIPE, Headers, error_json
from stator.frontend.settings import ConnectionSettings

DISCARD_PAUSE_S = 0.005
"""After each read of a body that is dropped, for each connection on which one is: they share about 50 MB a second."""

WRITE_LOOKS = 4
"""In a write_timeout_s, whether a client still takes what is unwritten."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Implements frontend.http.Pipe, and adds to uvicorn's connection:

    - a deadline and a size for a request's head, and for what frames its body; how many requests may wait in line
    - a deadline for a client that reads nothing, also of one whose connection is being closed
    - a connection that only waits is closed in time, whatever is sent on it that is no request; and sooner when there
      are too many
    - an answer that is running is told when its client leaves, also with another request queued behind it
    - bytes that are no HTTP, behind a request that is being answered, do not break into its answer
    - an orderly end: see `hand_over`
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        loop: asyncio.AbstractEventLoop,
        settings: ConnectionSettings,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state={}, _loop=loop)
        self._settings = settings
        self._on_lost = on_lost
        self._running: RequestResponseCycle | None = None
        self._in_head = True
        self._head_begun = False
        self._num_head_bytes = 0
        self._num_field_bytes = 0
        self._num_framing_bytes = 0
        self._beyond: tuple[int, str] | None = None
        self._refused = False
        self._handed_over = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_unwritten = 0
        self._written_at = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._discard_timer: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        self._on_leave: Callable[[], None] | None = None
        self._extensions: dict[str, Any] = {PIPE: self}
        self._open = cast(OpenConnections[BoundedHttpProtocol], server_state.connections)

    @property
    def busy(self) -> bool:
        """An answer is being made or written."""
        return self._running is not None and not self._running.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm_head_timer()
        surplus = self._open.take_surplus()
        if surplus is not None:
            surplus.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancel(self._head_timer)
        self._write_timer = _cancel(self._write_timer)
        self._idle_timer = _cancel(self._idle_timer)
        self._stop_discarding()
        self.pipeline.clear()
        if self._running is not None and self.busy:
            self._running.disconnected = True
            self._running.message_event.set()
            callback, self._on_leave = self._on_leave, None
            if callback is not None:
                callback()
        self._extensions.clear()
        super().connection_lost(exc)
        self._on_lost()

    def hand_over(self, linger_s: float) -> None:
        """Other processes take this client's next requests: say `connection: close` with each answer that begins from
        now on, and close the connection once nothing came for linger_s.

        Not at once, even if it is idle or when an answer that did not say so ends: a client may be sending its next
        request already, and would see a reset.
        """
        self._handed_over = True
        self.timeout_keep_alive = linger_s  # type: ignore[assignment]
        cycle = self._running
        if cycle is None:
            self._idle_since = self.loop.time()
        elif not cycle.response_started:
            cycle.keep_alive = False
        self._idle_timer = _cancel(self._idle_timer)
        if self._idle_since is not None:
            self._idle_since = self.loop.time()
            self._idle_timer = self.loop.call_later(linger_s, self._check_idle)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, without a log line for each connection that sends no HTTP."""
        if self._refused or self.parser is None:
            return
        if self._in_head:
            self._num_head_bytes += len(data)
        else:
            self._num_framing_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            """An upgrade is not supported; it is answered as a plain request."""
        except httptools.HttpParserError:
            self._refuse(*(self._beyond or (400, "Invalid HTTP request received.")))
            return
        limit = self._settings.max_head_bytes
        if not self._in_head:
            if self._num_framing_bytes > limit:
                self._refuse(400, f"The parts of a request's body are framed with more than {limit} bytes.")
            return
        if self._head_begun:
            # Not where it begins: a head that came whole needs no timer.
            self._arm_head_timer()
        if self._num_head_bytes > limit:
            self._refuse(*self._head_too_large())

    def _head_too_large(self) -> tuple[int, str]:
        return 431, f"The request line and headers are larger than the limit of {self._settings.max_head_bytes} bytes."

    def _stop_parsing(self, status: int, message: str) -> None:
        """For the parser's callbacks. Nothing after what was just parsed is looked at."""
        self._beyond = (status, message)
        raise StatorError(ErrorCode.INVALID_REQUEST, message)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self._settings.max_pipelined:
            self._stop_parsing(400, f"More than {self._settings.max_pipelined} requests wait on this connection.")
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._head_begun = True
        self._num_field_bytes = 0
        self._idle_since = None

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_field(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also called for the trailers of a body in chunks, which count with the headers."""
        super().on_header(name, value)
        self._count_field(len(name) + len(value))
        if len(self.headers) > self._settings.max_headers:
            self._stop_parsing(431, f"The request has more than {self._settings.max_headers} headers.")

    def _count_field(self, num_bytes: int) -> None:
        self._num_field_bytes += num_bytes
        if self._num_field_bytes > self._settings.max_head_bytes:
            self._stop_parsing(*self._head_too_large())

    def on_body(self, body: bytes) -> None:
        self._num_framing_bytes = 0
        super().on_body(body)
        if self.cycle.response_complete and self._discard_timer is None:
            # Of a body that was refused; read now and then, so that what is dropped takes no time from the others.
            self.flow.pause_reading()
            self._open.num_discarding += 1
            self._discard_timer = self.loop.call_later(DISCARD_PAUSE_S * self._open.num_discarding, self._discard_more)

    def _stop_discarding(self) -> None:
        if self._discard_timer is not None:
            self._discard_timer.cancel()
            self._discard_timer = None
            self._open.num_discarding -= 1

    def _discard_more(self) -> None:
        self._stop_discarding()
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def on_headers_complete(self) -> None:
        self._in_head = self._head_begun = False
        self._num_head_bytes = 0
        self._head_timer = _cancel(self._head_timer)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._idle_since = None
        self._open.busy(self)
        if self._handed_over and not self.pipeline:
            cycle.keep_alive = False
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """As uvicorn's, but for the timer: one for a connection, not one for each of its requests."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._limit_closing()
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._open.waits(self)
        self._idle_since = self.loop.time()
        if self.transport.get_write_buffer_size():
            self._arm_write_timer()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._check_idle)

    def _unset_keepalive_if_required(self) -> None:
        """A request that begins ends the wait; bytes that begin none do not."""

    def _check_idle(self) -> None:
        self._idle_timer = None
        if self._idle_since is None:
            return
        now = self.loop.time()
        due = self._idle_since + self.timeout_keep_alive
        if now < due:
            self._idle_timer = self.loop.call_at(due, self._check_idle)
        elif not self.transport.get_write_buffer_size():
            self.transport.close()
        elif now < self._idle_since + self._settings.rest_timeout_s:
            # The answer's client reads slowly. One that does not read at all is the write timer's.
            self._arm_write_timer()
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._check_idle)
        else:
            self.transport.abort()

    # Pipe.

    def whole_body(self) -> bytes | None:
        cycle = self._running
        if cycle is None or cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    def write_whole(self, status: int, headers: Headers, body: bytes) -> bool:
        cycle = self._unanswered()
        if cycle is None or cycle.scope["method"] == "HEAD":
            return False
        self._write_head(cycle, status, headers, body)
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def begin_events(self, headers: Headers, events: bytes) -> bool:
        cycle = self._unanswered()
        if cycle is None:
            return False
        cycle.chunked_encoding = True
        first = b"%x\r\n%b\r\n" % (len(events), events) if events else b""
        self._write_head(cycle, 200, (*headers, (b"transfer-encoding", b"chunked")), first)
        return True

    def _unanswered(self) -> RequestResponseCycle | None:
        """The request that may be answered now."""
        cycle = self._running
        if cycle is None or cycle.response_started or cycle.disconnected or self.flow.write_paused:
            return None
        return cycle

    def _write_head(self, cycle: RequestResponseCycle, status: int, headers: Headers, rest: bytes) -> None:
        """As uvicorn's own `send` does it, in one write with what follows. Header values are ours, or were checked."""
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        head = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            if b"\n" in value:
                raise RuntimeError(f"a line break in the header {name.decode('ascii', 'replace')}")
            if name == b"connection" and value == b"close":
                cycle.keep_alive = False
            else:
                head.append(b"%b: %b\r\n" % (name, value))
        head.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        head.append(rest)
        self.transport.write(b"".join(head))

    def write_events(self, events: bytes) -> bool:
        cycle = self._running
        if (
            cycle is None
            or not cycle.chunked_encoding
            or cycle.response_complete
            or cycle.disconnected
            or self.flow.write_paused
        ):
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(events), events))
        return True

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        self._on_leave = callback
        if callback is None:
            return
        # Reading stops while a large body waits to be taken; a client that leaves is noticed by reading.
        self.flow.resume_reading()
        if self._running is not None and self._running.disconnected:
            self._on_leave = None
            callback()

    def _arm_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._settings.head_timeout_s, self._head_late)

    def _head_late(self) -> None:
        self._head_timer = None
        if self._num_head_bytes or self.busy:
            self._refuse(408, f"The request's head did not arrive within {self._settings.head_timeout_s:g} seconds.")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Take no more from this connection. What is being answered is answered first."""
        self._refused = True
        if self.transport.is_closing():
            return
        if self._running is not None and self.busy:
            self._running.keep_alive = False
            self.pipeline.clear()
            return
        body = error_json(StatorError(ErrorCode.INVALID_REQUEST, message))
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
        self._limit_closing()

    def _limit_closing(self) -> None:
        """A closed connection stays while there is something to write and its client does not read."""
        if self.transport.get_write_buffer_size():
            self._arm_write_timer()

    def _arm_write_timer(self) -> None:
        if self._write_timer is None:
            self._num_unwritten = self.transport.get_write_buffer_size()
            self._written_at = self.loop.time()
            self._write_timer = self.loop.call_later(
                self._settings.write_timeout_s / WRITE_LOOKS, self._look_at_writing
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._write_timer = _cancel(self._write_timer)

    def _look_at_writing(self) -> None:
        """While nothing is added to what is unwritten it shrinks, or its client takes nothing. What was added, by the
        answer to its next request, is looked at anew."""
        self._write_timer = None
        num_unwritten, now = self.transport.get_write_buffer_size(), self.loop.time()
        goes_on = self.busy and not self.flow.write_paused and not self.transport.is_closing()
        if not num_unwritten or goes_on:
            return
        if num_unwritten != self._num_unwritten:
            self._num_unwritten, self._written_at = num_unwritten, now
        elif now >= self._written_at + self._settings.write_timeout_s:
            self.transport.abort()
            return
        self._write_timer = self.loop.call_later(self._settings.write_timeout_s / WRITE_LOOKS, self._look_at_writing)


_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
