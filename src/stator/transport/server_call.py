"""The server's side of one stream, the same for every carrier: a bounded buffer between a handler and a link.

Rules. A handler pushes into the buffer and never waits. The link is asked to `queue` the call once per flush and
then calls `take`, which hands out what the caller's credit allows. A call is

- open: the handler may push;
- ended: the handler pushed its end; what is buffered still goes out as credit comes, then the end;
- gone: the end was handed to the link, or the caller is not interested any more. Nothing leaves a gone call.

`cancelled` is set when a call leaves the open or the ended state in any way but by its own end: the caller cancelled,
the connection was lost, the deadline passed, or the buffer passed its bound. In the last two the caller is told.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from stator.errors import ErrorCode, StatorError
from stator.messages.control import ErrorMessage
from stator.runtime.context import CallContext

logger = logging.getLogger(__name__)

Entry = tuple[int, list[Any]] | tuple[int, list[Any], bool] | tuple[int, list[Any], bool, ErrorMessage]
"""What leaves a call at once: (stream id, items[, ended[, error]]); see messages.control.DataEntry."""


class CallLink(Protocol):
    """What connects a call with its caller. All methods return at once and call nothing back."""

    @property
    def congested(self) -> bool:
        """More waits in the way out than should; `Call.writable` waits until `ServerCall.wake`."""
        ...

    def queue(self, call: "ServerCall") -> None:
        """Call `call.take()` from the event loop soon, with all others queued meanwhile."""
        ...

    def forget(self, call: "ServerCall", /) -> None:
        """The call is gone."""
        ...


class ServerCall:
    """Implements transport.base.Call."""

    __slots__ = (
        "_buffer",
        "_cancelled",
        "_credit",
        "_ended",
        "_error",
        "_gone",
        "_link",
        "_loop",
        "_max_buffered",
        "_on_cancel",
        "_queued",
        "_timer",
        "_waiters",
        "context",
        "endpoint",
        "request",
        "stream_id",
    )

    def __init__(
        self,
        link: CallLink,
        stream_id: int,
        endpoint: str,
        request: Any,
        context: CallContext,
        *,
        window: int,
        max_buffered: int,
        loop: asyncio.AbstractEventLoop,
        watch_deadline: bool = True,
    ) -> None:
        """loop: the running one. watch_deadline: False where the caller's end of the stream is in this process and
        watches it."""
        self.request = request
        self.context = context
        self.endpoint = endpoint
        self.stream_id = stream_id
        self._link = link
        self._credit = window
        self._max_buffered = max_buffered
        self._buffer: list[Any] = []
        self._queued = False
        self._ended = False
        self._error: StatorError | None = None
        self._cancelled = False
        self._gone = False
        self._on_cancel: Callable[[], None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        if context.deadline is not None and watch_deadline:
            self._timer = self._loop.call_at(context.deadline, self._deadline)

    # The handler's side.

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def items(self, items: Sequence[Any], /) -> None:
        if self._ended or self._cancelled:
            return
        buffer = self._buffer
        buffer.extend(items)
        if len(buffer) > self._max_buffered:
            self._overrun()
        elif not self._queued:
            self._queued = True
            self._link.queue(self)

    def end(self, error: StatorError | None = None, /) -> None:
        if self._ended or self._cancelled:
            return
        self._ended = True
        self._error = error
        self._on_cancel = None
        self._queue()

    def on_cancel(self, callback: Callable[[], None], /) -> None:
        if self._cancelled:
            callback()
        elif not self._ended:
            self._on_cancel = callback

    async def writable(self) -> None:
        while True:
            if self._cancelled:
                raise StatorError(ErrorCode.CANCELLED, f"the call of {self.endpoint} was cancelled")
            if self._gone or not (self._buffer or self._link.congested):
                return
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def fail(self, error: BaseException) -> None:
        """End the call with what its handler raised. The text of anything but a StatorError stays here."""
        if isinstance(error, StatorError):
            self.end(error)
            return
        logger.error("%s failed in request %s", self.endpoint, self.context.request_id, exc_info=error)
        self.end(StatorError(ErrorCode.INTERNAL, f"{self.endpoint} failed; the server's log has the reason"))

    # The link's side.

    def take(self) -> Entry | None:
        """What may leave now, at most as many items as there is credit; None for nothing."""
        self._queued = False
        if self._gone:
            return None
        items = self._buffer
        credit = self._credit
        if len(items) > credit:
            if not credit:
                return None
            self._buffer = items[credit:]
            self._credit = 0
            return (self.stream_id, items[:credit])
        self._buffer = []
        self._credit = credit - len(items)
        if self._waiters:
            self.wake()
        if not self._ended:
            return (self.stream_id, items) if items else None
        self._leave()
        if self._error is None:
            return (self.stream_id, items, True)
        return (self.stream_id, items, True, ErrorMessage.of(self._error))

    def add_credit(self, num_items: int) -> None:
        self._credit += num_items
        if self._buffer:
            self._queue()

    def reset(self, error: StatorError) -> None:
        """Drop what is buffered, tell the handler that the call is cancelled, and the caller why."""
        if self._gone:
            return
        self._break()
        self._error = error
        self._queue()
        self._run_on_cancel()

    def abandon(self) -> None:
        """The caller cancelled or is lost: tell the handler, and nobody else."""
        if self._gone:
            return
        self._break()
        self._leave()
        self._run_on_cancel()

    def wake(self) -> None:
        """Let `writable` look again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # Inside.

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            self._link.queue(self)

    def _break(self) -> None:
        self._cancelled = True
        self._ended = True
        self._buffer = []
        self.wake()

    def _leave(self) -> None:
        self._gone = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._link.forget(self)

    def _overrun(self) -> None:
        """Runs inside the handler's own `items`, so on_cancel follows from the loop."""
        self._break()
        self._error = slow_reader(self.endpoint, self._max_buffered)
        self._queue()
        self._loop.call_soon(self._run_on_cancel)

    def _deadline(self) -> None:
        self.reset(deadline_passed(self.endpoint))

    def _run_on_cancel(self) -> None:
        callback, self._on_cancel = self._on_cancel, None
        if callback is None:
            return
        try:
            callback()
        except Exception:
            logger.exception("on_cancel of %s raised in request %s", self.endpoint, self.context.request_id)


def deadline_passed(endpoint: str) -> StatorError:
    return StatorError(ErrorCode.DEADLINE, f"the deadline passed before {endpoint} had answered in full")


def slow_reader(endpoint: str, max_buffered: int) -> StatorError:
    return StatorError(
        ErrorCode.SLOW_READER,
        f"the reader of {endpoint} fell more than {max_buffered} items behind; read faster or ask for less",
    )
