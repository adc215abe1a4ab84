"""The queue of prefill jobs: who gets which job, and what becomes of it when its consumer does not finish.

A job is *waiting* in one line, *in flight* with one consumer, or *finished*. Rules:

- Lines: one shared, one per preferred consumer. A new job goes to the end of its line, a job that comes back to the
  head of it; several that come back together keep their order. Nothing else is reordered.
- A pull is served from its consumer's own line, then the shared one, then the lines of others: of their heads that
  may be taken by anyone, the one that was put first. A job may be taken by anyone once it has waited `steal_after_s`,
  or at once if it has come back.
- Pulls that wait are served oldest first, one job each before anyone gets a second, and then answered with what they
  got. A pull that got nothing is answered empty when its time is over.
- A delivery is (job id, attempt). Attempts count from 1, one more for each delivery, so that no two deliveries of a job
  share one. Only the current delivery can be extended, acked or nacked.
- A delivery ends without an ack by a nack, when `ack_wait_s` passed since it was delivered or extended, when its
  consumer's lease ends, or when its pull is abandoned. The job then comes back, or becomes a dead letter if that was
  delivery number `max_deliveries`. Deliveries of an abandoned pull are not counted: its consumer never saw them.
- A job whose deadline has passed is dropped when a pull reaches it, or when a put needs its place. A job in flight is
  left to its consumer, who knows the deadline.
- A job is finished by an ack, a cancel, its deadline or too many deliveries. Its id is remembered for `remember_s`, at
  most `max_finished` of them: a late put of it adds nothing, an ack sent again is True again, anything else False.
  Cancelling an unknown id finishes it, so that a put overtaken by its cancel adds nothing either.
- What would pass a bound is refused with OVERLOADED and changes nothing. A job that comes back is never refused.

Whatever is due by the clock happens before the event that `handle` was called with.
"""

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from stator.core.job_queue_events import (
    AbandonPull,
    Ack,
    Answer,
    Buried,
    CameBack,
    Cancel,
    DeadLetter,
    Delivery,
    Effect,
    EndLease,
    Event,
    Expired,
    Extend,
    Nack,
    Pull,
    PullEnded,
    Put,
    QueueLimits,
    QueueSize,
    Refused,
    Tick,
)
from stator.errors import ErrorCode
from stator.ids import InstanceId, JobId, LeaseId


class _Outcome(StrEnum):
    ACKED = "acked"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"


@dataclass(slots=True, eq=False)
class _Job:
    """number: its place among all puts. free_at: from then on anyone may take it."""

    job_id: JobId
    payload: bytes
    deadline: float | None
    line: InstanceId | None
    number: int
    free_at: float
    attempt: int = 0
    num_deliveries: int = 0

    def expired(self, now: float) -> bool:
        return self.deadline is not None and self.deadline <= now


@dataclass(slots=True)
class _InFlight:
    job: _Job
    pull_id: int
    lease_id: LeaseId
    ack_by: float


@dataclass(slots=True)
class _Waiting:
    pull: Pull
    until: float
    deliveries: list[Delivery] = field(default_factory=list[Delivery])


@dataclass(frozen=True, slots=True)
class _Finished:
    at: float
    outcome: _Outcome
    attempt: int


class QueueState(msgspec.Struct, frozen=True, array_like=True):
    """A queue between two events, whole. waiting: line by line, each from its head."""

    waiting: list[_Job]
    in_flight: list[_InFlight]
    pulls: list[_Waiting]
    abandoned: list[tuple[int, float]]
    finished: list[tuple[JobId, _Finished]]
    dead: list[DeadLetter]
    num_puts: int


