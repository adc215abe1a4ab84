from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.admission import (
    MAX_LOOKED,
    MAX_OVERTAKEN,
    MIN_PACED,
    RETRY_JITTER,
    Line,
    Need,
    QueueLimits,
    Reason,
    Refusal,
    Wait,
    Waiter,
    WaitingLines,
)
from stator.ids import InstanceId
from stator.messages.processor import RouteRequest

FOREVER = float("inf")
A, B = InstanceId("a"), InstanceId("b")


def request(tokens: int = 10, *, priority: int = 0, resumed: bool = False) -> RouteRequest:
    return RouteRequest("m", tokens, 16, priority=priority, resumed=resumed)


class Fleet:
    """Instances that hold so many tokens each, and what runs there; everything that fits is placed."""

    def __init__(self, limits: QueueLimits | None = None, *, others: int = 0, **free: int) -> None:
        """others: instances more that hold 100 tokens each."""
        self.free = {InstanceId(name): tokens for name, tokens in free.items()}
        self.free |= {InstanceId(f"i{n}"): 100 for n in range(others)}
        self.lines = WaitingLines(limits or QueueLimits(), Random(1))
        self.placed: list[tuple[int, InstanceId]] = []
        self.num_looked = 0

    def join(
        self, what: RouteRequest, now: float = 0.0, *, work_ms: float = 100.0, deadline: float = FOREVER
    ) -> Waiter | Refusal:
        return self.lines.join(what, Need(work_ms, 500.0), now, deadline=deadline, num_instances=len(self.free))

    def wait(self, what: RouteRequest, now: float = 0.0, *, work_ms: float = 100.0) -> Waiter:
        waiter = self.join(what, now, work_ms=work_ms)
        assert isinstance(waiter, Waiter)
        return waiter

    def refusal(self, what: RouteRequest, now: float = 0.0, *, deadline: float = FOREVER) -> Refusal:
        refusal = self.join(what, now, deadline=deadline)
        assert isinstance(refusal, Refusal)
        return refusal

    def _place(self, waiter: Waiter, line: Line) -> Wait | None:
        self.num_looked += 1
        tokens = waiter.request.num_prompt_tokens
        for name, free in self.free.items():
            if name not in line.reserved and free >= tokens:
                self.free[name] -= tokens
                self.placed.append((waiter.number, name))
                return None
        return Wait(max(self.free, key=self.free.__getitem__))

    def serve(self, now: float = 0.0) -> list[int]:
        """Numbers of those that were placed."""
        before = len(self.placed)
        self.lines.serve("m", self._place, now, len(self.free))
        return [number for number, _ in self.placed[before:]]


def paced(fleet: Fleet, ms_each: float) -> float:
    """The line places MIN_PACED requests, one every ms_each. The time then."""
    now = 0.0
    waiters = [fleet.wait(request(1), now) for _ in range(MIN_PACED)]
    for _ in waiters:
        now += ms_each
        fleet.free[A] += 1
        assert len(fleet.serve(now)) == 1
    return now


def test_the_order_is_resumed_then_priority_then_arrival() -> None:
    fleet = Fleet(a=0)
    order = [
        fleet.wait(request(10)),
        fleet.wait(request(10, priority=5)),
        fleet.wait(request(10, priority=-5)),
        fleet.wait(request(10)),
        fleet.wait(request(10, priority=9, resumed=True)),
    ]
    fleet.free[A] = 50
    assert fleet.serve() == [order[n].number for n in (4, 2, 0, 3, 1)]
    assert (fleet.lines.num_waiting, fleet.lines.num_tokens) == (0, 0)


def test_small_requests_pass_a_huge_one_that_does_not_fit() -> None:
    fleet = Fleet(a=0, b=0)
    huge = fleet.wait(request(1000))
    small = [fleet.wait(request(10)) for _ in range(3)]
    fleet.free[A] = 30
    assert fleet.serve() == [waiter.number for waiter in small]
    assert huge.overtaken == 3
    assert huge.reserved is None


