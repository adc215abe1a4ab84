"""A job queue without a server of its own: every member applies one ordered log of events to the same rules.

Something else (a JetStream stream) orders the events, stores them, and stamps each with its time. Rules:

- Every member applies every event, in the order of the log, and nothing else. So all have the same queue after the same
  event, and the member that wrote an event learns its answer by applying it. There is no leader, and none to elect.
- The queue's clock is the log's: it moves by the difference of two stamps, but never back, and never by more than
  `MAX_STEP_S` at once, so that a server's clock that is set right by an hour ends no delivery and drops no job. Members
  therefore write a Tick at least that often while anything is due by the clock.
- Payloads are not in the log: an event has the reference to one, which stands for it here. A payload is `freed` when no
  job, and no dead letter, refers to it any more.
- A snapshot is the whole state after one event. A member that is new, or that missed events which are deleted by now,
  begins with the latest and applies what came after it.

An entry that cannot be read, or that lies where its writer may not have written such an event (`entry_of`), changes
nothing but the clock, at every member alike.

Members that apply different rules would disagree about who has a job. The log's name has therefore to name the rules
(`RULES`, to be raised with every change of `core.job_queue` or of this file that changes an outcome) and the limits:
`log_version`.
"""

import zlib
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from stator.core.job_queue import JobQueueCore, QueueState
from stator.core.job_queue_events import (
    AbandonPull,
    Ack,
    Answer,
    Buried,
    Cancel,
    DeadLetter,
    Effect,
    EndLease,
    Event,
    Expired,
    Extend,
    Nack,
    Pull,
    Put,
    QueueLimits,
    QueueSize,
    Refused,
    Tick,
)
from stator.errors import DECODE_ERRORS
from stator.ids import InstanceId, JobId, LeaseId

RULES = 2
MAX_STEP_S = 10.0


class Body(msgspec.Struct, frozen=True, array_like=True):
    """Where a payload is: that many parts under that name."""

    name: str
    num_parts: int


class LoggedPut(msgspec.Struct, frozen=True, array_like=True, tag="put"):
    job_id: JobId
    body: Body
    deadline_s: float | None = None
    preferred: InstanceId | None = None


class LoggedPull(msgspec.Struct, frozen=True, array_like=True, tag="pull"):
    pull_id: int
    consumer: InstanceId
    lease_id: LeaseId
    max_jobs: int
    wait_s: float


class LoggedExtend(msgspec.Struct, frozen=True, array_like=True, tag="extend"):
    job_id: JobId
    attempt: int


