from collections import defaultdict
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stator.core.job_queue import (
    AbandonPull,
    Ack,
    Answer,
    Buried,
    CameBack,
    Cancel,
    Delivery,
    Effect,
    EndLease,
    Event,
    Expired,
    Extend,
    JobQueueCore,
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


def job(name: str, preferred: str | None = None, deadline_s: float | None = None) -> Put:
    return Put(JobId(name), name.encode(), deadline_s, None if preferred is None else InstanceId(preferred))


def pull(pull_id: int, consumer: str = "c", max_jobs: int = 1, wait_s: float = 100.0, lease: int = 1) -> Pull:
    return Pull(pull_id, InstanceId(consumer), LeaseId(lease), max_jobs, wait_s)


def run(queue: JobQueueCore, now: float, *events: Event) -> list[Effect]:
    """The effects of the last event."""
    effects: list[Effect] = []
    for event in events:
        effects = queue.handle(event, now)
    return effects


def delivered(effects: list[Effect]) -> dict[int, list[tuple[str, int]]]:
    """(job id, attempt) of what each pull got."""
    return {
        effect.pull_id: [(delivery.job_id, delivery.attempt) for delivery in effect.deliveries]
        for effect in effects
        if isinstance(effect, PullEnded)
    }


def test_jobs_that_come_back_together_are_spread_over_the_pulls() -> None:
    queue = JobQueueCore()
    run(queue, 0.0, *(job(name) for name in "abcde"), pull(1, "x", max_jobs=5, lease=9))
    run(queue, 0.0, pull(2, "p", max_jobs=4), pull(3, "q", max_jobs=4))
    effects = run(queue, 1.0, EndLease(LeaseId(9)))
    assert delivered(effects) == {2: [("a", 2), ("c", 2), ("e", 2)], 3: [("b", 2), ("d", 2)]}


def test_the_oldest_of_others_jobs_is_taken_first() -> None:
    queue = JobQueueCore(QueueLimits(steal_after_s=1.0))
    run(queue, 0.0, job("x1", "x"), job("y1", "y"), job("x2", "x"))
    run(queue, 0.0, pull(1, "c", max_jobs=9))
    assert queue.next_deadline == 1.0
    assert run(queue, 0.9, Tick()) == []
    assert delivered(run(queue, 1.0, Tick())) == {1: [("x1", 1), ("y1", 1), ("x2", 1)]}


def test_a_late_ack_does_not_count() -> None:
    queue = JobQueueCore(QueueLimits(ack_wait_s=30.0))
    run(queue, 0.0, job("a"), pull(1))
    came_back, answer = run(queue, 30.0, Ack(JobId("a"), 1))
    assert isinstance(came_back, CameBack)
    assert answer == Answer(False)
    assert queue.size == QueueSize(waiting=1, in_flight=0)


def test_an_extension_lasts_a_whole_ack_wait() -> None:
    queue = JobQueueCore(QueueLimits(ack_wait_s=30.0))
    run(queue, 0.0, job("a"), job("b"), pull(1, max_jobs=2))
    assert run(queue, 20.0, Extend(JobId("a"), 1)) == [Answer(True)]
    assert queue.next_deadline == 30.0
    (back,) = run(queue, 30.0, Tick())
    assert isinstance(back, CameBack)
    assert back.job_id == "b"
    assert queue.next_deadline == 50.0


def test_jobs_of_an_abandoned_pull_come_back_uncounted() -> None:
    queue = JobQueueCore(QueueLimits(max_deliveries=1))
    run(queue, 0.0, job("a"), job("b"), pull(1, max_jobs=2), Ack(JobId("b"), 1))
    answer, back = run(queue, 0.0, AbandonPull(1))
    assert answer == Answer(True)
    assert isinstance(back, CameBack)
    assert delivered(run(queue, 0.0, pull(2))) == {2: [("a", 2)]}
    assert run(queue, 0.0, AbandonPull(1)) == [Answer(False)]
    (buried, *_) = run(queue, 0.0, Nack(JobId("a"), 2))[1:]
    assert isinstance(buried, Buried)


def test_a_pull_that_arrives_after_it_was_abandoned_takes_nothing() -> None:
    queue = JobQueueCore()
    run(queue, 0.0, job("a"), AbandonPull(1))
    assert run(queue, 0.0, pull(1)) == [PullEnded(1)]
    assert queue.size == QueueSize(waiting=1, in_flight=0)


def test_abandoning_a_waiting_pull_ends_it() -> None:
    queue = JobQueueCore()
    run(queue, 0.0, pull(1))
    assert run(queue, 0.0, AbandonPull(1)) == [Answer(True), PullEnded(1)]
    assert run(queue, 0.0, job("a")) == [Answer(True)]


def test_a_full_queue_drops_expired_jobs_before_it_refuses() -> None:
    queue = JobQueueCore(QueueLimits(max_waiting=2))
    run(queue, 0.0, job("a", deadline_s=1.0), job("b"))
    (refused,) = run(queue, 0.5, job("c"))
    assert isinstance(refused, Refused)
    assert refused.code is ErrorCode.OVERLOADED
    assert run(queue, 1.0, job("c")) == [Expired(JobId("a")), Answer(True)]
    assert isinstance(run(queue, 2.0, job("d"))[0], Refused)


def test_the_bytes_of_all_jobs_are_bounded() -> None:
    queue = JobQueueCore(QueueLimits(max_bytes=10))
    run(queue, 0.0, Put(JobId("a"), b"x" * 6), pull(1))
    assert isinstance(run(queue, 0.0, Put(JobId("b"), b"x" * 5))[0], Refused)
    assert run(queue, 0.0, Put(JobId("c"), b"x" * 4)) == [Answer(True)]
    run(queue, 0.0, Ack(JobId("a"), 1))
    assert run(queue, 0.0, Put(JobId("b"), b"x" * 5)) == [Answer(True)]


def test_a_deadline_is_a_time() -> None:
    (refused,) = run(JobQueueCore(), 0.0, job("a", deadline_s=float("nan")))
    assert isinstance(refused, Refused)
    assert refused.code is ErrorCode.INVALID_REQUEST


def test_finished_ids_are_remembered_for_a_while() -> None:
    queue = JobQueueCore(QueueLimits(remember_s=60.0, max_finished=2))
    run(queue, 0.0, job("a"), pull(1), Ack(JobId("a"), 1))
    assert run(queue, 59.0, job("a")) == [Answer(False)]
    assert run(queue, 60.0, job("a")) == [Answer(True)]
    run(queue, 60.0, Cancel(JobId("a")), Cancel(JobId("b")), Cancel(JobId("c")))
    assert run(queue, 60.0, job("a")) == [Answer(True)], "only the last two are remembered"


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (pull(1), ErrorCode.INVALID_REQUEST),
        (pull(9, max_jobs=0), ErrorCode.INVALID_REQUEST),
        (pull(9, wait_s=-1.0), ErrorCode.INVALID_REQUEST),
        (pull(9, wait_s=float("nan")), ErrorCode.INVALID_REQUEST),
        (pull(9, wait_s=float("inf")), ErrorCode.INVALID_REQUEST),
        (pull(9), ErrorCode.OVERLOADED),
    ],
)
def test_pulls_are_refused(event: Pull, code: ErrorCode) -> None:
    queue = JobQueueCore(QueueLimits(max_pulls=2))
    run(queue, 0.0, pull(1), pull(2))
    (ended,) = run(queue, 0.0, event)
    assert isinstance(ended, PullEnded)
    assert ended.refused is not None
    assert ended.refused.code is code


