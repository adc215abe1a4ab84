"""A transport client that breaks the transport's promises on purpose: items lost, doubled and out of order, streams
lost, opens that fail. What is built on a sequence of numbered items must survive it.

All decisions come from one seeded source, so that a seed stands for one course of events.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.runtime.context import CallContext
from stator.transport.base import Sink, StreamHandle, Target, TransportClient


@dataclass(slots=True)
class Faults:
    """Probabilities, 0 to 1; may be changed at any time.

    drop, duplicate, reorder (an item arrives after the next one), corrupt: of an item. lose: that a list of items
    brings the loss of its stream instead. refuse: that an open fails.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    lose: float = 0.0
    refuse: float = 0.0

    def stop(self) -> None:
        self.drop = self.duplicate = self.reorder = self.corrupt = self.lose = self.refuse = 0.0


class FaultyClient:
    """Implements TransportClient on top of another one.

    corrupt: what a corrupted item becomes; without it items are not corrupted.
    """

    def __init__(
        self,
        inner: TransportClient,
        rng: Random,
        faults: Faults,
        *,
        corrupt: Callable[[Any, Random], Any] | None = None,
    ) -> None:
        self.rng = rng
        self.faults = faults
        self.corrupt = corrupt
        self.num_faults = 0
        self._inner = inner
        self._streams: dict[_FaultyStream, None] = {}

    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        stream = _FaultyStream(self, sink, target.endpoint)
        self._streams[stream] = None
        if self.hit(self.faults.refuse):
            stream.lose_soon()
        else:
            stream.handle = self._inner.open(target, request, stream, context=context, item_type=item_type)
        return stream

    def lose_all(self) -> None:
        """Every stream that is open ends with INSTANCE_LOST."""
        for stream in list(self._streams):
            self.num_faults += 1
            stream.lose_soon()

    async def close(self) -> None:
        await self._inner.close()

    def hit(self, probability: float) -> bool:
        if probability <= 0 or self.rng.random() >= probability:
            return False
        self.num_faults += 1
        return True

    def forget(self, stream: "_FaultyStream") -> None:
        self._streams.pop(stream, None)


class _FaultyStream:
    """Between the real stream and the caller's sink; a Sink for the one and a StreamHandle for the other."""

    def __init__(self, client: FaultyClient, sink: Sink, endpoint: str) -> None:
        self.handle: StreamHandle | None = None
        self._client = client
        self._sink = sink
        self._endpoint = endpoint
        self._late: list[Any] = []
        self._lost = False
        self._ended = False

    # Sink.

    def items(self, items: Sequence[Any], /) -> None:
        if self._lost or self._ended:
            return
        if self._client.hit(self._client.faults.lose):
            self.lose_soon()
            return
        arriving = [copy for item in items for copy in self._damage(item)]
        if arriving:
            self._sink.items(arriving)

    def end(self, error: StatorError | None = None, /) -> None:
        if self._ended:
            return
        self._ended = True
        self._client.forget(self)
        self._sink.end(error)

    # StreamHandle.

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()

    def pause(self) -> None:
        if self.handle is not None:
            self.handle.pause()

    def resume(self) -> None:
        if self.handle is not None:
            self.handle.resume()

    # Faults.

    def lose_soon(self) -> None:
        self._lost = True
        error = StatorError(ErrorCode.INSTANCE_LOST, f"the connection of {self._endpoint} was lost")
        asyncio.get_running_loop().call_soon(self._lose, error)

    def _lose(self, error: StatorError) -> None:
        self.end(error)
        self.cancel()

    def _damage(self, item: Any) -> list[Any]:
        client, faults = self._client, self._client.faults
        if client.corrupt is not None and client.hit(faults.corrupt):
            item = client.corrupt(item, client.rng)
        late, self._late = self._late, []
        if client.hit(faults.drop):
            return late
        if client.hit(faults.duplicate):
            return [item, item, *late]
        if client.hit(faults.reorder):
            self._late = [item]
            return late
        return [item, *late]
