"""Discovery in one process: a clock and callbacks around `core.key_store`.

`MemoryKeyStore` is one namespace's state; the hub owns one for each of its namespaces. `MemoryDiscovery` is the seam
on top of it for callers in the same process, and renews the leases that it granted.
"""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable

from stator.core import key_store as core
from stator.discovery.base import DEFAULT_LEASE_TTL_S, KeyValue, Lease, WatchBatch
from stator.errors import ErrorCode, StatorError
from stator.ids import LeaseId
from stator.runtime.clock import Clock, LoopClock

logger = logging.getLogger(__name__)

MAX_PENDING_BATCHES = 1_024
"""A watcher further behind than that gets the whole state instead of the batches it has not taken."""

LeaseListener = Callable[[LeaseId], None]


class Watcher:
    """One watch of a store: batches between it and one reader."""

    def __init__(self, restart: Callable[[], None], stop: Callable[[], None]) -> None:
        self._restart = restart
        self._stop = stop
        self._pending: deque[WatchBatch] = deque()
        self._changed = asyncio.Event()
        self._behind = False
        self._closed = False

    def push(self, batch: WatchBatch) -> None:
        if not self._behind:
            self._pending.append(batch)
            self._behind = len(self._pending) > MAX_PENDING_BATCHES
        self._changed.set()

    def close(self) -> None:
        """Idempotent. The reader's loop ends without the batches that it has not taken."""
        if not self._closed:
            self._closed = True
            self._changed.set()
            self._stop()

    async def batches(self) -> AsyncGenerator[WatchBatch, None]:
        try:
            while not self._closed:
                if self._behind:
                    self._pending.clear()
                    self._behind = False
                    self._restart()
                if self._pending:
                    yield self._pending.popleft()
                else:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            self.close()