LIMITS = QueueLimits(
    ack_wait_s=30.0, steal_after_s=5.0, max_deliveries=3, max_waiting=6, max_dead_letters=2, max_finished=10_000
)
CONSUMERS = st.sampled_from([InstanceId("x"), InstanceId("y")])


@dataclass
class Known:
    """A job in the model."""

    line: InstanceId | None
    deadline: float | None
    free_at: float
    attempt: int = 0
    counted: int = 0
    taken_by: int | None = None
    ack_by: float = 0.0


class JobQueueMachine(RuleBasedStateMachine):
    """Follows the effects with lists of job ids, one per line, and says which effects were not allowed."""

    @initialize()
    def start(self) -> None:
        self.queue = JobQueueCore(LIMITS)
        self.now = 0.0
        self.num_jobs = 0
        self.num_pulls = 0
        self.jobs: dict[JobId, Known] = {}
        self.lines: dict[InstanceId | None, list[JobId]] = defaultdict(list)
        self.finished: set[JobId] = set()
        self.accepted: set[JobId] = set()
        self.pulls: dict[int, tuple[Pull, float]] = {}
        self.lease_of: dict[int, LeaseId] = {}
        self.delivered: set[tuple[JobId, int]] = set()

    def apply(self, event: Event) -> Effect | None:
        due = {job_id for job_id, known in self.jobs.items() if known.taken_by is not None and known.ack_by <= self.now}
        answer: Effect | None = None
        ended: list[PullEnded] = []
        for effect in self.queue.handle(event, self.now):
            match effect:
                case PullEnded():
                    ended.append(effect)
                case CameBack() | Buried():
                    due.discard(effect.job_id)
                    self.delivery_ended(effect, abandoned=isinstance(event, AbandonPull))
                case Expired():
                    known = self.jobs[effect.job_id]
                    assert known.deadline is not None
                    assert known.deadline <= self.now
                    self.finish(effect.job_id)
                case _:
                    assert answer is None
                    answer = effect
                    self.settled(event, answer)
        self.pulls_ended(ended)
        assert not due, f"no ack in time, and still with their consumers: {due}"
        return answer

    def settled(self, event: Event, answer: Effect) -> None:
        if isinstance(event, Put) and answer == Answer(True):
            deadline = None if event.deadline_s is None else self.now + event.deadline_s
            self.jobs[event.job_id] = Known(event.preferred, deadline, self.now + LIMITS.steal_after_s)
            self.lines[event.preferred].append(event.job_id)
            self.accepted.add(event.job_id)
        ends = isinstance(event, Cancel) or (isinstance(event, Ack) and answer == Answer(True))
        if isinstance(event, Ack | Cancel) and ends and event.job_id in self.jobs:
            self.finish(event.job_id)

    def finish(self, job_id: JobId) -> None:
        known = self.jobs.pop(job_id)
        if known.taken_by is None:
            self.lines[known.line].remove(job_id)
        self.finished.add(job_id)

    def delivery_ended(self, effect: CameBack | Buried, *, abandoned: bool) -> None:
        known = self.jobs[effect.job_id]
        assert known.taken_by is not None
        if abandoned:
            known.counted -= 1
        assert isinstance(effect, Buried) == (known.counted >= LIMITS.max_deliveries)
        if isinstance(effect, Buried):
            self.finish(effect.job_id)
        else:
            known.taken_by = None
            known.free_at = self.now
            self.lines[known.line].insert(0, effect.job_id)

    def pulls_ended(self, effects: list[PullEnded]) -> None:
        """Pulls that are served together get a job each before anyone gets a second."""
        served = [(self.pulls.pop(effect.pull_id)[0], effect.deliveries) for effect in effects]
        for asked, deliveries in served:
            assert len(deliveries) <= asked.max_jobs
        for turn in range(max((len(deliveries) for _, deliveries in served), default=0)):
            for asked, deliveries in served:
                if turn < len(deliveries):
                    self.delivery(asked, deliveries[turn])

    def delivery(self, asked: Pull, delivery: Delivery) -> None:
        known = self.jobs[delivery.job_id]
        assert known.taken_by is None, "delivered to two consumers"
        assert known.deadline is None or known.deadline > self.now
        assert delivery.attempt == known.attempt + 1
        assert (delivery.job_id, delivery.attempt) not in self.delivered
        assert known.line in (asked.consumer, None) or known.free_at <= self.now
        assert self.alive(known.line)[0] == delivery.job_id, "out of order in its line"
        self.delivered.add((delivery.job_id, delivery.attempt))
        self.lines[known.line].remove(delivery.job_id)
        known.attempt += 1
        known.counted += 1
        known.taken_by = asked.pull_id
        known.ack_by = self.now + LIMITS.ack_wait_s

    def alive(self, line: InstanceId | None) -> list[JobId]:
        ids = self.lines[line]
        return [job_id for job_id in ids if (end := self.jobs[job_id].deadline) is None or end > self.now]

    @rule(preferred=st.none() | CONSUMERS, deadline_s=st.none() | st.sampled_from([3.0, 20.0]))
    def put(self, preferred: InstanceId | None, deadline_s: float | None) -> None:
        self.num_jobs += 1
        answer = self.apply(Put(JobId(f"j{self.num_jobs}"), b"payload", deadline_s, preferred))
        if isinstance(answer, Refused):
            assert sum(len(self.alive(line)) for line in list(self.lines)) >= LIMITS.max_waiting

    @precondition(lambda self: self.num_jobs > 0)
    @rule(data=st.data())
    def put_again(self, data: st.DataObject) -> None:
        job_id = JobId(f"j{data.draw(st.integers(1, self.num_jobs))}")
        known = job_id in self.jobs or job_id in self.finished
        answer = self.apply(Put(job_id, b"payload"))
        if known:
            assert answer == Answer(False)

    @rule(consumer=CONSUMERS, max_jobs=st.integers(1, 3), wait_s=st.sampled_from([0.0, 8.0]), lease=st.integers(1, 2))
    def pull(self, consumer: InstanceId, max_jobs: int, wait_s: float, lease: int) -> None:
        self.num_pulls += 1
        asked = Pull(self.num_pulls, consumer, LeaseId(lease), max_jobs, wait_s)
        self.pulls[asked.pull_id] = (asked, self.now + wait_s)
        self.lease_of[asked.pull_id] = asked.lease_id
        self.apply(asked)

    @precondition(lambda self: self.num_pulls > 0)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        pull_id = data.draw(st.integers(1, self.num_pulls))
        self.apply(AbandonPull(pull_id))
        assert pull_id not in self.pulls
        assert all(known.taken_by != pull_id for known in self.jobs.values())

    @precondition(lambda self: self.delivered)
    @rule(data=st.data(), kind=st.sampled_from([Extend, Ack, Nack]))
    def settle(self, data: st.DataObject, kind: type[Extend] | type[Ack] | type[Nack]) -> None:
        job_id, attempt = data.draw(st.sampled_from(sorted(self.delivered)))
        known = self.jobs.get(job_id)
        current = (
            known is not None and known.taken_by is not None and known.attempt == attempt and known.ack_by > self.now
        )
        answer = self.apply(kind(job_id, attempt))
        if current:
            assert answer == Answer(True)
            if kind is Extend and known is not None:
                known.ack_by = self.now + LIMITS.ack_wait_s
        elif kind is not Ack:
            assert answer == Answer(False)

    @precondition(lambda self: self.num_jobs > 0)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = JobId(f"j{data.draw(st.integers(1, self.num_jobs))}")
        known = self.jobs.get(job_id)
        was_waiting = known is not None and (known.taken_by is None or known.ack_by <= self.now)
        answer = self.apply(Cancel(job_id))
        if not was_waiting:
            assert answer == Answer(False)
        assert job_id not in self.jobs
        self.finished.add(job_id)

    @rule(lease=st.integers(1, 2))
    def end_lease(self, lease: int) -> None:
        self.apply(EndLease(LeaseId(lease)))
        assert all(asked.lease_id != lease for asked, _ in self.pulls.values())

    @rule(seconds=st.sampled_from([0.5, 3.0, 31.0]))
    def wait(self, seconds: float) -> None:
        """As a shell does: a Tick at each deadline on the way."""
        until = self.now + seconds
        while (deadline := self.queue.next_deadline) is not None and deadline <= until:
            assert deadline > self.now
            self.now = deadline
            self.apply(Tick())
        self.now = until
        assert self.queue.handle(Tick(), self.now) == [], "something happened before next_deadline"

    @invariant()
    def no_job_is_lost(self) -> None:
        assert self.accepted <= self.jobs.keys() | self.finished
        waiting = sum(known.taken_by is None for known in self.jobs.values())
        assert self.queue.size == QueueSize(waiting=waiting, in_flight=len(self.jobs) - waiting)
        assert waiting == sum(len(ids) for ids in self.lines.values())

    @invariant()
    def no_pull_waits_beside_a_job_that_it_may_have(self) -> None:
        for asked, until in self.pulls.values():
            assert until > self.now
            assert not self.alive(asked.consumer)
            assert not self.alive(None)
            for line in list(self.lines):
                assert all(self.jobs[job_id].free_at > self.now for job_id in self.alive(line)[:1])

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.queue.dead_letters) <= LIMITS.max_dead_letters


TestJobQueueMachine = JobQueueMachine.TestCase
TestJobQueueMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
