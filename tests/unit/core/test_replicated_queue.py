"""Members of one log agree, whenever they came to it."""

import dataclasses

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stator.core import replicated_queue as rq
from stator.core.job_queue_events import Answer, PullEnded, QueueLimits, QueueSize, Refused
from stator.core.replicated_queue import MAX_STEP_S, Body, ReplicatedQueue
from stator.errors import ErrorCode
from stator.ids import InstanceId, JobId, LeaseId

LIMITS = QueueLimits(ack_wait_s=3.0, steal_after_s=1.0, max_deliveries=2, max_waiting=3, max_dead_letters=2)


class Log:
    """Events with stamps, and one member that applies them as they come."""

    def __init__(self, stamp_s: float = 1_000_000.0) -> None:
        self.member = ReplicatedQueue(LIMITS)
        self.entries: list[tuple[float, rq.Logged]] = []
        self.stamp_s = stamp_s

    def write(self, event: rq.Logged, after_s: float = 0.0) -> rq.Applied:
        self.stamp_s += after_s
        self.entries.append((self.stamp_s, event))
        return self.member.apply(len(self.entries), self.stamp_s, event)

    def put(self, job: str, **fields: float) -> rq.Applied:
        return self.write(rq.LoggedPut(JobId(job), Body(f"body-{job}", 1), **fields))

    def pull(self, max_jobs: int = 1, wait_s: float = 0.0, lease: int = 7) -> list[tuple[JobId, int]]:
        pull_id = len(self.entries) + 1
        applied = self.write(rq.LoggedPull(pull_id, InstanceId("w"), LeaseId(lease), max_jobs, wait_s))
        (ended,) = [effect for effect in applied.effects if isinstance(effect, PullEnded)]
        return [(delivery.job_id, delivery.attempt) for delivery in ended.deliveries]


def test_the_writer_learns_its_answer_by_applying() -> None:
    log = Log()
    assert log.put("a").answer == Answer(True)
    assert log.put("a").answer == Answer(False)
    log.put("b")
    log.put("c")
    refused = log.put("d").answer
    assert isinstance(refused, Refused)
    assert refused.code is ErrorCode.OVERLOADED
    assert log.pull(2) == [("a", 1), ("b", 1)]
    assert log.member.size == QueueSize(1, 2)
    assert log.member.leases == {LeaseId(7)}
    assert log.write(rq.LoggedAck(JobId("a"), 1)).answer == Answer(True)
    log.write(rq.LoggedEndLease(LeaseId(7)))
    assert log.pull(3) == [("b", 2), ("c", 1)]


def test_a_clock_that_is_set_right_by_an_hour_drops_no_job() -> None:
    log = Log()
    log.put("late", deadline_s=MAX_STEP_S * 2)
    log.write(rq.LoggedTick(), after_s=3600.0)
    log.write(rq.LoggedTick(), after_s=-7200.0)
    assert log.pull() == [("late", 1)]


def test_the_clock_never_goes_back() -> None:
    log = Log()
    log.put("a")
    log.pull()
    assert log.member.due_in_s == 3.0
    log.write(rq.LoggedTick(), after_s=1.0)
    assert log.member.due_in_s == pytest.approx(2.0)
    log.write(rq.LoggedTick(), after_s=-5.0)
    assert log.member.due_in_s == pytest.approx(2.0)
    log.write(rq.LoggedTick(), after_s=2.0)
    assert log.member.size == QueueSize(waiting=1, in_flight=0)


def test_a_payload_is_freed_when_nothing_refers_to_it() -> None:
    log = Log()
    assert log.put("a").freed == ()
    again = log.write(rq.LoggedPut(JobId("a"), Body("another", 2)))
    assert again.freed == (Body("another", 2),)
    log.pull()
    assert log.write(rq.LoggedAck(JobId("a"), 2)).freed == ()
    assert log.write(rq.LoggedAck(JobId("a"), 1)).freed == (Body("body-a", 1),)
    assert log.write(rq.LoggedAck(JobId("a"), 1)).freed == ()
    log.put("b")
    assert log.write(rq.LoggedCancel(JobId("b"))).freed == (Body("body-b", 1),)
    log.put("c", deadline_s=0.5)
    log.write(rq.LoggedTick(), after_s=1.0)
    expired = log.write(rq.LoggedPull(99, InstanceId("w"), LeaseId(1), 1, 0.0))
    assert expired.freed == (Body("body-c", 1),)


def test_a_dead_letter_keeps_its_payload_until_it_is_forgotten() -> None:
    log = Log()
    freed: list[Body] = []
    for job in "abc":
        log.put(job)
        for attempt in (1, 2):
            assert log.pull() == [(job, attempt)]
            freed += log.write(rq.LoggedNack(JobId(job), attempt)).freed
    assert [letter.job_id for letter in log.member.dead_letters] == ["b", "c"]
    assert freed == [Body("body-a", 1)]
    assert rq.decode_body(log.member.dead_letters[0].payload) == Body("body-b", 1)


