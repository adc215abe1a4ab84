"""A Processor's stream on its way to one client: a bounded buffer between a sink and a writer."""

import asyncio
from collections.abc import Callable, Sequence

from stator.errors import ErrorCode, StatorError
from stator.frontend.http import ClientGone
from stator.messages.processor import CompletionDelta
from stator.observability.metrics import Tally
from stator.transport.base import StreamHandle

MAX_PAUSED_S = 30.0

Write = Callable[[Sequence[CompletionDelta]], bool]
"""Takes deltas on to the client at once, or returns False and has done nothing."""


class DeltaStream:
    """A transport sink. One reader takes what waits with `batch`; while it waits there, deltas may bypass it.

    While more than max_buffered deltas wait, the sender is paused; taking them resumes it. A stream from which nothing
    is taken for max_paused_s while it is paused fails with SLOW_READER: what makes its tokens is needed for others.
    Times are on the loop's clock. num_tokens counts what arrived, whether or not the client got it.
    """

    __slots__ = (
        "_client_gone",
        "_ended",
        "_error",
        "_handle",
        "_last_at",
        "_loop",
        "_max_buffered",
        "_max_paused_s",
        "_paused",
        "_pending",
        "_now",
        "_slow_timer",
        "_waiter",
        "_write",
        "first_token_at",
        "latencies",
        "num_tokens",
    )

    def __init__(
        self,
        max_buffered: int,
        latencies: Tally,
        loop: asyncio.AbstractEventLoop,
        *,
        max_paused_s: float = MAX_PAUSED_S,
    ) -> None:
        """latencies: where the times between tokens are counted. loop: the running one."""
        self._max_buffered = max_buffered
        self._pending: list[CompletionDelta] = []
        self._loop = loop
        self._now = loop.time
        self._waiter: asyncio.Future[None] | None = None
        self._write: Write | None = None
        self._handle: StreamHandle | None = None
        self._paused = False
        self._max_paused_s = max_paused_s
        self._slow_timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._error: StatorError | None = None
        self._client_gone = False
        self._last_at = 0.0
        self.first_token_at: float | None = None
        self.latencies = latencies
        self.num_tokens = 0

    def attach(self, handle: StreamHandle) -> None:
        self._handle = handle

    def items(self, items: Sequence[CompletionDelta], /) -> None:
        if self._ended:
            return
        self._observe(items[0].num_tokens if len(items) == 1 else sum(delta.num_tokens for delta in items))
        write = self._write
        if write is not None and write(items):
            return
        self._pending.extend(items)
        self._wake()
        if not self._paused and len(self._pending) > self._max_buffered and self._handle is not None:
            self._paused = True
            self._handle.pause()
            self._watch_reader()

    def _watch_reader(self) -> None:
        """From now on; what was taken before is no merit."""
        if self._slow_timer is not None:
            self._slow_timer.cancel()
            self._slow_timer = None
        if self._paused and not self._ended:
            self._slow_timer = self._loop.call_later(self._max_paused_s, self._too_slow)

    def _too_slow(self) -> None:
        self._slow_timer = None
        self.fail(
            StatorError(
                ErrorCode.SLOW_READER,
                f"The client took nothing of this answer for {self._max_paused_s:g} s while more was ready; read "
                "faster, or ask without streaming.",
            )
        )

    def _observe(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        now = self._now()
        if self.first_token_at is None:
            self.first_token_at = now
        else:
            self.latencies.observe((now - self._last_at) / num_tokens, num_tokens)
        self._last_at = now
        self.num_tokens += num_tokens

    def end(self, error: StatorError | None = None, /) -> None:
        if not self._ended:
            self._ended = True
            self._error = error
            self._handle = None
            self._watch_reader()
            self._wake()

    def client_gone(self) -> None:
        """Cancels at once: nobody will read what comes."""
        self._client_gone = True
        self._wake()
        self.close()

    def fail(self, error: StatorError) -> None:
        """End the stream from this side; the client gets what waits, then the error."""
        handle = self._handle
        self.end(error)
        if handle is not None:
            handle.cancel()

    def close(self) -> None:
        """Cancel the call unless it has ended. Idempotent."""
        if not self._ended:
            self._ended = True
            self._watch_reader()
            handle, self._handle = self._handle, None
            if handle is not None:
                handle.cancel()

    @property
    def complete(self) -> bool:
        """The stream ended well and `batch` has handed out all of it."""
        return self._ended and self._error is None and not self._client_gone and not self._pending

    async def batch(self, write: Write | None = None) -> list[CompletionDelta]:
        """Everything that waits, at least one delta; an empty list once the stream ended well.

        write: gets what arrives while nothing waits; only what it does not take ends the wait.
        Raises the StatorError that ended it, after its last deltas were taken, or ClientGone at once.
        """
        while not self._pending and not self._ended:
            if self._paused and self._handle is not None:
                self._paused = False
                self._watch_reader()
                self._handle.resume()
            self._write = write
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = self._write = None
        if self._client_gone:
            raise ClientGone
        if self._pending:
            taken, self._pending = self._pending, []
            if self._paused:
                self._watch_reader()
            return taken
        if self._error is not None:
            raise self._error
        return []

    def _wake(self) -> None:
        # What follows before the reader runs must queue behind what woke it.
        self._write = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