def test_a_huge_request_that_was_overtaken_often_enough_has_an_instance_kept_for_it() -> None:
    fleet = Fleet(a=500, b=400)
    huge = fleet.wait(request(1000))
    for _ in range(MAX_OVERTAKEN):
        fleet.wait(request(1))
    assert len(fleet.serve()) == MAX_OVERTAKEN
    assert huge.reserved == A, "where it is expected to fit first"
    after = [fleet.wait(request(10)) for _ in range(5)]
    assert fleet.serve() == [waiter.number for waiter in after]
    assert {name for _, name in fleet.placed[-5:]} == {B}, "others still go elsewhere"
    fleet.free[B] = 0
    stuck = fleet.wait(request(10))
    assert fleet.serve() == [], "what is kept is given to no other, although it would fit"
    fleet.free[A] = 1000
    assert fleet.serve() == [huge.number]
    fleet.free[A] = 10
    assert fleet.serve() == [stuck.number], "the reservation went with it"


def test_who_reserved_an_instance_that_is_gone_reserves_another() -> None:
    fleet = Fleet(a=500, b=400)
    huge = fleet.wait(request(1000))
    for _ in range(MAX_OVERTAKEN):
        fleet.wait(request(1))
    fleet.serve()
    del fleet.free[A]
    fleet.lines.forget_instance(A)
    fleet.wait(request(1))
    fleet.serve()
    assert huge.reserved == B


@given(seed=st.integers(0, 2**32), num_instances=st.integers(1, 3), huge_at=st.integers(0, 3))
def test_nobody_starves(seed: int, num_instances: int, huge_at: int) -> None:
    """Small requests come without end, more than can be served; each runs for a few rounds, so that no instance is ever
    empty by itself. A huge one that needs a whole instance is placed within a bounded number of rounds all the same."""
    rng = Random(seed)
    fleet = Fleet(others=num_instances)
    running: list[tuple[int, InstanceId, int]] = []
    sizes: dict[int, int] = {}
    huge: Waiter | None = None
    for turn in range(60):
        if turn == huge_at:
            huge = fleet.wait(request(100))
            sizes[huge.number] = 100
        for _ in range(6 * num_instances):
            size = rng.randint(10, 30)
            sizes[fleet.wait(request(size)).number] = size
        for end, name, size in [r for r in running if r[0] <= turn]:
            fleet.free[name] += size
            running.remove((end, name, size))
        before = len(fleet.placed)
        fleet.serve(float(turn))
        placed = fleet.placed[before:]
        running += [(turn + rng.randint(2, 4), name, sizes[number]) for number, name in placed]
        if huge is not None and any(number == huge.number for number, _ in placed):
            return
    raise AssertionError("the huge request starved")


def test_a_look_has_a_bounded_cost() -> None:
    fleet = Fleet(a=0)
    for _ in range(10 * MAX_LOOKED):
        fleet.wait(request(10))
    fleet.serve()
    assert fleet.num_looked == MAX_LOOKED


@pytest.mark.parametrize(
    ("limits", "tokens"), [(QueueLimits(max_requests=3), [10, 10, 10]), (QueueLimits(max_tokens=1000), [995])]
)
def test_a_full_line_refuses_at_once_but_for_requests_that_ran_already(limits: QueueLimits, tokens: list[int]) -> None:
    fleet = Fleet(limits, a=0)
    for num_tokens in tokens:
        fleet.wait(request(num_tokens))
    waiting = fleet.lines.num_waiting
    assert fleet.refusal(request(10)).reason is Reason.FULL
    assert fleet.lines.num_waiting == waiting
    assert isinstance(fleet.join(request(10, resumed=True)), Waiter)


def test_one_request_larger_than_the_bound_may_wait_alone() -> None:
    fleet = Fleet(QueueLimits(max_tokens=1000), a=0)
    fleet.wait(request(5000))
    assert fleet.refusal(request(1)).reason is Reason.FULL


