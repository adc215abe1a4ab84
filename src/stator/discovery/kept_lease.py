"""A lease as its holder keeps it: renewed, taken again from a server that came back without its state, or lost.

What the server says decides, never time alone:

- A renewal that is answered keeps it.
- No answer: the server is away. The holder goes on and asks again, with growing pauses.
- "Unknown", from a server of the same epoch: the lease has ended there and others were told so. It is `lost`.
- Another epoch: that server never knew it. After a wait drawn from the return window the holder takes a lease there and
  puts again, under it, what it had put under the old one.

A holder whose process stood still asks as soon as it runs again, since its renewal is overdue then.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from stator.core.key_store import KeyValue
from stator.discovery.base import Lease
from stator.errors import ErrorCode, StatorError
from stator.hub.client import MAX_BACKOFF_S, Backoff
from stator.ids import LeaseId
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3
MIN_RETRIES_PER_TTL = 5


@dataclass(frozen=True, slots=True)
class Granted:
    """epoch: of the server's state, which the lease belongs to."""

    lease_id: LeaseId
    epoch: int


class LeaseServer(Protocol):
    """What keeps leases, as its discovery client reaches it. Methods raise StatorError as `discovery.base` says."""

    @property
    def name(self) -> str: ...

    @property
    def timeout_s(self) -> float: ...

    @property
    def random_source(self) -> Random: ...

    @property
    def closed(self) -> bool: ...

    async def pause(self, wait_s: float) -> None:
        """Returns after wait_s, or when the client is closed."""
        ...

    async def grant(self, ttl_s: float) -> Granted: ...

    async def renew(self, lease_id: LeaseId, timeout_s: float) -> tuple[bool, int]:
        """Whether it lives, and the epoch of who says so."""
        ...

    async def revoke(self, lease_id: LeaseId) -> None: ...

    async def put_key(self, key: str, value: bytes, lease_id: LeaseId | None, *, only_if_absent: bool) -> int:
        """The revision; only_if_absent: 0 if it was there."""
        ...

    async def get_key(self, key: str) -> KeyValue | None: ...


@dataclass(slots=True)
class _Published:
    """there: as far as is known, the server that granted the present lease has it."""

    value: bytes
    only_if_absent: bool = False
    there: bool = False


