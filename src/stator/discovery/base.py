"""The discovery seam: which instances live, and small values that must outlast a process.

Implementations: `MemoryDiscovery` (inside the hub), `HubDiscovery` (a client of the hub), etcd later. One contract
suite (`stator.testing.contracts.discovery`) runs on all. Keys are relative to the deployment's namespace, which the
implementation prepends: two namespaces on one server share nothing.

Guarantees: a key bound to a lease vanishes when the lease ends, in one change with all its other keys; revisions only
grow; a watcher sees every change to its prefix in revision order, after a first batch that is the whole state; a
watcher that loses its server keeps its last view and gets a fresh whole state (`WatchBatch.reset`) when the server is
back, never a silent gap.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

from stator.core.key_store import KeyValue as KeyValue
from stator.core.key_store import WatchBatch as WatchBatch
from stator.ids import LeaseId

DEFAULT_LEASE_TTL_S = 10.0


class Lease(Protocol):
    """Kept alive by its discovery client until revoked or lost.

    `lost` is set when the holder must assume that its keys are gone: the server said so, or no renewal succeeded for
    a whole TTL on the holder's own clock (self-fencing). A lost lease never comes back; take a new one under a new
    instance id.
    """

    lease_id: LeaseId
    ttl_s: float
    lost: asyncio.Event

    async def revoke(self) -> None:
        """End it now and delete its keys. Idempotent, and quiet when the server is unreachable."""
        ...


class Discovery(Protocol):
    """Methods raise StatorError(INSTANCE_LOST) when the server cannot be reached within its timeout."""

    async def grant_lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease: ...

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        """Returns the revision. Raises StatorError(NOT_FOUND) if the lease has ended."""
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