def test_rules_and_limits_are_in_the_name() -> None:
    other = dataclasses.replace(LIMITS, max_waiting=4)
    assert rq.log_version(LIMITS) == rq.log_version(dataclasses.replace(LIMITS))
    assert rq.log_version(LIMITS) != rq.log_version(other)


def test_an_event_must_be_the_next() -> None:
    with pytest.raises(AssertionError):
        ReplicatedQueue(LIMITS, 5).apply(7, 1.0, rq.LoggedTick())


def test_what_is_no_snapshot_is_refused() -> None:
    with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
        ReplicatedQueue.restore(b"\x93\x01\x02\x03", LIMITS)


JOBS = st.sampled_from([JobId(name) for name in "abcdef"])
ATTEMPTS = st.integers(1, 3)
LEASES = st.sampled_from([LeaseId(1), LeaseId(2)])
WORKERS = st.sampled_from([InstanceId("v"), InstanceId("w")])
EVENTS = st.one_of(
    st.builds(
        rq.LoggedPut, JOBS, st.builds(Body, st.text("xyz", min_size=1, max_size=4), st.integers(1, 2)),
        st.none() | st.floats(0.1, 5.0), st.none() | WORKERS,
    ),
    st.builds(rq.LoggedPull, st.integers(1, 50), WORKERS, LEASES, st.integers(1, 3), st.floats(0.0, 4.0)),
    st.builds(rq.LoggedExtend, JOBS, ATTEMPTS),
    st.builds(rq.LoggedAck, JOBS, ATTEMPTS),
    st.builds(rq.LoggedNack, JOBS, ATTEMPTS),
    st.builds(rq.LoggedCancel, JOBS),
    st.builds(rq.LoggedAbandon, st.integers(1, 50)),
    st.builds(rq.LoggedEndLease, LEASES),
    st.builds(rq.LoggedTick),
    st.builds(rq.LoggedSnapshot, st.integers(0, 9)),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(-2.0, 4.0)), min_size=1, max_size=40), st.data())
def test_who_begins_with_a_snapshot_agrees_with_who_was_there(
    history: list[tuple[rq.Logged, float]], data: st.DataObject
) -> None:
    log = Log()
    cut = data.draw(st.integers(1, len(history)))
    for event, after_s in history[:cut]:
        log.write(event, after_s)
    late = ReplicatedQueue.restore(log.member.snapshot(), LIMITS)
    for number, (event, after_s) in enumerate(history[cut:], cut + 1):
        encoded = msgspec.msgpack.encode(rq.Entry("writer", number, event))
        same = msgspec.msgpack.decode(encoded, type=rq.Entry).event
        applied = log.write(event, after_s)
        assert late.apply(number, log.stamp_s, same) == applied
        assert (late.size, late.due_in_s, late.leases) == (
            log.member.size, log.member.due_in_s, log.member.leases,
        )  # fmt: skip
    assert late.dead_letters == log.member.dead_letters


EVENTS = (
    rq.LoggedPut(JobId("a"), Body("b", 1)),
    rq.LoggedPull(1, InstanceId("w"), LeaseId(7), 1, 0.0),
    rq.LoggedExtend(JobId("a"), 1),
    rq.LoggedAck(JobId("a"), 1),
    rq.LoggedNack(JobId("a"), 1),
    rq.LoggedCancel(JobId("a")),
    rq.LoggedAbandon(1),
    rq.LoggedEndLease(LeaseId(7)),
    rq.LoggedTick(),
    rq.LoggedSnapshot(3),
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_entry_counts_only_where_its_kind_belongs(event: rq.Logged) -> None:
    entry = rq.Entry("me", 1, event)
    data = msgspec.msgpack.encode(entry)
    assert rq.entry_of(data, rq.place_of(event)) == entry
    for place in (*rq.Place, None):
        if place is not rq.place_of(event):
            with pytest.raises(rq.Misplaced):
                rq.entry_of(data, place)


@given(
    st.binary(max_size=64) | st.builds(lambda head, rest: head + rest, st.just(b"\x93\xa3"), st.binary(max_size=40)),
    st.sampled_from([*rq.Place, None]),
)
@example(b"\x93\xa1\x80\x01\x81", None)  # A text that is not UTF-8.
@example(b"\x93\xa1a\x01" + b"\x91" * 5000, None)
def test_what_is_no_entry_is_misplaced_and_breaks_nobody(data: bytes, place: rq.Place | None) -> None:
    try:
        entry = rq.entry_of(data, place)
    except rq.Misplaced:
        return
    assert rq.place_of(entry.event) is place
