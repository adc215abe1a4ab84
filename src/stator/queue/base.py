"""The queue seam: prefill jobs, pulled by workers that have room.

Implementations: `MemoryQueue` (inside the hub), `HubQueue` (a client of the hub), `NatsQueue` (JetStream). One contract
suite (`stator.testing.contracts.queue`) runs on all.

The contract (DESIGN.md, "Queue contract"): one shared first-in-first-out line and one per preferred consumer; a
consumer is served its own line first, then the shared one, then, for jobs that waited longer than `steal_after_s`,
the oldest of another's line. Nothing is reordered inside a line. A delivery is (job id, attempt) and stays with its
consumer until it is acked, nacked, not extended for `ack_wait_s`, or the consumer's lease ends; in the last three
cases the job goes back to the head of its line with the next attempt number, or to the dead letters after
`max_deliveries`. Jobs whose deadline has passed are dropped at the pull. Delivery is at least once: consumers must
be idempotent by job id.

A server that comes back without its state has lost the jobs that waited; those that were delivered stay with their
consumers, whom nobody can take them from: they finish and tell the decode worker directly.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from stator.core.job_queue_events import DEFAULT_ACK_WAIT_S as DEFAULT_ACK_WAIT_S
from stator.core.job_queue_events import DEFAULT_MAX_DELIVERIES as DEFAULT_MAX_DELIVERIES
from stator.core.job_queue_events import DEFAULT_MAX_WAITING as DEFAULT_MAX_WAITING
from stator.core.job_queue_events import DEFAULT_STEAL_AFTER_S as DEFAULT_STEAL_AFTER_S
from stator.core.job_queue_events import DeadLetter as DeadLetter
from stator.core.job_queue_events import Delivery as Delivery
from stator.core.job_queue_events import QueueSize as QueueSize
from stator.ids import InstanceId, JobId, LeaseId


@dataclass(frozen=True, slots=True)
class QueueLoss:
    """What a size watch tells instead of a size.

    jobs_lost False: the server cannot be reached; a put would wait for its timeout, and nobody is given a job. True:
    the server is back without its state, so that jobs put before are gone if they were not delivered; a size follows.
    """

    jobs_lost: bool


class JobQueue(Protocol):
    """Methods raise StatorError(INSTANCE_LOST) when the queue's server cannot be reached within its timeout."""

    async def put(
        self, job_id: JobId, payload: bytes, *, deadline_s: float | None = None, preferred: InstanceId | None = None
    ) -> None:
        """Add a job; a job id that is already waiting or in flight is not added again.

        deadline_s: seconds from now. Raises StatorError(OVERLOADED) when `max_waiting` jobs wait.
        """
        ...

    async def pull(self, consumer: InstanceId, lease_id: LeaseId, *, max_jobs: int, wait_s: float) -> list[Delivery]:
        """Up to max_jobs deliveries; waits up to wait_s for the first; an empty list after that.

        Raises StatorError(NOT_FOUND) if the lease has ended. A cancelled pull takes no job.
        """
        ...

    async def extend(self, job_id: JobId, attempt: int) -> bool:
        """Restart the ack wait. False: this attempt is no longer the current one; stop working on it.

        True as well for an attempt that was delivered by a server which has lost its state since: no other has it."""
        ...

    async def ack(self, job_id: JobId, attempt: int) -> bool:
        """The job is done. False: this attempt is no longer the current one (another consumer has the job)."""
        ...

    async def nack(self, job_id: JobId, attempt: int) -> bool:
        """Give the job back; somebody takes it at once. Counts as a delivery."""
        ...

    async def cancel(self, job_id: JobId) -> bool:
        """Remove the job wherever it is. True: it was still waiting, so that nobody works on it."""
        ...

    async def size(self) -> QueueSize: ...

    def watch_size(self) -> AsyncGenerator[QueueSize | QueueLoss, None]:
        """The size now, then whenever it changed (changes may be merged). Survives the loss of the server, and tells
        it; when the server is back, a size follows in any case."""
        ...

    async def dead_letters(self) -> list[DeadLetter]:
        """The most recent ones, oldest first; bounded."""
        ...

    async def close(self) -> None: ...
