"""Discovery over the request plane, from the hub in the head's process."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator

from stator.discovery.base import DEFAULT_LEASE_TTL_S, KeyValue, Lease, WatchBatch
from stator.errors import ErrorCode, StatorError
from stator.hub import messages as m
from stator.hub.client import DEFAULT_TIMEOUT_S, HubClient
from stator.ids import LeaseId
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner
from stator.transport.base import TransportClient

logger = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3
RETRIES_PER_TTL = 20


class HubLease:
    """Granted by HubDiscovery.

    Fences itself: the hub counts the TTL from when a renewal reaches it, this end from when it was sent, so `lost` is
    set here before the hub gives the keys up.
    """

    def __init__(self, hub: HubClient, lease_id: LeaseId, ttl_s: float, granted_at: float) -> None:
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self.lost = asyncio.Event()
        self._hub = hub
        self._renewed_at = granted_at
        self._fence = self._set_fence()
        self._renewal: asyncio.Task[None] | None = None

    async def revoke(self) -> None:
        if self.lost.is_set():
            return
        self.end()
        with contextlib.suppress(StatorError):
            await self._hub.ask(m.REVOKE_LEASE, m.LeaseRequest(self._hub.namespace, self.lease_id))

    def start_renewal(self, tasks: TaskOwner) -> None:
        self._renewal = tasks.spawn(self._keep_alive(), f"renew lease {self.lease_id}")

    def end(self) -> None:
        """The keys are gone, or must be taken for gone. Idempotent."""
        self.lost.set()
        self.stop_renewal()

    def stop_renewal(self) -> None:
        self._fence.cancel()
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None

    def _set_fence(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_at(self._renewed_at + self.ttl_s, self._fence_off)

    def _fence_off(self) -> None:
        logger.error(
            "lease %d is lost: %s confirmed no renewal for %g s; this instance must assume that its keys are gone",
            self.lease_id,
            self._hub.name,
            self.ttl_s,
        )
        self.end()

    async def _keep_alive(self) -> None:
        interval_s = self.ttl_s / RENEWALS_PER_TTL
        retrying = False
        while not self.lost.is_set():
            wait_s = self.ttl_s / RETRIES_PER_TTL * self._hub.random_source.uniform(0.5, 1.0)
            if not retrying:
                wait_s = self._renewed_at + interval_s - loop_time()
            await asyncio.sleep(max(0.0, wait_s))
            sent_at = loop_time()
            try:
                alive = await self._renew(min(interval_s, self._hub.timeout_s))
            except StatorError as error:
                if not retrying:
                    logger.warning("could not renew lease %d, trying again: %s", self.lease_id, error.message)
                retrying = True
                continue
            retrying = False
            if not alive:
                logger.error("lease %d is lost: %s does not know it", self.lease_id, self._hub.name)
                self.lost.set()
                self._fence.cancel()
            elif not self.lost.is_set():
                self._renewed_at = sent_at
                self._fence.cancel()
                self._fence = self._set_fence()

    async def _renew(self, timeout_s: float) -> bool:
        request = m.LeaseRequest(self._hub.namespace, self.lease_id)
        return bool(await self._hub.ask(m.RENEW_LEASE, request, timeout_s=timeout_s))


class HubDiscovery:
    """The discovery seam; guarantees as in `discovery.base`.

    addresses: of the hub's request plane, tried in order. The transport client is the caller's and stays open.
    timeout_s: for each call; past it, StatorError(INSTANCE_LOST) names the hub's address.
    random_source: for the jitter of retries.
    """

    def __init__(
        self,
        client: TransportClient,
        addresses: tuple[str, ...],
        *,
        namespace: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        random_source: random.Random | None = None,
    ) -> None:
        self._hub = HubClient(
            client,
            addresses,
            namespace=namespace,
            timeout_s=timeout_s,
            random_source=random_source or random.SystemRandom(),
        )
        self._tasks = TaskOwner("hub discovery")
        self._leases: set[HubLease] = set()

    async def grant_lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        sent_at = loop_time()
        lease_id = await self._hub.ask(m.GRANT_LEASE, m.GrantLease(self._hub.namespace, ttl_s))
        lease = HubLease(self._hub, LeaseId(lease_id), ttl_s, sent_at)
        self._leases = {known for known in self._leases if not known.lost.is_set()} | {lease}
        lease.start_renewal(self._tasks)
        return lease

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        return await self._put(key, value, lease, only_if_absent=False)

    async def create(self, key: str, value: bytes, lease: Lease | None = None) -> bool:
        return bool(await self._put(key, value, lease, only_if_absent=True))

    async def get(self, key: str) -> KeyValue | None:
        found = await self._hub.collect(m.GET_KEYS, m.GetKeys(self._hub.namespace, key), KeyValue)
        return found[0] if found else None

    async def get_prefix(self, prefix: str) -> list[KeyValue]:
        return await self._hub.collect(m.GET_KEYS, m.GetKeys(self._hub.namespace, prefix, prefix=True), KeyValue)

    async def delete(self, key: str) -> bool:
        return bool(await self._hub.ask(m.DELETE_KEY, m.DeleteKey(self._hub.namespace, key)))

    async def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        joiner = m.BatchJoiner()
        parts = self._hub.follow(m.WATCH_KEYS, m.WatchKeys(self._hub.namespace, prefix), m.WatchPart)
        async with contextlib.aclosing(parts):
            async for first, part in parts:
                if first:
                    # The rest of a batch that the last connection broke off never comes.
                    joiner = m.BatchJoiner()
                batch = joiner.add(part)
                if batch is not None:
                    yield batch

    async def close(self) -> None:
        for lease in self._leases:
            lease.stop_renewal()
        await self._hub.close()
        await self._tasks.close()

    async def _put(self, key: str, value: bytes, lease: Lease | None, *, only_if_absent: bool) -> int:
        if lease is not None and lease.lost.is_set():
            message = f"lease {lease.lease_id} of key {key!r} has ended; take a new lease"
            raise StatorError(ErrorCode.NOT_FOUND, message)
        lease_id = None if lease is None else lease.lease_id
        request = m.PutKey(self._hub.namespace, key, value, lease_id, only_if_absent)
        return await self._hub.ask(m.PUT_KEY, request)