class MemoryKeyStore:
    """Must be used on one event loop. Methods never wait; they raise StatorError as the seam says.

    random_source: draws lease ids, which must not repeat over the lives of a server. clock: that leases run on.
    """

    def __init__(
        self,
        limits: core.KeyStoreLimits | None = None,
        *,
        random_source: random.Random | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._limits = limits
        self._clock = clock or LoopClock()
        self._random = random_source or random.SystemRandom()
        self._core: core.KeyStore | None = None
        self._watchers: dict[int, Watcher] = {}
        self._next_watch_id = 1
        self._lease_listeners: list[LeaseListener] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._closed = False

    def grant(self, ttl_s: float) -> LeaseId:
        lease_id = LeaseId(self._random.getrandbits(63))
        self._run(core.GrantLease(lease_id, ttl_s))
        return lease_id

    def renew(self, lease_id: LeaseId) -> bool:
        return bool(self._run(core.RenewLease(lease_id)))

    def revoke(self, lease_id: LeaseId) -> bool:
        return bool(self._run(core.RevokeLease(lease_id)))

    def has_lease(self, lease_id: LeaseId) -> bool:
        return self._core is not None and self._core.has_lease(lease_id, self._clock.now())

    def leases(self) -> list[tuple[LeaseId, float, float, float]]:
        """Living ones: id, ttl_s, seconds left and age in seconds."""
        return [] if self._core is None else self._core.leases(self._clock.now())

    def put(self, key: str, value: bytes, lease_id: LeaseId | None = None) -> int:
        return int(self._run(core.Put(key, value, lease_id)))

    def create(self, key: str, value: bytes, lease_id: LeaseId | None = None) -> bool:
        return bool(self._run(core.Put(key, value, lease_id, only_if_absent=True)))

    def delete(self, key: str) -> bool:
        return bool(self._run(core.Delete(key)))

    def get(self, key: str) -> KeyValue | None:
        return next(iter(self._find(core.Get(key))), None)

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        return self._find(core.GetPrefix(prefix))

    def watch(self, prefix: str) -> Watcher:
        """The whole state is the watcher's first batch. It must be closed."""
        watch_id = self._next_watch_id
        self._next_watch_id += 1

        def start() -> None:
            self._run(core.Watch(watch_id, prefix))

        def stop() -> None:
            del self._watchers[watch_id]
            if not self._closed:
                self._run(core.Unwatch(watch_id))

        watcher = self._watchers[watch_id] = Watcher(start, stop)
        try:
            start()
        except StatorError:
            del self._watchers[watch_id]
            raise
        return watcher

    def on_lease_end(self, listener: LeaseListener) -> Callable[[], None]:
        """Calls listener, which must not raise, for every lease that ends. Returns the function that stops it."""
        self._lease_listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._lease_listeners:
                self._lease_listeners.remove(listener)

        return unsubscribe

    def close(self) -> None:
        """End every watch and the timer. The state is gone; every later call raises INSTANCE_LOST."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for watcher in list(self._watchers.values()):
            watcher.close()

    def _find(self, event: core.Get | core.GetPrefix) -> list[KeyValue]:
        answer = self._handle(event)
        assert isinstance(answer, core.Found)
        return list(answer.entries)

    def _run(self, event: core.Event) -> int:
        answer = self._handle(event)
        assert isinstance(answer, core.Answer)
        return answer.value

    def _handle(self, event: core.Event) -> core.Effect | None:
        if self._closed:
            raise StatorError(ErrorCode.INSTANCE_LOST, "this discovery store is closed")
        now = self._clock.now()
        if self._core is None:
            # The clock does not go back when a process is started again on the same machine, so neither do revisions.
            self._core = core.KeyStore(self._limits, first_revision=int(now * 1_000_000))
        answer: core.Effect | None = None
        for effect in self._core.handle(event, now):
            match effect:
                case core.Notify():
                    self._watchers[effect.watch_id].push(effect.batch)
                case core.LeaseEnded():
                    self._tell_lease_end(effect)
                case _:
                    answer = effect
        self._set_timer()
        if isinstance(answer, core.Refused):
            raise StatorError(answer.code, answer.message)
        return answer

    def _tell_lease_end(self, effect: core.LeaseEnded) -> None:
        logger.info("lease %d %s", effect.lease_id, "expired" if effect.expired else "was revoked")
        for listener in list(self._lease_listeners):
            listener(effect.lease_id)

    def _set_timer(self) -> None:
        assert self._core is not None
        deadline = self._core.next_deadline
        if deadline == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = deadline
        if deadline is not None and not self._closed:
            self._timer = asyncio.get_running_loop().call_at(self._clock.on_loop(deadline), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = None
        self._handle(core.Tick())


class MemoryLease:
    """Granted by MemoryDiscovery. `lost` is also set by a revoke: either way the keys are gone."""

    def __init__(self, store: MemoryKeyStore, lease_id: LeaseId, ttl_s: float) -> None:
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self.lost = asyncio.Event()
        self._store = store
        self._timer: asyncio.TimerHandle | None = None
        self._renew_later()

    async def revoke(self) -> None:
        self.stop_renewal()
        if not self.lost.is_set():
            with contextlib.suppress(StatorError):
                self._store.revoke(self.lease_id)
            self.lost.set()

    def stop_renewal(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self) -> None:
        self.stop_renewal()
        self.lost.set()

    def _renew_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.ttl_s / 3, self._renew)

    def _renew(self) -> None:
        self._timer = None
        try:
            alive = self._store.renew(self.lease_id)
        except StatorError:
            alive = False
        if alive:
            self._renew_later()
        else:
            self.end()


class MemoryDiscovery:
    """The discovery seam in one process. store: shared with others in the process; without one, its own.

    `close` stops the renewal of the leases granted here, as the end of a process would, and closes a store of its own.
    """

    def __init__(self, store: MemoryKeyStore | None = None) -> None:
        self._owns_store = store is None
        self.store = store or MemoryKeyStore()
        self._leases: dict[LeaseId, MemoryLease] = {}
        self._watches: dict[Watcher, None] = {}
        self._unsubscribe = self.store.on_lease_end(self._lease_ended)
        self._closed = False

    async def grant_lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        self._check_open()
        lease = MemoryLease(self.store, self.store.grant(ttl_s), ttl_s)
        self._leases[lease.lease_id] = lease
        return lease

    async def end_lease(self, lease_id: LeaseId) -> bool:
        self._check_open()
        return self.store.revoke(lease_id)

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        self._check_open()
        return self.store.put(key, value, None if lease is None else lease.lease_id)

    async def create(self, key: str, value: bytes, lease: Lease | None = None) -> bool:
        self._check_open()
        return self.store.create(key, value, None if lease is None else lease.lease_id)

    async def get(self, key: str) -> KeyValue | None:
        self._check_open()
        return self.store.get(key)

    async def get_prefix(self, prefix: str) -> list[KeyValue]:
        self._check_open()
        return self.store.get_prefix(prefix)

    async def delete(self, key: str) -> bool:
        self._check_open()
        return self.store.delete(key)

    async def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        self._check_open()
        watcher = self.store.watch(prefix)
        self._watches[watcher] = None
        try:
            async with contextlib.aclosing(watcher.batches()) as batches:
                async for batch in batches:
                    yield batch
        finally:
            watcher.close()
            self._watches.pop(watcher, None)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        for lease in self._leases.values():
            lease.stop_renewal()
        for watcher in list(self._watches):
            watcher.close()
        if self._owns_store:
            self.store.close()

    def _lease_ended(self, lease_id: LeaseId) -> None:
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            lease.end()

    def _check_open(self) -> None:
        if self._closed:
            raise StatorError(ErrorCode.INSTANCE_LOST, "this discovery client is closed")
