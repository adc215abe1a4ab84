"""The caller's side of one stream, the same for every carrier: a sink, and what guards its promises.

Rules. The carrier calls `deliver` and `finish` in the order of arrival. While the stream is paused, items are held (at
most one window, since credit is given only for items that the sink got) and a normal or a handler's end waits behind
them. What breaks a stream (cancel, deadline, a slow reader, a lost connection) does not wait and drops them. The sink
is never called from inside `open`, `cancel` or `resume`, and gets exactly one end.
"""

import asyncio
import logging
from typing import Any, Protocol

from stator.errors import ErrorCode, StatorError
from stator.runtime.context import CallContext
from stator.transport.base import Sink
from stator.transport.server_call import deadline_passed

logger = logging.getLogger(__name__)

_BREAKING = frozenset({ErrorCode.CANCELLED, ErrorCode.DEADLINE, ErrorCode.SLOW_READER})


class StreamLink(Protocol):
    """What connects a stream with its server. All methods return at once and call nothing back."""

    def send_cancel(self, stream: "ClientStream") -> None: ...

    def send_credit(self, stream: "ClientStream", num_items: int) -> None: ...

    def release(self, stream: "ClientStream") -> None:
        """The sink has had its end, or is about to have it; deliver nothing more."""
        ...


class ClientStream:
    """Implements transport.base.StreamHandle."""

    __slots__ = (
        "_book",
        "_closed",
        "_credit_step",
        "_held",
        "_held_end",
        "_link",
        "_paused",
        "_sink",
        "_timer",
        "_uncredited",
        "context",
        "endpoint",
        "item_type",
        "loop",
        "stream_id",
        "window",
    )

    def __init__(
        self,
        endpoint: str,
        sink: Sink,
        context: CallContext,
        item_type: Any,
        window: int,
        book: "dict[ClientStream, None]",
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """book: where the stream is listed until its end is at, or on its way to, the sink. loop: the running one."""
        self.endpoint = endpoint
        self.context = context
        self.item_type = item_type
        self.window = window
        self.stream_id = -1
        self._sink = sink
        self._book = book
        book[self] = None
        self._link: StreamLink | None = None
        self._credit_step = window // 2
        self._uncredited = 0
        self._paused = False
        self._held: list[Any] = []
        self._held_end: tuple[StatorError | None] | None = None
        self._closed = False
        self.loop = loop
        self._timer: asyncio.TimerHandle | None = None
        if context.deadline is not None and not context.watched:
            self._timer = loop.call_at(context.deadline, self._deadline)

    # The caller's side.

    def cancel(self) -> None:
        self.break_soon(StatorError(ErrorCode.CANCELLED, f"the call of {self.endpoint} was cancelled"))

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if self._held:
                self.loop.call_soon(self._drain)

    # The carrier's side.

    @property
    def closed(self) -> bool:
        """The sink has had its end, or it is scheduled."""
        return self._closed

    def attach(self, link: StreamLink, stream_id: int) -> None:
        self._link = link
        self.stream_id = stream_id

    def deliver(self, items: list[Any]) -> None:
        if not (self._closed or self._paused or self._held):
            self._push(items)
        elif not self._closed:
            self._held.extend(items)
            if len(self._held) > self.window:
                self.break_soon(
                    StatorError(ErrorCode.PROTOCOL, f"{self.endpoint} sent more than the window of {self.window} items")
                )

    def finish(self, error: StatorError | None) -> None:
        """The server's end of the stream, after all its items."""
        if self._closed:
            return
        if self._held and not (error is not None and error.code in _BREAKING):
            self._held_end = (error,)
        else:
            self._close()
            self._end(error)

    def lose(self, error: StatorError) -> None:
        """The stream cannot go on; nobody is there to be told. One that only waits to be read to its end is whole."""
        if not self._closed and self._held_end is None:
            self._close()
            self._end(error)

    def break_soon(self, error: StatorError) -> None:
        """Tell the server that nobody listens, and end the sink from the event loop. Does nothing if it has ended."""
        if self._closed:
            return
        link = self._link
        if link is not None:
            link.send_cancel(self)
        self._close()
        self.loop.call_soon(self._end, error)

    # Inside.

    def _push(self, items: list[Any]) -> None:
        try:
            self._sink.items(items)
        except Exception:
            logger.exception("a sink of %s raised in request %s", self.endpoint, self.context.request_id)
            self.cancel()
            return
        self._uncredited += len(items)
        if self._uncredited >= self._credit_step and not self._closed:
            if self._link is not None:
                self._link.send_credit(self, self._uncredited)
            self._uncredited = 0

    def _drain(self) -> None:
        if self._paused or self._closed or not self._held:
            return
        held, self._held = self._held, []
        self._push(held)
        if self._held_end is not None and not self._closed:
            self._close()
            self._end(self._held_end[0])

    def _close(self) -> None:
        self._closed = True
        self._book.pop(self, None)
        self._held = []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._link is not None:
            self._link.release(self)
            self._link = None

    def _end(self, error: StatorError | None) -> None:
        try:
            self._sink.end(error)
        except Exception:
            logger.exception("a sink of %s raised at its end in request %s", self.endpoint, self.context.request_id)

    def _deadline(self) -> None:
        self.break_soon(deadline_passed(self.endpoint))