def test_retry_after_is_the_predicted_drain_time_with_jitter() -> None:
    limits = QueueLimits(max_requests=100)
    fleet = Fleet(limits, a=0, b=0)
    for _ in range(100):
        fleet.wait(request(10), work_ms=400.0)
    drain_s = 100 * 0.4 / 2
    found = [fleet.refusal(request(10)).retry_after_s for _ in range(200)]
    assert min(found) >= drain_s
    assert max(found) <= drain_s * (1 + RETRY_JITTER)
    assert max(found) - min(found) > drain_s * RETRY_JITTER * 0.8, "clients do not come back all at once"


def test_retry_after_is_at_least_a_second() -> None:
    fleet = Fleet(QueueLimits(max_requests=0), a=0)
    assert 1.0 <= fleet.refusal(request(10)).retry_after_s <= 1.5


def test_the_prediction_follows_what_the_line_really_takes() -> None:
    fleet = Fleet(a=0)
    paced(fleet, 700.0)
    for _ in range(10):
        fleet.wait(request(10), 7000.0)
    assert fleet.lines.predicted_wait_ms("m", 1) == pytest.approx(7000, rel=0.05), "100 ms each by the cost model"


def test_before_it_was_seen_to_hold_a_prediction_refuses_nobody() -> None:
    fleet = Fleet(QueueLimits(max_wait_ms=1000), a=0)
    for _ in range(100):
        fleet.wait(request(10))


def test_what_would_wait_too_long_is_refused_at_once() -> None:
    fleet = Fleet(QueueLimits(max_wait_ms=1000), a=0)
    now = paced(fleet, 100.0)
    for _ in range(10):
        fleet.wait(request(10), now)
    refusal = fleet.refusal(request(10), now)
    assert refusal.reason is Reason.WAIT
    assert refusal.wait_ms == pytest.approx(1100)
    assert isinstance(fleet.join(request(10, priority=-1), now), Waiter), "it would be first"


def test_a_deadline_counts_the_wait_and_the_service() -> None:
    fleet = Fleet(a=0)
    now = paced(fleet, 100.0)
    for _ in range(9):
        fleet.wait(request(10), now)
    assert fleet.refusal(request(10), now, deadline=now + 1400).reason is Reason.DEADLINE
    assert isinstance(fleet.join(request(10), now, deadline=now + 1600), Waiter)


def test_those_who_waited_too_long_or_will_are_given_up() -> None:
    fleet = Fleet(QueueLimits(max_wait_ms=1000), a=0)
    now = paced(fleet, 10.0)
    first, resumed = fleet.wait(request(10), now), fleet.wait(request(10, resumed=True), now)
    assert fleet.lines.give_up("m", now + 900, 1) == []
    late = fleet.wait(request(10), now + 900)
    [(waiter, refusal)] = fleet.lines.give_up("m", now + 1000, 1)
    assert (waiter, refusal.reason) == (first, Reason.WAIT)
    assert fleet.lines.num_waiting == 2
    fleet.free[A] = 20
    assert fleet.serve(now + 1000) == [resumed.number, late.number]


def test_the_line_gives_up_early_when_it_moves_slower_than_it_did() -> None:
    fleet = Fleet(QueueLimits(max_wait_ms=2000), a=0)
    now = paced(fleet, 100.0)
    waiters = [fleet.wait(request(1), now) for _ in range(19)]
    for _ in range(3):
        now += 600
        fleet.free[A] += 1
        fleet.serve(now)
    given_up = [waiter for waiter, _ in fleet.lines.give_up("m", now, 1)]
    assert given_up, "they would wait in vain"
    assert waiters[3] not in given_up, "the next in line may still make it"


def test_leaving_gives_back_what_was_taken_of_the_bounds() -> None:
    fleet = Fleet(a=0)
    one, other = fleet.wait(request(10)), fleet.wait(request(20))
    fleet.lines.leave(one)
    fleet.lines.leave(one)
    assert (fleet.lines.num_waiting, fleet.lines.num_tokens) == (1, 20)
    fleet.lines.leave(other)
    assert fleet.lines.predicted_wait_ms("m", 1) == 0.0
    assert fleet.lines.models() == []
    assert not fleet.lines.waits("m")
