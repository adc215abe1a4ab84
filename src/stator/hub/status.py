"""What a hub tells about a namespace, for people and their tools: its leases and queues, and how long it has run."""

from collections.abc import Mapping

import msgspec

from stator.discovery.memory import MemoryKeyStore
from stator.ids import LeaseId
from stator.queue.memory import MemoryQueue

HUB_STATUS = "hub.status"


class NamespaceRequest(msgspec.Struct, frozen=True):
    """Answered with one HubStatus. Makes nothing: a namespace that is not there has no leases and no queues."""

    namespace: str


class LeaseStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """left_s: until it ends, if it is not renewed. age_s: since it was granted."""

    lease_id: LeaseId
    ttl_s: float
    left_s: float
    age_s: float


class QueueStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """Jobs that nobody has taken, that were delivered and not yet acked, and that were given up."""

    name: str
    waiting: int
    in_flight: int
    dead_letters: int = 0


class HubStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """epoch: of this incarnation of the hub."""

    epoch: int
    uptime_s: float
    leases: list[LeaseStatus] = []
    queues: list[QueueStatus] = []


async def hub_status(
    epoch: int, uptime_s: float, store: MemoryKeyStore, queues: Mapping[str, MemoryQueue]
) -> HubStatus:
    """store, queues: of one namespace."""
    leases = [LeaseStatus(*lease) for lease in store.leases()]
    sizes: list[QueueStatus] = []
    for name, queue in sorted(queues.items()):
        size = await queue.size()
        sizes.append(QueueStatus(name, size.waiting, size.in_flight, len(await queue.dead_letters())))
    return HubStatus(epoch, uptime_s, leases, sizes)