class LoggedAck(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    job_id: JobId
    attempt: int


class LoggedNack(msgspec.Struct, frozen=True, array_like=True, tag="nack"):
    job_id: JobId
    attempt: int


class LoggedCancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    job_id: JobId


class LoggedAbandon(msgspec.Struct, frozen=True, array_like=True, tag="abandon"):
    pull_id: int


class LoggedEndLease(msgspec.Struct, frozen=True, array_like=True, tag="end_lease"):
    lease_id: LeaseId


class LoggedTick(msgspec.Struct, frozen=True, array_like=True, tag="tick"):
    """Time has passed; also written to learn that everything before it was applied."""


class LoggedSnapshot(msgspec.Struct, frozen=True, array_like=True, tag="snapshot"):
    """A snapshot of the state after event `sequence` can be read now."""

    sequence: int


Logged = (
    LoggedPut
    | LoggedPull
    | LoggedExtend
    | LoggedAck
    | LoggedNack
    | LoggedCancel
    | LoggedAbandon
    | LoggedEndLease
    | LoggedTick
    | LoggedSnapshot
)


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One event of the log. writer and number: of whoever wrote it, to find the answer's waiter by."""

    writer: str
    number: int
    event: Logged


class Place(StrEnum):
    """Where in the log an event of some kind belongs. Who may write there is for the log's server to say."""

    PUT = "put"
    EVENT = "event"
    TICK = "tick"


def place_of(event: Logged) -> Place:
    if isinstance(event, LoggedPut):
        return Place.PUT
    return Place.TICK if isinstance(event, LoggedTick) else Place.EVENT


class Misplaced(Exception):
    """An entry to be applied as a tick. It says why."""


def entry_of(data: bytes, place: Place | None) -> Entry:
    """place: where it was found; None for one that there is not. Raises Misplaced."""
    try:
        entry = msgspec.msgpack.decode(data, type=Entry)
    except DECODE_ERRORS as error:
        raise Misplaced(f"it is no entry: {error}") from None
    if place_of(entry.event) is not place:
        raise Misplaced(f"a {place_of(entry.event)} does not belong there; its writer may not be who may write one")
    return entry


class _Snapshot(msgspec.Struct, frozen=True, array_like=True):
    sequence: int
    stamp_s: float
    now: float
    snapshot_sequence: int
    queue: QueueState


@dataclass(frozen=True, slots=True)
class Applied:
    """What an event did. answer: None where the event's effects say it (a pull) or there is none."""

    answer: Answer | Refused | None
    effects: tuple[Effect, ...]
    freed: tuple[Body, ...]


def log_version(limits: QueueLimits) -> str:
    """Differs wherever two members would not agree."""
    return f"{zlib.crc32(msgspec.json.encode((RULES, MAX_STEP_S, limits))):08x}"


def encode_body(body: Body) -> bytes:
    return msgspec.msgpack.encode(body)


def decode_body(reference: bytes) -> Body:
    return msgspec.msgpack.decode(reference, type=Body)


class ReplicatedQueue:
    """One member's copy of the queue. sequence: of the event before the first that it will be given."""

    def __init__(self, limits: QueueLimits, sequence: int = 0) -> None:
        self._limits = limits
        self._core = JobQueueCore(limits)
        self._bodies: dict[JobId, Body] = {}
        self._buried: deque[JobId] = deque()
        self._sequence = sequence
        self._stamp_s: float | None = None
        self._now = 0.0
        self._snapshot_sequence = sequence

    @property
    def sequence(self) -> int:
        """Of the event that was applied last."""
        return self._sequence

    @property
    def stamp_s(self) -> float | None:
        """Of the event that was applied last; None if there was none."""
        return self._stamp_s

    def skip(self, sequence: int) -> None:
        """The events up to that one are gone for good (damage, or deleted by hand), and the log goes on after it."""
        self._sequence = max(self._sequence, sequence)

    @property
    def snapshot_sequence(self) -> int:
        """Of the last snapshot that the log told of."""
        return self._snapshot_sequence

    @property
    def size(self) -> QueueSize:
        return self._core.size

    @property
    def leases(self) -> set[LeaseId]:
        return self._core.leases

    @property
    def dead_letters(self) -> list[DeadLetter]:
        """Their payloads are references."""
        return self._core.dead_letters

    @property
    def due_in_s(self) -> float | None:
        """From the last event until the clock alone changes something; None if it does not."""
        deadline = self._core.next_deadline
        return None if deadline is None else max(0.0, deadline - self._now)

    def apply(self, sequence: int, stamp_s: float, event: Logged) -> Applied:
        """sequence: exactly one more than the last. stamp_s: when the log took it, by the log's clock."""
        assert sequence == self._sequence + 1, (sequence, self._sequence)
        self._sequence = sequence
        if self._stamp_s is not None:
            self._now += min(max(0.0, stamp_s - self._stamp_s), MAX_STEP_S)
        self._stamp_s = stamp_s
        if isinstance(event, LoggedSnapshot):
            self._snapshot_sequence = max(self._snapshot_sequence, event.sequence)
        effects = self._core.handle(_event(event), self._now)
        answer = next((effect for effect in effects if isinstance(effect, (Answer, Refused))), None)
        return Applied(answer, tuple(effects), tuple(self._freed(event, answer, effects)))

    def snapshot(self) -> bytes:
        assert self._stamp_s is not None
        state = _Snapshot(self._sequence, self._stamp_s, self._now, self._sequence, self._core.state())
        return msgspec.msgpack.encode(state)

    @classmethod
    def restore(cls, data: bytes, limits: QueueLimits) -> "ReplicatedQueue":
        """Raises one of DECODE_ERRORS."""
        snapshot = msgspec.msgpack.decode(data, type=_Snapshot)
        queue = cls(limits, snapshot.sequence)
        queue._core = JobQueueCore.restore(snapshot.queue, limits)
        queue._stamp_s, queue._now = snapshot.stamp_s, snapshot.now
        queue._snapshot_sequence = snapshot.snapshot_sequence
        jobs = [*snapshot.queue.waiting, *(entry.job for entry in snapshot.queue.in_flight)]
        queue._bodies = {job.job_id: decode_body(job.payload) for job in jobs}
        for letter in snapshot.queue.dead:
            queue._bodies[letter.job_id] = decode_body(letter.payload)
            queue._buried.append(letter.job_id)
        return queue

    def _freed(self, event: Logged, answer: Answer | Refused | None, effects: list[Effect]) -> list[Body]:
        freed: list[Body] = []
        finished = [effect.job_id for effect in effects if isinstance(effect, Expired)]
        match event:
            case LoggedPut() if answer == Answer(True):
                self._bodies[event.job_id] = event.body
            case LoggedPut():
                freed.append(event.body)
            case LoggedAck() | LoggedCancel():
                finished.append(event.job_id)
            case _:
                pass
        for effect in effects:
            if isinstance(effect, Buried):
                self._buried.append(effect.job_id)
        while len(self._buried) > self._limits.max_dead_letters:
            finished.append(self._buried.popleft())
        dead = set(self._buried)
        gone = [job_id for job_id in finished if job_id not in dead and not self._core.holds(job_id)]
        return freed + [self._bodies.pop(job_id) for job_id in gone if job_id in self._bodies]


def _event(event: Logged) -> Event:
    match event:
        case LoggedPut():
            return Put(event.job_id, encode_body(event.body), event.deadline_s, event.preferred)
        case LoggedPull():
            return Pull(event.pull_id, event.consumer, event.lease_id, event.max_jobs, event.wait_s)
        case LoggedExtend():
            return Extend(event.job_id, event.attempt)
        case LoggedAck():
            return Ack(event.job_id, event.attempt)
        case LoggedNack():
            return Nack(event.job_id, event.attempt)
        case LoggedCancel():
            return Cancel(event.job_id)
        case LoggedAbandon():
            return AbandonPull(event.pull_id)
        case LoggedEndLease():
            return EndLease(event.lease_id)
        case LoggedTick() | LoggedSnapshot():
            return Tick()
