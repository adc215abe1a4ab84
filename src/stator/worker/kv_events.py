"""Serves the endpoint `kv_events`: what this worker's engine holds, to every router that asks.

The engine has one listener for all subscribers (one per stride in use; routers of one deployment use one stride). What
happens within one iteration of the loop, or within FLUSH_EVERY_S while the engine is busy, becomes one item, packed
once. Each subscriber has a bounded backlog, emptied as its stream takes it; one that falls behind is ended with
SLOW_READER and starts again with a new snapshot.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from stator.core.kv_stream import BacklogLimits, KvBacklog, KvSource
from stator.engines.base import KvListener
from stator.errors import ErrorCode, StatorError
from stator.messages.engine import KvEvent
from stator.messages.kv_events import DIGEST_INTERVAL_S, KV_EVENTS_ENDPOINT, MAX_STRIDE, KvItem, KvSubscribe
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Call

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 0.005
MAX_FEEDS = 4
"""Different strides served at a time; each costs a copy of what the engine holds."""

DEFAULT_LIMITS = BacklogLimits()


class WatchesKv(Protocol):
    """The one method of engines.base.Engine that is used here."""

    def watch_kv(self, listener: KvListener) -> Callable[[], None]: ...


class KvPublisher:
    """From construction to `close`. The engine must have been started before the first subscriber comes."""

    def __init__(self, engine: WatchesKv, *, limits: BacklogLimits = DEFAULT_LIMITS) -> None:
        self.num_dropped = 0
        self._engine = engine
        self._limits = limits
        self._tasks = TaskOwner("KV events")
        self._feeds: dict[int, _Feed] = {}
        self._last_epoch = 0

    @property
    def num_subscribers(self) -> int:
        return sum(len(feed.subscribers) for feed in self._feeds.values())

    def kv_events(self, call: Call) -> None:
        """Push endpoint: KvSubscribe in; KvSnapshot, KvChanges and KvDigest out, until cancelled."""
        request: KvSubscribe = call.request
        feed = self._feeds.get(request.stride)
        if not 1 <= request.stride <= MAX_STRIDE:
            message = f"stride is {request.stride}; it must be 1 to {MAX_STRIDE}"
            call.end(StatorError(ErrorCode.INVALID_REQUEST, message, param="stride"))
            return
        if feed is None:
            if len(self._feeds) >= MAX_FEEDS:
                strides = ", ".join(map(str, sorted(self._feeds)))
                message = f"this worker serves KV events with strides {strides}; use one of them for every router"
                call.end(StatorError(ErrorCode.OVERLOADED, message))
                return
            feed = self._feeds[request.stride] = _Feed(self._engine, self._new_epoch(), request.stride)
        subscriber = _Subscriber(call, feed.backlog(self._limits))
        try:
            task = self._tasks.spawn(subscriber.run(), "subscriber")
        except RuntimeError:
            call.end(StatorError(ErrorCode.DRAINING, f"{KV_EVENTS_ENDPOINT} is stopping"))
            self._close_if_unused(feed)
            return
        feed.subscribers[subscriber] = None
        # Not in the task's own `finally`, which a task that is cancelled before its first step never reaches.
        task.add_done_callback(lambda _: self._left(feed, subscriber))
        subscriber.on_overrun = lambda: _cancel(task)
        call.on_cancel(lambda: _cancel(task))

    async def close(self) -> None:
        """Ends every subscription. Idempotent."""
        for feed in list(self._feeds.values()):
            for subscriber in list(feed.subscribers):
                subscriber.call.end()
        await self._tasks.close()

    def _left(self, feed: "_Feed", subscriber: "_Subscriber") -> None:
        feed.subscribers.pop(subscriber, None)
        self.num_dropped += subscriber.overrun
        self._close_if_unused(feed)

    def _close_if_unused(self, feed: "_Feed") -> None:
        if not feed.subscribers and self._feeds.get(feed.stride) is feed:
            del self._feeds[feed.stride]
            feed.close()

    def _new_epoch(self) -> int:
        """Microseconds of the host's monotonic clock: grows from one publisher of an instance to the next, too."""
        self._last_epoch = max(self._last_epoch + 1, int(loop_time() * 1e6))
        return self._last_epoch


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


class _Subscriber:
    """Empties a backlog into a call. Its task waits for either side, never per item."""

    def __init__(self, call: Call, backlog: KvBacklog) -> None:
        self.call = call
        self.overrun = False
        self.on_overrun: Callable[[], None] | None = None
        self._backlog = backlog
        self._more = asyncio.Event()

    def push(self, items: Sequence[KvItem]) -> None:
        if self.overrun:
            return
        if all(map(self._backlog.push, items)):
            self._more.set()
            return
        self.overrun = True
        self._backlog.discard()
        message = f"the reader of {KV_EVENTS_ENDPOINT} fell too far behind; subscribe again for a new snapshot"
        self.call.end(StatorError(ErrorCode.SLOW_READER, message))
        if self.on_overrun is not None:
            self.on_overrun()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._more.clear()
                items = self._backlog.take()
                if items:
                    self.call.items(items)
                    await self.call.writable()
                else:
                    await self._more.wait()
        except StatorError:
            pass  # the call was cancelled: nobody listens any more


class _Feed:
    """One listener at the engine, for all subscribers with one stride."""

    def __init__(self, engine: WatchesKv, epoch: int, stride: int) -> None:
        self.stride = stride
        self.subscribers: dict[_Subscriber, None] = {}
        self._source = KvSource(epoch, stride=stride)
        self._loop = asyncio.get_running_loop()
        self._flush_timer: asyncio.Handle | None = None
        self._last_flush = self._loop.time() - FLUSH_EVERY_S
        self._unwatch = engine.watch_kv(self._listen)
        self._flush()
        self._digest_timer = self._loop.call_later(DIGEST_INTERVAL_S, self._digest)

    def backlog(self, limits: BacklogLimits) -> KvBacklog:
        """For a new subscriber: a snapshot of now."""
        self._flush()
        return KvBacklog(self._source.snapshot(), limits)

    def close(self) -> None:
        self._unwatch()
        self._digest_timer.cancel()
        if self._flush_timer is not None:
            self._flush_timer.cancel()

    def _listen(self, events: Sequence[KvEvent]) -> None:
        self._source.apply(events)
        if self._flush_timer is None:
            # At once after a quiet time, so that a router soon knows; bundled in a busy one.
            self._flush_timer = self._loop.call_at(self._last_flush + FLUSH_EVERY_S, self._flush)

    def _flush(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        changes = self._source.take_changes()
        if changes:
            self._last_flush = self._loop.time()
            self._push(changes)

    def _digest(self) -> None:
        self._digest_timer = self._loop.call_later(DIGEST_INTERVAL_S, self._digest)
        self._flush()
        self._push([self._source.digest()])

    def _push(self, items: Sequence[KvItem]) -> None:
        for subscriber in self.subscribers:
            subscriber.push(items)
