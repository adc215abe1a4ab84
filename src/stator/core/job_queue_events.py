"""What goes into the job queue's core and what comes out of it; the rules are in `core.job_queue`."""

from dataclasses import dataclass

import msgspec

from stator.errors import ErrorCode
from stator.ids import InstanceId, JobId, LeaseId

DEFAULT_ACK_WAIT_S = 30.0
DEFAULT_STEAL_AFTER_S = 1.0
DEFAULT_MAX_DELIVERIES = 3
DEFAULT_MAX_WAITING = 4096


class Delivery(msgspec.Struct, frozen=True, omit_defaults=True):
    """attempt counts from 1. seconds_left: until the job's deadline, None without one."""

    job_id: JobId
    attempt: int
    payload: bytes
    seconds_left: float | None = None


class DeadLetter(msgspec.Struct, frozen=True):
    job_id: JobId
    attempts: int
    reason: str
    payload: bytes


class QueueSize(msgspec.Struct, frozen=True):
    """waiting: jobs nobody has taken. in_flight: delivered and not yet acked."""

    waiting: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """max_bytes bounds the payloads of all jobs that wait or are in flight, for the memory of the process."""

    ack_wait_s: float = DEFAULT_ACK_WAIT_S
    steal_after_s: float = DEFAULT_STEAL_AFTER_S
    max_deliveries: int = DEFAULT_MAX_DELIVERIES
    max_waiting: int = DEFAULT_MAX_WAITING
    max_bytes: int = 1 << 30
    max_pulls: int = 4096
    max_dead_letters: int = 64
    max_finished: int = 16_384
    remember_s: float = 600.0


# Events.


@dataclass(frozen=True, slots=True)
class Put:
    """Answered True if the job was added, False if its id is known. deadline_s: seconds from now."""

    job_id: JobId
    payload: bytes
    deadline_s: float | None = None
    preferred: InstanceId | None = None


@dataclass(frozen=True, slots=True)
class Pull:
    """Answered later, by one PullEnded. The caller has checked that the lease lives. pull_id: drawn by the consumer."""

    pull_id: int
    consumer: InstanceId
    lease_id: LeaseId
    max_jobs: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class AbandonPull:
    """Its consumer will not see its answer: jobs it got come back, and if it is still waiting, it ends.

    Answered True if that changed anything. A pull that arrives after it was abandoned ends at once.
    """

    pull_id: int


@dataclass(frozen=True, slots=True)
class Extend:
    job_id: JobId
    attempt: int


@dataclass(frozen=True, slots=True)
class Ack:
    job_id: JobId
    attempt: int


@dataclass(frozen=True, slots=True)
class Nack:
    job_id: JobId
    attempt: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Answered True if the job was waiting."""

    job_id: JobId


@dataclass(frozen=True, slots=True)
class EndLease:
    """The lease's deliveries come back, its pulls end with NOT_FOUND."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; nothing else."""


Event = Put | Pull | AbandonPull | Extend | Ack | Nack | Cancel | EndLease | Tick


# Effects. Every event other than Pull, EndLease and Tick has exactly one Answer or Refused.


@dataclass(frozen=True, slots=True)
class Answer:
    value: bool


@dataclass(frozen=True, slots=True)
class Refused:
    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class PullEnded:
    """The one answer of a pull. refused: then there are no deliveries."""

    pull_id: int
    deliveries: tuple[Delivery, ...] = ()
    refused: Refused | None = None


@dataclass(frozen=True, slots=True)
class Expired:
    """A job was dropped because its deadline had passed."""

    job_id: JobId


@dataclass(frozen=True, slots=True)
class CameBack:
    """A delivery ended without an ack and the job waits again."""

    job_id: JobId
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Buried:
    """The job is a dead letter now."""

    job_id: JobId
    attempts: int
    reason: str


Effect = Answer | Refused | PullEnded | Expired | CameBack | Buried
