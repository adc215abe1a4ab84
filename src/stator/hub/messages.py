"""What travels between the hub and its clients.

Every request names the deployment's namespace: namespaces share nothing. Requests and answers are described by the
events of the same names in `core.key_store` and `core.job_queue`.

`epoch` names one incarnation of a hub, from its start to its end; a hub that comes back empty has another. It is what
tells "your lease has ended" from "I know nothing of before". 0: a hub that does not tell; it counts as always the same.
"""

from enum import StrEnum

import msgspec

from stator.core.key_store import KeyValue, WatchBatch
from stator.ids import InstanceId, JobId, LeaseId

GRANT_LEASE = "hub.lease.grant"
RENEW_LEASE = "hub.lease.renew"
REVOKE_LEASE = "hub.lease.revoke"
PUT_KEY = "hub.key.put"
DELETE_KEY = "hub.key.delete"
GET_KEYS = "hub.key.get"
WATCH_KEYS = "hub.key.watch"
PUT_JOB = "hub.queue.put"
PULL_JOBS = "hub.queue.pull"
ABANDON_PULLS = "hub.queue.abandon"
SETTLE_JOB = "hub.queue.settle"
CANCEL_JOB = "hub.queue.cancel"
QUEUE_SIZE = "hub.queue.size"
WATCH_SIZE = "hub.queue.watch_size"
DEAD_LETTERS = "hub.queue.dead_letters"


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """value: a truth value, a revision or a lease id."""

    value: int
    epoch: int = 0


class GrantLease(msgspec.Struct, frozen=True):
    """Answered with the lease id."""

    namespace: str
    ttl_s: float


class LeaseRequest(msgspec.Struct, frozen=True):
    """Renew or revoke. Answered 0 if the lease is unknown or over."""

    namespace: str
    lease_id: LeaseId


class PutKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answered with the revision; with only_if_absent, 0 if the key is there."""

    namespace: str
    key: str
    value: bytes
    lease_id: LeaseId | None = None
    only_if_absent: bool = False


class DeleteKey(msgspec.Struct, frozen=True):
    namespace: str
    key: str


class GetKeys(msgspec.Struct, frozen=True, omit_defaults=True):
    """The one key, or all under it as a prefix. Items are KeyValue, sorted by key."""

    namespace: str
    key: str
    prefix: bool = False


class WatchKeys(msgspec.Struct, frozen=True):
    """Items are WatchPart, without end."""

    namespace: str
    prefix: str


class WatchPart(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of one batch, small enough for a frame. more: the batch goes on in the next part."""

    batch: WatchBatch
    more: bool = False
    epoch: int = 0


class PutJob(msgspec.Struct, frozen=True, omit_defaults=True):
    namespace: str
    queue: str
    job_id: JobId
    payload: bytes
    deadline_s: float | None = None
    preferred: InstanceId | None = None


class PullJobs(msgspec.Struct, frozen=True):
    """Items are DeliveredJob. pull_id: drawn by the consumer, who can so abandon a pull whose answer it never saw."""

    namespace: str
    queue: str
    pull_id: int
    consumer: InstanceId
    lease_id: LeaseId
    max_jobs: int
    wait_s: float


class DeliveredJob(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `Delivery`, and whose it is."""

    job_id: JobId
    attempt: int
    payload: bytes
    seconds_left: float | None = None
    epoch: int = 0


class AbandonPulls(msgspec.Struct, frozen=True):
    namespace: str
    queue: str
    pull_ids: list[int]


class Settlement(StrEnum):
    EXTEND = "extend"
    ACK = "ack"
    NACK = "nack"


class SettleJob(msgspec.Struct, frozen=True):
    namespace: str
    queue: str
    settlement: Settlement
    job_id: JobId
    attempt: int


class CancelJob(msgspec.Struct, frozen=True):
    namespace: str
    queue: str
    job_id: JobId


class QueueRequest(msgspec.Struct, frozen=True):
    """Read the size (a QueueSize), watch it (SizeUpdates, the first at once), or read the dead letters."""

    namespace: str
    queue: str


class SizeUpdate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `QueueSize`, and whose it is."""

    waiting: int
    in_flight: int
    epoch: int = 0


def split_batch(batch: WatchBatch, max_part_bytes: int, epoch: int = 0) -> list[WatchPart]:
    """The batch in parts of about max_part_bytes each, one entry at least; joined again by BatchJoiner."""
    parts: list[WatchPart] = []
    puts: list[KeyValue] = []
    deletes: list[str] = []
    num_bytes = 0
    for entry in [*batch.deletes, *batch.puts]:
        size = len(entry) if isinstance(entry, str) else len(entry.key) + len(entry.value)
        if num_bytes and num_bytes + size > max_part_bytes:
            parts.append(WatchPart(WatchBatch(puts=puts, deletes=deletes, reset=batch.reset), True, epoch))
            puts, deletes, num_bytes = [], [], 0
        num_bytes += size
        if isinstance(entry, str):
            deletes.append(entry)
        else:
            puts.append(entry)
    parts.append(WatchPart(WatchBatch(puts=puts, deletes=deletes, reset=batch.reset), False, epoch))
    return parts


class BatchJoiner:
    """Parts in, whole batches out."""

    def __init__(self) -> None:
        self._parts: list[WatchBatch] = []

    def add(self, part: WatchPart) -> WatchBatch | None:
        """The batch that this part completes."""
        self._parts.append(part.batch)
        if part.more:
            return None
        parts, self._parts = self._parts, []
        if len(parts) == 1:
            return parts[0]
        return WatchBatch(
            puts=[entry for piece in parts for entry in piece.puts],
            deletes=[key for piece in parts for key in piece.deletes],
            reset=parts[0].reset,
        )
