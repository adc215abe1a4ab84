"""Discovery in etcd v3, over the HTTP/JSON gateway of its members.

Keys are `/stator/NAMESPACE/KEY`. One key of ours, `/stator/NAMESPACE/` and EPOCH_KEY, is drawn at random by whoever
finds it missing: a store (or a namespace in it) that was wiped has another one, which etcd itself does not tell, since
a cluster that is set up again in the same way has the same id. A store that was put back to an older copy shows a
revision below what this client has seen, and counts as another, too.

What etcd does differently from the hub: leases last whole seconds, two at least with its usual election timeout; after
it was down, and whenever its leader changes, it gives every lease its whole TTL again; revisions of a wiped store begin
again at 1. A watch that was cut off goes on where it was and has no need of a whole state, unless that was compacted.
"""

import asyncio
import base64
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Mapping
from random import Random, SystemRandom
from typing import Any

import msgspec

from stator.config.external import EtcdSettings
from stator.core.etcd_watch import Entry, Header, Next, WatchCursor, WatchResponse, entry_of
from stator.core.key_store import KeyStoreLimits
from stator.core.key_view import KeyView
from stator.discovery.base import DEFAULT_LEASE_TTL_S, RETURN_WINDOW_S, KeyValue, Lease, WatchBatch
from stator.discovery.etcd_gateway import EtcdGateway, EtcdStream
from stator.discovery.kept_lease import Granted, KeptLease, LeaseBook
from stator.errors import ErrorCode, StatorError
from stator.hub.client import DEFAULT_TIMEOUT_S, Backoff
from stator.ids import LeaseId
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

ROOT = "/stator/"
EPOCH_KEY = ".epoch"
PROBE_S = 5.0
"""How often a watch asks its member whether it still has the majority's word, and whether the store is the same."""

_FINAL = (ErrorCode.UNAUTHORIZED, ErrorCode.INVALID_REQUEST, ErrorCode.PROTOCOL)


class _Range(msgspec.Struct, frozen=True):
    header: Header = Header()
    kvs: tuple[Entry, ...] = ()


class _Deleted(msgspec.Struct, frozen=True):
    deleted: int = 0


class _Granted(msgspec.Struct, frozen=True):
    ID: int = 0
    TTL: int = 0


class _TimeToLive(msgspec.Struct, frozen=True):
    TTL: int = 0
    grantedTTL: int = 0


class _KeptAlive(msgspec.Struct, frozen=True):
    result: _Granted = _Granted()


class _Response(msgspec.Struct, frozen=True):
    response_range: _Range | None = None


class _Txn(msgspec.Struct, frozen=True):
    header: Header = Header()
    succeeded: bool = False
    responses: tuple[_Response, ...] = ()


