"""The discovery seam: which instances live, and small values that must outlast a process.

Implementations: `MemoryDiscovery` (inside the hub), `HubDiscovery` (a client of the hub), `EtcdDiscovery`. One
contract suite (`stator.testing.contracts.discovery`) runs on all. Keys are relative to the deployment's namespace,
which the implementation prepends: two namespaces on one server share nothing.

Guarantees: a key bound to a lease vanishes when the lease ends, in one change with all its other keys; revisions only
grow; a watcher sees every change to its prefix in revision order, after a first batch that is the whole state; a
watcher that loses its server keeps its last view, and when the server is back gets a fresh whole state
(`WatchBatch.reset`) or, from etcd, the changes that it missed; never a silent gap.

A server may also come back without its state. It has another epoch then, a number drawn for each life of its state
(in etcd: a key that we put there), by which both sides tell that apart from the end of a lease. Holders put their keys
again, and a watcher's whole state keeps what the state of before had under leases, for as long as holders may need for
that: a TTL and RETURN_WINDOW_S. Whoever looks at values sees no change.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

from stator.core.key_store import KeyValue as KeyValue
from stator.core.key_store import WatchBatch as WatchBatch
from stator.ids import LeaseId

DEFAULT_LEASE_TTL_S = 10.0

RETURN_WINDOW_S = 2.0
"""Holders come back to a server without its state after a random part of this, so that a thousand do not at once. The
server's work for one is well under a millisecond: no need for a window that grows with their number."""


class Lease(Protocol):
    """Kept alive by its discovery client until revoked or lost.

    `lost` is set when the server has said that it ended this lease, which others were told, too: the holder was cut
    off or stood still for a TTL. A lost lease never comes back; take a new one under a new instance id. A server that
    cannot be reached ends nothing: the holder goes on, and the client asks again. One that has come back without its
    state is given the lease's keys again, under a new `lease_id`; the holder need not know.
    """

    lost: asyncio.Event

    @property
    def lease_id(self) -> LeaseId:
        """The present one; read it when it is needed."""
        ...

    @property
    def ttl_s(self) -> float: ...

    async def revoke(self) -> None:
        """End it now and delete its keys. Idempotent, and quiet when the server is unreachable."""
        ...


class Discovery(Protocol):
    """Methods raise StatorError(INSTANCE_LOST) when the server cannot be reached within its timeout."""

    async def grant_lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease: ...

    async def end_lease(self, lease_id: LeaseId) -> bool:
        """End the lease of a holder that is known to be dead, and delete its keys, rather than wait for its time to
        pass. False if it is unknown or over."""
        ...

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        """Returns the revision. Raises StatorError(NOT_FOUND) if the lease has ended.

        INSTANCE_LOST leaves open whether it was done; under a lease it will be, once the server is back."""
        ...

    async def create(self, key: str, value: bytes, lease: Lease | None = None) -> bool:
        """Put only if the key is absent; False if it was there."""
        ...

    async def get(self, key: str) -> KeyValue | None: ...

    async def get_prefix(self, prefix: str) -> list[KeyValue]:
        """Sorted by key."""
        ...

    async def delete(self, key: str) -> bool: ...

    def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        """The whole state first, then changes, until it is closed (`aclosing`). Survives the loss of the server.

        Starts when it is first awaited. Ends when this client is closed."""
        ...

    async def close(self) -> None:
        """Stop renewals and watches. Does not revoke leases: that is the owner's decision."""
        ...