class KeptLease:
    """Granted by a discovery client, which tells it what is put under it.

    granted_at: when it was asked for, on the loop's clock.
    """

    def __init__(
        self, server: LeaseServer, granted: Granted, ttl_s: float, granted_at: float, return_window_s: float
    ) -> None:
        self.lease_id = granted.lease_id
        self.ttl_s = ttl_s
        self.lost = asyncio.Event()
        self._server = server
        self._epoch = granted.epoch
        self._renewed_at = granted_at
        self._return_window_s = return_window_s
        self._keys: dict[str, _Published] = {}
        self._wanted = asyncio.Event()
        self._round_over = asyncio.Event()
        self._rounds_begun = self._rounds_over = 0
        self._stopped = False
        self._away = False
        self._renewal: asyncio.Task[None] | None = None

    async def revoke(self) -> None:
        if self.lost.is_set():
            return
        self.end()
        with contextlib.suppress(StatorError):
            await self._server.revoke(self.lease_id)

    def start_renewal(self, tasks: TaskOwner) -> None:
        self._renewal = tasks.spawn(self._keep_alive(), f"renew lease {self.lease_id}")

    def end(self) -> None:
        """The keys are gone. Idempotent."""
        self.lost.set()
        self.stop_renewal()

    def stop_renewal(self) -> None:
        self._stopped = True
        self._round_over.set()
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None

    # What is put under it.

    def publish(self, key: str, value: bytes) -> Callable[[], None]:
        """It is being put; if the server cannot be reached, with the next renewal that gets through.

        Returns the function that takes this back, for a put that is refused."""
        before = self._keys.get(key)
        now = self._keys[key] = _Published(value)

        def take_back() -> None:
            if self._keys.get(key) is now:
                self.forget(key)
                if before is not None:
                    self._keys[key] = before

        return take_back

    def published(self, key: str, value: bytes, *, only_if_absent: bool) -> None:
        """The server has it."""
        known = self._keys.get(key)
        if known is None or known.value == value:
            self._keys[key] = _Published(value, only_if_absent, there=True)

    def forget(self, key: str) -> None:
        """It was deleted, or put under another lease or none."""
        self._keys.pop(key, None)

    # Renewal.

    def check_soon(self) -> None:
        """Ask the server now, not only when the next renewal is due."""
        self._wanted.set()

    async def check(self) -> None:
        """Returns when the server has been asked, and has been told everything if it is another; or could not be."""
        if self._renewal is None:
            return
        self.check_soon()
        # Not the round that is under way: it may be waiting for a server that was there before.
        wanted = self._rounds_begun + 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._server.timeout_s + self._return_window_s):
                while self._rounds_over < wanted and not (self._stopped or self.lost.is_set()):
                    over = self._round_over
                    await over.wait()

    async def _keep_alive(self) -> None:
        interval_s = self.ttl_s / RENEWALS_PER_TTL
        backoff = Backoff(self._server.random_source, min(MAX_BACKOFF_S, self.ttl_s / MIN_RETRIES_PER_TTL))
        wait_s = self._renewed_at + interval_s - loop_time()
        while not self.lost.is_set():
            await self._wait(max(0.0, wait_s))
            sent_at = loop_time()
            self._rounds_begun += 1
            try:
                await self._renew(min(interval_s, self._server.timeout_s))
                await self._put_missing()
            except StatorError as error:
                self._complain(error)
                wait_s = backoff.next_s()
            else:
                self._away = False
                self._renewed_at = sent_at
                backoff.reset()
                wait_s = sent_at + interval_s - loop_time()
            self._rounds_over = self._rounds_begun
            over, self._round_over = self._round_over, asyncio.Event()
            over.set()

    async def _wait(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._wanted.wait()
        self._wanted.clear()

    def _complain(self, error: StatorError) -> None:
        if not self._away:
            self._away = True
            logger.warning("could not renew lease %d; going on and trying again: %s", self.lease_id, error.message)

    async def _renew(self, timeout_s: float) -> None:
        alive, epoch = await self._server.renew(self.lease_id, timeout_s)
        if epoch == self._epoch:
            if not alive:
                self._lose(f"{self._server.name} has ended it (no renewal came for {self.ttl_s:g} s)")
            return
        wait_s = self._server.random_source.uniform(0.0, self._return_window_s)
        logger.warning("%s is without its state of before; registering again in %.1f s", self._server.name, wait_s)
        await self._server.pause(wait_s)
        if not (self.lost.is_set() or self._server.closed):
            await self._take_again()

    async def _take_again(self) -> None:
        granted = await self._server.grant(self.ttl_s)
        self.lease_id = granted.lease_id
        self._epoch = granted.epoch
        for published in self._keys.values():
            published.there = False

    async def _put_missing(self) -> None:
        for key, published in list(self._keys.items()):
            if published.there or self.lost.is_set() or self._keys.get(key) is not published:
                continue
            only_if_absent = published.only_if_absent
            put = self._server.put_key(key, published.value, self.lease_id, only_if_absent=only_if_absent)
            if await put or await self._is_ours(key):
                published.there = True
            else:
                self._lose(f"{key!r}, which must be had by one alone, is now another's")

    async def _is_ours(self, key: str) -> bool:
        """A put whose answer did not arrive may have been done."""
        found = await self._server.get_key(key)
        return found is not None and found.lease_id == self.lease_id

    def _lose(self, why: str) -> None:
        logger.error("lease %d is lost: %s", self.lease_id, why)
        self.lost.set()


class LeaseBook:
    """The leases of one discovery client, and what it puts under them.

    tasks: renews them. return_window_s: they return to a server without its state spread over that time.
    """

    def __init__(self, server: LeaseServer, tasks: TaskOwner, return_window_s: float) -> None:
        self._server = server
        self._tasks = tasks
        self._return_window_s = return_window_s
        self._leases: dict[KeptLease, None] = {}

    async def grant(self, ttl_s: float) -> KeptLease:
        sent_at = loop_time()
        lease = KeptLease(self._server, await self._server.grant(ttl_s), ttl_s, sent_at, self._return_window_s)
        self._leases = {known: None for known in self._leases if not known.lost.is_set()} | {lease: None}
        lease.start_renewal(self._tasks)
        return lease

    def find(self, lease_id: LeaseId) -> KeptLease | None:
        """The living lease that has this id now."""
        return next((lease for lease in self._leases if lease.lease_id == lease_id and not lease.lost.is_set()), None)

    def own(self, lease: Lease | None) -> KeptLease | None:
        return lease if isinstance(lease, KeptLease) and lease in self._leases else None

    async def put(self, key: str, value: bytes, lease: Lease | None, *, only_if_absent: bool) -> int:
        """Returns and raises as `Discovery.put` and, with only_if_absent, `Discovery.create` (0 for False)."""
        if lease is not None and lease.lost.is_set():
            message = f"lease {lease.lease_id} of key {key!r} has ended; take a new lease"
            raise StatorError(ErrorCode.NOT_FOUND, message)
        own = self.own(lease)
        take_back: Callable[[], None] | None = None
        if not only_if_absent:
            for other in self._leases:
                if other is not own:
                    other.forget(key)
            take_back = None if own is None else own.publish(key, value)
        try:
            revision = await self._send_put(key, value, lease, own, only_if_absent=only_if_absent)
        except StatorError as error:
            if take_back is not None and error.code is not ErrorCode.INSTANCE_LOST:
                take_back()
            raise
        if own is not None and revision:
            own.published(key, value, only_if_absent=only_if_absent)
        return revision

    def forget(self, key: str) -> None:
        """It is being deleted."""
        for lease in self._leases:
            lease.forget(key)

    def check_soon(self) -> None:
        """The server has another epoch."""
        for lease in self._leases:
            lease.check_soon()

    def stop(self) -> None:
        for lease in self._leases:
            lease.stop_renewal()

    async def _send_put(
        self, key: str, value: bytes, lease: Lease | None, own: KeptLease | None, *, only_if_absent: bool
    ) -> int:
        lease_id = None if lease is None else lease.lease_id
        try:
            return await self._server.put_key(key, value, lease_id, only_if_absent=only_if_absent)
        except StatorError as error:
            if error.code is not ErrorCode.NOT_FOUND or own is None:
                raise
            # The server may be one that has not heard of this lease yet.
            await own.check()
            if own.lost.is_set() or own.lease_id == lease_id:
                raise
        return await self._server.put_key(key, value, own.lease_id, only_if_absent=only_if_absent)