class _Anything(msgspec.Struct, frozen=True):
    pass


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _range_end(prefix: bytes) -> bytes:
    """The first key after all that begin with prefix, which is not empty and has no byte of 255 at its end."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


class _Server:
    """One namespace of one etcd: the calls, and what is known of its epoch. A `kept_lease.LeaseServer`."""

    def __init__(self, gateway: EtcdGateway, namespace: str) -> None:
        self.gateway = gateway
        self.name = gateway.name
        self.timeout_s = gateway.timeout_s
        self.random_source = gateway.random_source
        self.prefix = f"{ROOT}{namespace}/".encode()
        self._epoch_name = self.key(EPOCH_KEY)
        self._drawn: tuple[bytes, int] | None = None
        self._epoch = 0
        self._revision = 0

    @property
    def closed(self) -> bool:
        return self.gateway.closed.is_set()

    @property
    def epoch(self) -> int:
        return self._epoch

    async def pause(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self.gateway.closed.wait()

    def key(self, key: str) -> bytes:
        return self.prefix + key.encode()

    async def call(self, path: str, body: Mapping[str, Any], kind: type[Any], timeout_s: float | None = None) -> Any:
        return (await self.gateway.call(path, body, kind, timeout_s=timeout_s))[0]

    # Leases.

    async def grant(self, ttl_s: float) -> Granted:
        epoch = await self.read_epoch()
        lease_id = self.random_source.getrandbits(62) + 1
        body = {"TTL": str(math.ceil(ttl_s)), "ID": str(lease_id)}
        await self.gateway.call("/v3/lease/grant", body, _Granted, exists=_Granted(lease_id))
        return Granted(LeaseId(lease_id), epoch)

    async def renew(self, lease_id: LeaseId, timeout_s: float) -> tuple[bool, int]:
        kept: _KeptAlive = await self.call("/v3/lease/keepalive", {"ID": str(lease_id)}, _KeptAlive, timeout_s)
        return kept.result.TTL > 0, await self.read_epoch(timeout_s)

    async def revoke(self, lease_id: LeaseId) -> None:
        await self.call("/v3/lease/revoke", {"ID": str(lease_id)}, _Anything)

    async def put_key(self, key: str, value: bytes, lease_id: LeaseId | None, *, only_if_absent: bool) -> int:
        body = {"key": _b64(self.key(key)), "value": _b64(value), "lease": str(lease_id or 0)}
        if not only_if_absent:
            return await self._put_over(body)
        absent = {"key": body["key"], "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        txn = {
            "compare": [absent],
            "success": [{"request_put": body}],
            "failure": [{"request_range": {"key": body["key"]}}],
        }
        done, tried = await self.gateway.call("/v3/kv/txn", txn, _Txn)
        if done.succeeded:
            return done.header.revision
        found = next((r.response_range for r in done.responses if r.response_range), _Range()).kvs
        # A try whose answer was lost may have been the one that made it.
        ours = tried and bool(found) and (found[0].value, found[0].lease) == (value, lease_id or 0)
        return found[0].mod_revision if ours else 0

    async def _put_over(self, body: Mapping[str, str]) -> int:
        """Over what this client may have seen, and nothing newer: a put that a member took and carried out much later,
        when its answer had been given up and the put repeated elsewhere, must not undo what was put since."""
        while True:
            newest = str(self._revision + 1)
            old = {"key": body["key"], "target": "MOD", "result": "LESS", "mod_revision": newest}
            txn: _Txn = await self.call("/v3/kv/txn", {"compare": [old], "success": [{"request_put": body}]}, _Txn)
            self._revision = max(self._revision, txn.header.revision)
            if txn.succeeded:
                return txn.header.revision

    async def get_key(self, key: str) -> KeyValue | None:
        found: _Range = await self.call("/v3/kv/range", {"key": _b64(self.key(key))}, _Range)
        return entry_of(found.kvs[0], len(self.prefix)) if found.kvs else None

    # The state and its epoch.

    async def read_epoch(self, timeout_s: float | None = None, only: str | None = None) -> int:
        """From the majority of the members; drawn here if the namespace has none. The numbers are this client's own.

        only: ask this member, which asks the others."""
        seen = self._revision
        body = {"key": _b64(self._epoch_name)}
        found, _ = await self.gateway.call("/v3/kv/range", body, _Range, timeout_s=timeout_s, only=only)
        return await self._learn(found.header.revision, found.kvs, seen)

    async def read(self, prefix: str) -> tuple[list[KeyValue], int, int]:
        """What is there, sorted, at which revision and in which epoch."""
        seen, start = self._revision, self.key(prefix)
        ranges = [{"key": _b64(self._epoch_name)}, {"key": _b64(start), "range_end": _b64(_range_end(start))}]
        txn: _Txn = await self.call("/v3/kv/txn", {"success": [{"request_range": r} for r in ranges]}, _Txn)
        epoch_key, state = (r.response_range or _Range() for r in txn.responses)
        epoch = await self._learn(txn.header.revision, epoch_key.kvs, seen)
        return self.visible(state.kvs), txn.header.revision, epoch

    def visible(self, entries: tuple[Entry, ...]) -> list[KeyValue]:
        found = [entry_of(entry, len(self.prefix)) for entry in entries]
        return sorted((entry for entry in found if entry.key != EPOCH_KEY), key=lambda entry: entry.key)

    async def _learn(self, revision: int, found: tuple[Entry, ...], seen: int) -> int:
        """seen: the highest revision known when the question was sent; the majority cannot answer with a lower one."""
        if not found:
            value = f"{self.random_source.getrandbits(63):016x}".encode()
            await self.put_key(EPOCH_KEY, value, None, only_if_absent=True)
            return await self.read_epoch()
        drawn = (found[0].value, found[0].create_revision)
        if drawn != self._drawn or revision < seen:
            if self._drawn is not None:
                logger.warning("%s is without its state of before, or with an older one", self.name)
            self._epoch += 1
            self._drawn, self._revision = drawn, revision
        self._revision = max(self._revision, revision)
        return self._epoch


class EtcdDiscovery:
    """The discovery seam; guarantees as in `discovery.base`, differences in this module's docstring.

    Parameters as for `discovery.hub_client.HubDiscovery`. limits: of keys and values; etcd itself takes requests of
    1.5 MB unless it is told otherwise. probe_s: see PROBE_S.
    """

    def __init__(
        self,
        settings: EtcdSettings,
        *,
        namespace: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        random_source: Random | None = None,
        return_window_s: float = RETURN_WINDOW_S,
        grace_s: float = DEFAULT_LEASE_TTL_S + RETURN_WINDOW_S,
        limits: KeyStoreLimits | None = None,
        probe_s: float = PROBE_S,
    ) -> None:
        self._gateway = EtcdGateway(settings, timeout_s=timeout_s, random_source=random_source or SystemRandom())
        self._server = _Server(self._gateway, namespace)
        self._grace_s = grace_s
        self._limits = limits or KeyStoreLimits()
        self._probe_s = probe_s
        self._tasks = TaskOwner("etcd discovery")
        self._book = LeaseBook(self._server, self._tasks, return_window_s)

    async def grant_lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        if not 0.0 < ttl_s <= self._limits.max_ttl_s:
            raise _refused(f"a lease of {ttl_s:g} s: expected more than 0 and at most {self._limits.max_ttl_s:g}")
        return await self._book.grant(ttl_s)

    async def end_lease(self, lease_id: LeaseId) -> bool:
        try:
            await self._server.revoke(lease_id)
        except StatorError as error:
            if error.code is ErrorCode.NOT_FOUND:
                return False
            raise
        return True

    async def lease_times(self, lease_id: LeaseId) -> tuple[float, float] | None:
        """Its TTL and what is left of it, in whole seconds; None if it has ended."""
        found: _TimeToLive = await self._server.call("/v3/lease/timetolive", {"ID": str(lease_id)}, _TimeToLive)
        return None if found.TTL <= 0 else (float(found.grantedTTL), float(found.TTL))

    def find_lease(self, lease_id: LeaseId) -> KeptLease | None:
        """The living lease that was granted here and has this id now."""
        return self._book.find(lease_id)

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        self._check(key, value, lease)
        return await self._book.put(key, value, lease, only_if_absent=False)

    async def create(self, key: str, value: bytes, lease: Lease | None = None) -> bool:
        self._check(key, value, lease)
        return bool(await self._book.put(key, value, lease, only_if_absent=True))

    async def get(self, key: str) -> KeyValue | None:
        return await self._server.get_key(key)

    async def get_prefix(self, prefix: str) -> list[KeyValue]:
        start = self._server.key(prefix)
        body = {"key": _b64(start), "range_end": _b64(_range_end(start))}
        found: _Range = await self._server.call("/v3/kv/range", body, _Range)
        return self._server.visible(found.kvs)

    async def delete(self, key: str) -> bool:
        self._book.forget(key)
        body = {"key": _b64(self._server.key(key))}
        deleted: _Deleted = await self._server.call("/v3/kv/deleterange", body, _Deleted)
        return deleted.deleted > 0

    async def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        watch = _Watch(self._server, prefix, KeyView(self._grace_s), self._probe_s)
        backoff = Backoff(self._server.random_source)
        lost = False
        while not self._server.closed:
            try:
                async with contextlib.aclosing(watch.batches()) as batches:
                    async for batch in batches:
                        if lost:
                            lost = False
                            logger.info("%s is back; the watch of %s goes on", self._server.name, prefix)
                        backoff.reset()
                        if batch.reset:
                            self._book.check_soon()
                        if batch != WatchBatch():
                            yield batch
            except StatorError as error:
                if self._server.closed:
                    return
                if error.code in _FINAL:
                    raise
                if not lost:
                    lost = True
                    logger.warning(
                        "lost %s in a watch of %s, trying again: %s", self._server.name, prefix, error.message
                    )
            async with contextlib.aclosing(watch.ticks(backoff.next_s())) as ticks:
                async for batch in ticks:
                    yield batch

    async def close(self) -> None:
        self._book.stop()
        await self._gateway.close()
        await self._tasks.close()

    def _check(self, key: str, value: bytes, lease: Lease | None) -> None:
        limits = self._limits
        if not 0 < len(key.encode()) <= limits.max_key_bytes:
            raise _refused(f"a key has 1 to {limits.max_key_bytes} bytes, not {len(key.encode())}")
        if len(value) > limits.max_value_bytes:
            raise _refused(
                f"the value of {key!r} has {len(value)} bytes, and {limits.max_value_bytes} at most are taken"
            )
        if lease is not None and self._book.own(lease) is None:
            raise StatorError(
                ErrorCode.NOT_FOUND, f"lease {lease.lease_id} of key {key!r} is not one of this namespace"
            )


class _Watch:
    """One watch, over as many connections as it takes."""

    def __init__(self, server: _Server, prefix: str, view: KeyView, probe_s: float) -> None:
        self._server = server
        self._prefix = prefix
        self._view = view
        self._probe_s = probe_s
        self._cursor = WatchCursor(len(server.prefix))
        self._epoch = 0

    async def batches(self) -> AsyncGenerator[WatchBatch, None]:
        """Until this connection is of no use any more. An empty batch: the server is there. Raises StatorError."""
        server, cursor = self._server, self._cursor
        endpoint = server.gateway.current
        try:
            if await server.read_epoch() != self._epoch or cursor.start_revision is None:
                yield await self._read_state()
            endpoint = server.gateway.current
            start = server.key(self._prefix)
            request = {
                "key": _b64(start),
                "range_end": _b64(_range_end(start)),
                "start_revision": str(cursor.start_revision),
                "progress_notify": True,
            }
            async with server.gateway.stream(endpoint, "/v3/watch", {"create_request": request}) as stream:
                async with contextlib.aclosing(self._follow(stream, endpoint)) as batches:
                    async for batch in batches:
                        yield batch
        except StatorError as error:
            if error.code is ErrorCode.INSTANCE_LOST:
                server.gateway.leave(endpoint)
            raise

    async def ticks(self, for_s: float) -> AsyncGenerator[WatchBatch, None]:
        """What the view gives up while nothing is heard for that time."""
        until = loop_time() + for_s
        while (now := loop_time()) < until and not self._server.closed:
            if (ended := self._view.tick(now)) is not None:
                yield ended
            deadline = self._view.next_deadline
            await self._server.pause(max(0.0, min(until, deadline if deadline is not None else until) - now))

    async def _read_state(self) -> WatchBatch:
        entries, revision, self._epoch = await self._server.read(self._prefix)
        self._cursor.state_read(revision)
        return self._view.receive(WatchBatch(puts=entries, reset=True), self._epoch, loop_time())

    async def _follow(self, stream: EtcdStream, endpoint: str) -> AsyncGenerator[WatchBatch, None]:
        probe_at = loop_time() + self._probe_s
        while True:
            deadline = self._view.next_deadline
            response: WatchResponse | None = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(probe_at, deadline or math.inf)):
                    response = await stream.next(WatchResponse)
            now = loop_time()
            if response is not None:
                changes, then = self._cursor.receive(response)
                if any(batch.deletes for batch in changes) and await self._server.read_epoch() != self._epoch:
                    # The whole namespace was deleted: that ended no lease, and says nothing of their holders.
                    self._cursor.forget()
                    return
                yield WatchBatch()
                for batch in changes:
                    yield self._view.receive(self._visible(batch), self._epoch, now)
                if then is not Next.GO_ON:
                    self._complain(response)
                    return
            elif (ended := self._view.tick(now)) is not None:
                yield ended
            if now >= probe_at:
                # A member that is cut off from the others would go on to say nothing, for ever.
                timeout_s = min(self._probe_s, self._server.timeout_s)
                if await self._server.read_epoch(timeout_s, only=endpoint) != self._epoch:
                    return
                probe_at = loop_time() + self._probe_s

    def _complain(self, response: WatchResponse) -> None:
        if response.compact_revision:
            logger.info("the watch of %s reads its whole state again: etcd compacted what came before", self._prefix)
        elif response.cancel_reason:
            raise StatorError(ErrorCode.INSTANCE_LOST, f"etcd ended the watch: {response.cancel_reason}")

    def _visible(self, batch: WatchBatch) -> WatchBatch:
        puts = [entry for entry in batch.puts if entry.key != EPOCH_KEY]
        return WatchBatch(puts=puts, deletes=[key for key in batch.deletes if key != EPOCH_KEY])


def _refused(message: str) -> StatorError:
    return StatorError(ErrorCode.INVALID_REQUEST, message)


__all__ = ["EPOCH_KEY", "PROBE_S", "ROOT", "EtcdDiscovery"]
