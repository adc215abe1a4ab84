"""Discovery over the request plane, from the hub in the head's process."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator

from stator.core.key_view import KeyView
from stator.discovery.base import DEFAULT_LEASE_TTL_S, RETURN_WINDOW_S, KeyValue, Lease, WatchBatch
from stator.discovery.kept_lease import Granted, LeaseBook
from stator.hub import messages as m
from stator.hub.client import DEFAULT_TIMEOUT_S, HubClient
from stator.ids import LeaseId
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner
from stator.transport.base import TransportClient

logger = logging.getLogger(__name__)


class _Leases:
    """`kept_lease.LeaseServer` over the hub's endpoints."""

    def __init__(self, hub: HubClient) -> None:
        self._hub = hub
        self.name = hub.name
        self.timeout_s = hub.timeout_s
        self.random_source = hub.random_source
        self.pause = hub.pause

    @property
    def closed(self) -> bool:
        return self._hub.closed

    async def grant(self, ttl_s: float) -> Granted:
        answer = await self._hub.ask_for_answer(m.GRANT_LEASE, m.GrantLease(self._hub.namespace, ttl_s))
        return Granted(LeaseId(answer.value), answer.epoch)

    async def renew(self, lease_id: LeaseId, timeout_s: float) -> tuple[bool, int]:
        request = m.LeaseRequest(self._hub.namespace, lease_id)
        answer = await self._hub.ask_for_answer(m.RENEW_LEASE, request, timeout_s=timeout_s)
        return bool(answer.value), answer.epoch

    async def revoke(self, lease_id: LeaseId) -> None:
        await self._hub.ask(m.REVOKE_LEASE, m.LeaseRequest(self._hub.namespace, lease_id))

    async def put_key(self, key: str, value: bytes, lease_id: LeaseId | None, *, only_if_absent: bool) -> int:
        return await self._hub.ask(m.PUT_KEY, m.PutKey(self._hub.namespace, key, value, lease_id, only_if_absent))

    async def get_key(self, key: str) -> KeyValue | None:
        found = await self._hub.collect(m.GET_KEYS, m.GetKeys(self._hub.namespace, key), KeyValue)
        return found[0] if found else None


_Parts = AsyncGenerator[tuple[bool, m.WatchPart | None], None]


class HubDiscovery:
    """The discovery seam; guarantees as in `discovery.base`.

    addresses: of the hub's request plane, tried in order. The transport client is the caller's and stays open.
    timeout_s: for each call; past it, StatorError(INSTANCE_LOST) names the hub's address.
    random_source: for the jitter of retries. return_window_s: leases return to a hub that was started again spread
    over that time. grace_s: how long watches here wait for others' return; longer than a TTL and that window.
    """

    def __init__(
        self,
        client: TransportClient,
        addresses: tuple[str, ...],
        *,
        namespace: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        random_source: random.Random | None = None,
        return_window_s: float = RETURN_WINDOW_S,
        grace_s: float = DEFAULT_LEASE_TTL_S + RETURN_WINDOW_S,
    ) -> None:
        self._hub = HubClient(
            client,
            addresses,
            namespace=namespace,
            timeout_s=timeout_s,
            random_source=random_source or random.SystemRandom(),
        )
        self._grace_s = grace_s
        self._tasks = TaskOwner("hub discovery")
        self._server = _Leases(self._hub)
        self._book = LeaseBook(self._server, self._tasks, return_window_s)

    async def grant_lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        return await self._book.grant(ttl_s)

    async def end_lease(self, lease_id: LeaseId) -> bool:
        return bool(await self._hub.ask(m.REVOKE_LEASE, m.LeaseRequest(self._hub.namespace, lease_id)))

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        return await self._book.put(key, value, lease, only_if_absent=False)

    async def create(self, key: str, value: bytes, lease: Lease | None = None) -> bool:
        return bool(await self._book.put(key, value, lease, only_if_absent=True))

    async def get(self, key: str) -> KeyValue | None:
        return await self._server.get_key(key)

    async def get_prefix(self, prefix: str) -> list[KeyValue]:
        return await self._hub.collect(m.GET_KEYS, m.GetKeys(self._hub.namespace, prefix, prefix=True), KeyValue)

    async def delete(self, key: str) -> bool:
        self._book.forget(key)
        return bool(await self._hub.ask(m.DELETE_KEY, m.DeleteKey(self._hub.namespace, key)))

    async def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        view = KeyView(self._grace_s)
        joiner = m.BatchJoiner()
        epoch: int | None = None
        parts = self._hub.follow(m.WATCH_KEYS, m.WatchKeys(self._hub.namespace, prefix), m.WatchPart)
        async with contextlib.aclosing(self._parts_and_ticks(parts, view)) as news:
            async for first, part in news:
                if part is None:
                    if (ended := view.tick(loop_time())) is not None:
                        yield ended
                    continue
                if first:
                    # The rest of a batch that the last connection broke off never comes.
                    joiner = m.BatchJoiner()
                if epoch not in (None, part.epoch):
                    self._book.check_soon()
                epoch = part.epoch
                batch = joiner.add(part)
                if batch is not None:
                    yield view.receive(batch, epoch, loop_time())

    async def close(self) -> None:
        self._book.stop()
        await self._hub.close()
        await self._tasks.close()

    async def _parts_and_ticks(self, parts: _Parts, view: KeyView) -> _Parts:
        """The parts, and a None whenever the view has something to give up (or the hub was lost, which is the same to
        the view)."""
        waiting: asyncio.Task[tuple[bool, m.WatchPart | None] | None] | None = None
        try:
            while True:
                deadline = view.next_deadline
                if deadline is None and waiting is None:
                    part = await _next(parts)
                else:
                    if waiting is None:
                        waiting = self._tasks.spawn(_next(parts), "wait for a change")
                    timeout_s = None if deadline is None else max(0.0, deadline - loop_time())
                    if not (await asyncio.wait([waiting], timeout=timeout_s))[0]:
                        yield False, None
                        continue
                    part, waiting = waiting.result(), None
                if part is None:
                    return
                yield part
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.wait([waiting])
            await parts.aclose()


async def _next(parts: _Parts) -> tuple[bool, m.WatchPart | None] | None:
    """None: there is no further one."""
    return await anext(parts, None)
