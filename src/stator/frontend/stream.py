"""A Processor's stream on its way to one client: a bounded buffer between a sink and a writer."""

import asyncio
from collections.abc import Sequence

from stator.errors import StatorError
from stator.frontend.http import ClientGone
from stator.messages.processor import CompletionDelta
from stator.observability.metrics import Tally
from stator.runtime.context import loop_time
from stator.transport.base import StreamHandle


class DeltaStream:
    """A transport sink. One reader takes what waits with `batch`.

    While more than max_buffered deltas wait, the sender is paused; taking them resumes it. Times are on the loop's
    clock. num_tokens counts what arrived, whether or not the client got it.
    """

    __slots__ = (
        "_client_gone",
        "_ended",
        "_error",
        "_handle",
        "_last_at",
        "_max_buffered",
        "_paused",
        "_pending",
        "_wake",
        "first_token_at",
        "latencies",
        "num_tokens",
    )

    def __init__(self, max_buffered: int, latencies: Tally) -> None:
        self._max_buffered = max_buffered
        self._pending: list[CompletionDelta] = []
        self._wake = asyncio.Event()
        self._handle: StreamHandle | None = None
        self._paused = False
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
        self._pending.extend(items)
        self._observe(sum(delta.num_tokens for delta in items))
        self._wake.set()
        if not self._paused and len(self._pending) > self._max_buffered and self._handle is not None:
            self._paused = True
            self._handle.pause()

    def _observe(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        now = loop_time()
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
            self._wake.set()

    def client_gone(self) -> None:
        """Cancels at once: nobody will read what comes."""
        self._client_gone = True
        self._wake.set()
        self.close()

    def fail(self, error: StatorError) -> None:
        """End the stream from this side; the client gets what waits, then the error."""
        self.end(error)
        if self._handle is not None:
            self._handle.cancel()

    def close(self) -> None:
        """Cancel the call unless it has ended. Idempotent."""
        if not self._ended:
            self._ended = True
            if self._handle is not None:
                self._handle.cancel()

    async def batch(self) -> list[CompletionDelta]:
        """Everything that waits, at least one delta; an empty list once the stream ended well.

        Raises the StatorError that ended it, after its last deltas were taken, or ClientGone at once.
        """
        while not self._pending and not self._ended:
            if self._paused and self._handle is not None:
                self._paused = False
                self._handle.resume()
            self._wake.clear()
            await self._wake.wait()
        if self._client_gone:
            raise ClientGone
        if self._pending:
            taken, self._pending = self._pending, []
            return taken
        if self._error is not None:
            raise self._error
        return []