class JobQueueCore:
    """One queue. `next_deadline` says when to send a Tick."""

    def __init__(self, limits: QueueLimits | None = None) -> None:
        self._limits = limits or QueueLimits()
        self._lines: dict[InstanceId | None, deque[_Job]] = {}
        self._waiting: dict[JobId, _Job] = {}
        # Every delivery and extension lasts equally long, so the order of the last one is the order of the ends.
        self._in_flight: OrderedDict[JobId, _InFlight] = OrderedDict()
        self._pulls: OrderedDict[int, _Waiting] = OrderedDict()
        self._abandoned: OrderedDict[int, float] = OrderedDict()
        self._finished: OrderedDict[JobId, _Finished] = OrderedDict()
        self._dead: deque[DeadLetter] = deque(maxlen=self._limits.max_dead_letters)
        self._num_bytes = 0
        self._num_puts = 0
        # No waiting job's deadline passes before this.
        self._no_deadline_before = math.inf

    @property
    def size(self) -> QueueSize:
        return QueueSize(waiting=len(self._waiting), in_flight=len(self._in_flight))

    @property
    def dead_letters(self) -> list[DeadLetter]:
        """The most recent ones, oldest first."""
        return list(self._dead)

    @property
    def next_deadline(self) -> float | None:
        """When the clock alone changes something: an ack wait or a pull's time ends, anyone may take a job."""
        ends = [waiting.until for waiting in self._pulls.values()]
        if self._in_flight:
            ends.append(next(iter(self._in_flight.values())).ack_by)
        if self._pulls:
            ends += [jobs[0].free_at for line, jobs in self._lines.items() if line is not None]
        return min(ends, default=None)

    def holds(self, job_id: JobId) -> bool:
        """Whether the job waits or is in flight."""
        return job_id in self._waiting or job_id in self._in_flight

    @property
    def leases(self) -> set[LeaseId]:
        """Under which deliveries are held or pulls wait."""
        held = {entry.lease_id for entry in self._in_flight.values()}
        return held | {waiting.pull.lease_id for waiting in self._pulls.values()}

    def state(self) -> QueueState:
        """What `restore` makes an equal queue of; nothing in it is shared with this one once it is encoded."""
        return QueueState(
            waiting=[job for line in self._lines.values() for job in line],
            in_flight=list(self._in_flight.values()),
            pulls=list(self._pulls.values()),
            abandoned=list(self._abandoned.items()),
            finished=list(self._finished.items()),
            dead=list(self._dead),
            num_puts=self._num_puts,
        )

    @classmethod
    def restore(cls, state: QueueState, limits: QueueLimits | None = None) -> "JobQueueCore":
        """state: decoded, and this queue's alone from now on. limits: the same as of the queue that it is of."""
        queue = cls(limits)
        for job in state.waiting:
            queue._wait(job, at_head=False)
        queue._in_flight.update((entry.job.job_id, entry) for entry in state.in_flight)
        queue._pulls.update((waiting.pull.pull_id, waiting) for waiting in state.pulls)
        queue._abandoned.update(state.abandoned)
        queue._finished.update(state.finished)
        queue._dead.extend(state.dead)
        queue._num_puts = state.num_puts
        jobs = [*state.waiting, *(entry.job for entry in state.in_flight)]
        queue._num_bytes = sum(len(job.payload) for job in jobs)
        return queue

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects = self._expire(now)
        match event:
            case Put():
                effects += self._put(event, now)
            case Pull():
                effects += self._pull(event, now)
            case AbandonPull():
                effects += self._abandon(event.pull_id, now)
            case Extend():
                effects.append(self._extend(event, now))
            case Ack():
                effects.append(self._ack(event, now))
            case Nack():
                effects += self._nack(event, now)
            case Cancel():
                effects.append(self._cancel(event.job_id, now))
            case EndLease():
                effects += self._end_lease(event.lease_id, now)
            case Tick():
                pass
        effects += self._serve(now)
        effects += self._end_pulls(now)
        return effects

    # What the clock does.

    def _expire(self, now: float) -> list[Effect]:
        late = []
        for entry in self._in_flight.values():
            if entry.ack_by > now:
                break
            late.append(entry)
        while self._abandoned and next(iter(self._abandoned.values())) + self._limits.remember_s <= now:
            self._abandoned.popitem(last=False)
        while self._finished and next(iter(self._finished.values())).at + self._limits.remember_s <= now:
            self._finished.popitem(last=False)
        return self._give_back(late, now, f"no ack or extension within {self._limits.ack_wait_s:g} s")

    def _end_pulls(self, now: float) -> list[Effect]:
        over = [pull_id for pull_id, waiting in self._pulls.items() if waiting.until <= now]
        for pull_id in over:
            del self._pulls[pull_id]
        return [PullEnded(pull_id) for pull_id in over]

    # Jobs coming in and going out.

    def _put(self, event: Put, now: float) -> list[Effect]:
        job_id = event.job_id
        if job_id in self._waiting or job_id in self._in_flight or job_id in self._finished:
            return [Answer(False)]
        if event.deadline_s is not None and not math.isfinite(event.deadline_s):
            return [Refused(ErrorCode.INVALID_REQUEST, f"job {job_id} has a deadline of {event.deadline_s:g} s")]
        effects: list[Effect] = []
        if self._full(event):
            effects += self._drop_expired(now)
            if self._full(event):
                return [*effects, self._refuse_put(event)]
        deadline = None if event.deadline_s is None else now + event.deadline_s
        job = _Job(
            job_id, event.payload, deadline, event.preferred, self._num_puts, free_at=now + self._limits.steal_after_s
        )
        self._num_puts += 1
        self._num_bytes += len(job.payload)
        self._wait(job, at_head=False)
        return [*effects, Answer(True)]

    def _full(self, event: Put) -> bool:
        limits = self._limits
        return len(self._waiting) >= limits.max_waiting or self._num_bytes + len(event.payload) > limits.max_bytes

    def _refuse_put(self, event: Put) -> Refused:
        return Refused(
            ErrorCode.OVERLOADED,
            f"the queue is full: {len(self._waiting)} of {self._limits.max_waiting} jobs wait; all jobs hold "
            f"{self._num_bytes} of {self._limits.max_bytes} bytes, this one has {len(event.payload)}",
        )

    def _drop_expired(self, now: float) -> list[Effect]:
        if now < self._no_deadline_before:
            return []
        expired = [job for job in self._waiting.values() if job.expired(now)]
        for job in expired:
            self._unwait(job)
            self._finish(job, _Outcome.EXPIRED, now)
        self._no_deadline_before = min(
            (job.deadline for job in self._waiting.values() if job.deadline is not None), default=math.inf
        )
        return [Expired(job.job_id) for job in expired]

    def _wait(self, job: _Job, *, at_head: bool) -> None:
        line = self._lines.setdefault(job.line, deque())
        if at_head:
            line.appendleft(job)
        else:
            line.append(job)
        self._waiting[job.job_id] = job
        if job.deadline is not None:
            self._no_deadline_before = min(self._no_deadline_before, job.deadline)

    def _unwait(self, job: _Job) -> None:
        del self._waiting[job.job_id]
        line = self._lines[job.line]
        if line[0] is job:
            line.popleft()
        else:
            line.remove(job)
        if not line:
            del self._lines[job.line]

    def _finish(self, job: _Job, outcome: _Outcome, now: float) -> None:
        self._num_bytes -= len(job.payload)
        self._remember(job.job_id, _Finished(now, outcome, job.attempt))

    def _remember(self, job_id: JobId, finished: _Finished) -> None:
        self._finished[job_id] = finished
        if len(self._finished) > self._limits.max_finished:
            self._finished.popitem(last=False)

    # Pulls.

    def _pull(self, event: Pull, now: float) -> list[Effect]:
        if event.pull_id in self._abandoned:
            return [PullEnded(event.pull_id)]
        why = self._why_not(event)
        if why is not None:
            return [PullEnded(event.pull_id, refused=Refused(ErrorCode.INVALID_REQUEST, f"a pull {why}"))]
        if len(self._pulls) >= self._limits.max_pulls:
            refused = Refused(ErrorCode.OVERLOADED, f"{self._limits.max_pulls} pulls wait, which is the queue's bound")
            return [PullEnded(event.pull_id, refused=refused)]
        self._pulls[event.pull_id] = _Waiting(event, now + event.wait_s)
        return []

    def _why_not(self, event: Pull) -> str | None:
        if event.max_jobs < 1:
            return "asks for no job"
        if not 0.0 <= event.wait_s < math.inf:
            return f"waits for {event.wait_s:g} s"
        return f"has the id of another, {event.pull_id}" if event.pull_id in self._pulls else None

    def _serve(self, now: float) -> list[Effect]:
        if not (self._waiting and self._pulls):
            return []
        effects: list[Effect] = []
        hungry = list(self._pulls.values())
        while hungry:
            served: list[_Waiting] = []
            for waiting in hungry:
                job = self._take(waiting.pull.consumer, now, effects)
                if job is not None:
                    waiting.deliveries.append(self._deliver(job, waiting.pull, now))
                    served.append(waiting)
            hungry = [waiting for waiting in served if len(waiting.deliveries) < waiting.pull.max_jobs]
        for pull_id, waiting in list(self._pulls.items()):
            if waiting.deliveries:
                del self._pulls[pull_id]
                effects.append(PullEnded(pull_id, tuple(waiting.deliveries)))
        return effects

    def _take(self, consumer: InstanceId, now: float, effects: list[Effect]) -> _Job | None:
        """The next job for the consumer, out of its line. Expired ones on the way are dropped into effects."""
        while (job := self._next_for(consumer, now)) is not None:
            self._unwait(job)
            if not job.expired(now):
                return job
            self._finish(job, _Outcome.EXPIRED, now)
            effects.append(Expired(job.job_id))
        return None

    def _next_for(self, consumer: InstanceId, now: float) -> _Job | None:
        for line in (consumer, None):
            if line in self._lines:
                return self._lines[line][0]
        free = [jobs[0] for jobs in self._lines.values() if jobs[0].free_at <= now]
        return min(free, key=lambda job: job.number, default=None)

    def _deliver(self, job: _Job, pull: Pull, now: float) -> Delivery:
        job.attempt += 1
        job.num_deliveries += 1
        self._in_flight[job.job_id] = _InFlight(job, pull.pull_id, pull.lease_id, now + self._limits.ack_wait_s)
        seconds_left = None if job.deadline is None else job.deadline - now
        return Delivery(job.job_id, job.attempt, job.payload, seconds_left)

    def _abandon(self, pull_id: int, now: float) -> list[Effect]:
        self._abandoned[pull_id] = now
        self._abandoned.move_to_end(pull_id)
        if len(self._abandoned) > self._limits.max_finished:
            self._abandoned.popitem(last=False)
        if self._pulls.pop(pull_id, None) is not None:
            return [Answer(True), PullEnded(pull_id)]
        unseen = [entry for entry in self._in_flight.values() if entry.pull_id == pull_id]
        for entry in unseen:
            entry.job.num_deliveries -= 1
        return [Answer(bool(unseen)), *self._give_back(unseen, now, "its pull was abandoned")]

    # Deliveries.

    def _current(self, job_id: JobId, attempt: int) -> _InFlight | None:
        entry = self._in_flight.get(job_id)
        return entry if entry is not None and entry.job.attempt == attempt else None

    def _extend(self, event: Extend, now: float) -> Effect:
        entry = self._current(event.job_id, event.attempt)
        if entry is None:
            return Answer(False)
        entry.ack_by = now + self._limits.ack_wait_s
        self._in_flight.move_to_end(event.job_id)
        return Answer(True)

    def _ack(self, event: Ack, now: float) -> Effect:
        entry = self._current(event.job_id, event.attempt)
        if entry is not None:
            del self._in_flight[event.job_id]
            self._finish(entry.job, _Outcome.ACKED, now)
            return Answer(True)
        finished = self._finished.get(event.job_id)
        again = finished is not None and finished.outcome is _Outcome.ACKED and finished.attempt == event.attempt
        return Answer(again)

    def _nack(self, event: Nack, now: float) -> list[Effect]:
        entry = self._current(event.job_id, event.attempt)
        if entry is None:
            return [Answer(False)]
        return [Answer(True), *self._give_back([entry], now, "its consumer gave it back")]

    def _cancel(self, job_id: JobId, now: float) -> Effect:
        waiting = self._waiting.get(job_id)
        if waiting is not None:
            self._unwait(waiting)
            self._finish(waiting, _Outcome.CANCELLED, now)
            return Answer(True)
        entry = self._in_flight.pop(job_id, None)
        if entry is not None:
            self._finish(entry.job, _Outcome.CANCELLED, now)
        elif job_id not in self._finished:
            self._remember(job_id, _Finished(now, _Outcome.CANCELLED, attempt=0))
        return Answer(False)

    def _end_lease(self, lease_id: LeaseId, now: float) -> list[Effect]:
        refused = Refused(ErrorCode.NOT_FOUND, f"lease {lease_id} has ended; take a new lease under a new instance id")
        pulls = [pull_id for pull_id, waiting in self._pulls.items() if waiting.pull.lease_id == lease_id]
        for pull_id in pulls:
            del self._pulls[pull_id]
        held = [entry for entry in self._in_flight.values() if entry.lease_id == lease_id]
        effects: list[Effect] = [PullEnded(pull_id, refused=refused) for pull_id in pulls]
        return effects + self._give_back(held, now, "its consumer's lease ended")

    def _give_back(self, entries: list[_InFlight], now: float, reason: str) -> list[Effect]:
        effects: list[Effect] = []
        for entry in sorted(entries, key=lambda entry: entry.job.number, reverse=True):
            job = entry.job
            del self._in_flight[job.job_id]
            if job.num_deliveries >= self._limits.max_deliveries:
                self._dead.append(DeadLetter(job.job_id, job.attempt, reason, job.payload))
                self._finish(job, _Outcome.DEAD, now)
                effects.append(Buried(job.job_id, job.attempt, reason))
            else:
                job.free_at = now
                self._wait(job, at_head=True)
                effects.append(CameBack(job.job_id, job.attempt, reason))
        return effects
