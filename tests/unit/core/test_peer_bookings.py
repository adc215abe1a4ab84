"""Two routers' bookings between them, on virtual time: what is told, what is noticed, how old it is."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.booked_blocks import BookedBlocks
from stator.core.candidates import Candidate
from stator.core.peer_bookings import (
    FORGET_MS,
    FRESH_MS,
    HEARTBEAT_MS,
    SNAPSHOT_PART,
    STALE_MS,
    BookingLog,
    PeerView,
    draw_candidates,
    num_drawn,
)
from stator.core.peer_load import PeersLoad
from stator.core.routing import Choice, NoRoom, RouterMode, RoutingCore
from stator.core.routing_memory import Sessions
from stator.core.worker_load import WorkerLoad
from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.messages.processor import RouteRequest
from stator.messages.routing import BookingChanges, PeerBooking

A, B = InstanceId("a"), InstanceId("b")


def booking(number: int, worker: InstanceId = A, hashes: list[int] | None = None, **fields: object) -> PeerBooking:
    return PeerBooking(number, worker, 10.0, 20.0, 100.0, 90, hashes or [], 500.0, **fields)  # type: ignore[arg-type]


class Pair:
    """One router's log and another's view of it; the way takes delay_ms."""

    def __init__(self, delay_ms: float = 1.0) -> None:
        self.loads: dict[InstanceId, WorkerLoad] = {}
        self.blocks = BookedBlocks()
        self.sessions = Sessions()
        self.into = PeersLoad(self.loads, self.blocks, self.sessions)
        self.log = BookingLog()
        self.view = PeerView(self.into)
        self.delay_ms = delay_ms

    def subscribe(self, now: float) -> None:
        self.log.follow(True)
        for part in self.log.snapshot(now):
            assert self.view.receive(part, now + self.delay_ms) is not None

    def flush(self, now: float) -> float | None:
        return self.view.receive(self.log.take(now), now + self.delay_ms)

    def streams(self, worker: InstanceId = A) -> int:
        load = self.loads.get(worker)
        return 0 if load is None else load.num_streams


def test_a_booking_counts_as_prefill_until_its_token_and_as_a_stream_until_its_end() -> None:
    pair = Pair()
    pair.subscribe(0.0)
    pair.log.booked(booking(1, hashes=[1, 2, 3]), 10.0)
    assert pair.flush(10.0) == pytest.approx(0.0)
    load = pair.loads[A]
    assert (load.num_streams, load.prompt_tokens, load.kv_tokens) == (1, 90, 100.0)
    assert 0 < load.prefill_queue_ms(12.0) <= 10.0
    assert pair.blocks.overlaps([1, 2, 3, 4], {}, 20.0) == {A: 3}
    pair.log.started(1, 30.0)
    pair.flush(30.0)
    assert load.prefill_queue_ms(31.0) == 0.0
    assert load.num_streams == 1
    pair.log.ended(1, 40.0)
    pair.flush(40.0)
    assert pair.loads == {}, "nobody else knows of that worker"
    assert pair.into.num_bookings == pair.view.num_bookings == 0


def test_what_failed_takes_its_expected_blocks_along() -> None:
    pair = Pair()
    pair.subscribe(0.0)
    pair.log.booked(booking(1, hashes=[1, 2]), 10.0)
    pair.flush(10.0)
    pair.log.failed(1, 11.0)
    pair.log.ended(1, 11.0)
    pair.flush(12.0)
    assert pair.blocks.overlaps([1, 2], {}, 20.0) == {}


def test_what_nobody_heard_of_is_not_told() -> None:
    pair = Pair()
    pair.subscribe(0.0)
    pair.log.booked(booking(1), 1.0)
    pair.log.started(1, 2.0)
    pair.log.ended(1, 3.0)
    told = pair.log.take(4.0)
    assert (told.booked, told.started, told.ended, told.num_open) == ([], [], [], 0)


def test_without_followers_nothing_gathers() -> None:
    calls: list[None] = []
    log = BookingLog()
    log.on_change = lambda: calls.append(None)
    for number in range(1, 101):
        log.booked(booking(number), 1.0)
        log.ended(number, 2.0)
    assert calls == []
    log.follow(True)
    assert log.snapshot(3.0)[0].booked == []


def test_a_new_router_begins_with_the_whole_state_however_large() -> None:
    pair = Pair()
    for number in range(1, 2 * SNAPSHOT_PART + 8):
        pair.log.booked(booking(number, A if number % 2 else B, [number]), float(number))
        if number % 3 == 0:
            pair.log.started(number, float(number))
    pair.subscribe(2000.0)
    assert pair.view.num_bookings == 2 * SNAPSHOT_PART + 7
    assert pair.streams(A) + pair.streams(B) == 2 * SNAPSHOT_PART + 7
    pair.log.ended(5, 2001.0)
    assert pair.flush(2001.0) is not None
    assert pair.view.num_bookings == 2 * SNAPSHOT_PART + 6


@pytest.mark.parametrize("lost", ["item", "booking"])
def test_what_is_missing_is_noticed_and_the_next_state_repairs_it(lost: str) -> None:
    pair = Pair()
    pair.subscribe(0.0)
    pair.log.booked(booking(1), 1.0)
    if lost == "item":
        pair.log.take(1.0)
        pair.log.booked(booking(2), 2.0)
        assert pair.flush(2.0) is None
    else:
        told = pair.log.take(1.0)
        without = BookingChanges(sequence=told.sequence, at_ms=told.at_ms, num_open=told.num_open)
        assert pair.view.receive(without, 2.0) is None
        pair.log.booked(booking(2), 2.0)
    assert not pair.view.whole
    pair.subscribe(10.0)
    assert pair.view.whole
    assert pair.streams() == 2
    assert pair.into.num_bookings == 2


def test_a_silent_peer_counts_for_nothing_until_it_is_heard_again() -> None:
    pair = Pair()
    pair.subscribe(0.0)
    pair.log.booked(booking(1), 1.0)
    pair.flush(1.0)
    pair.view.tick(FORGET_MS)
    assert pair.streams() == 1
    pair.view.tick(FORGET_MS + 3.0)
    assert pair.streams() == pair.view.num_bookings == pair.into.num_bookings == 0
    pair.log.started(1, 2000.0)
    pair.log.booked(booking(2), 2000.0)
    assert pair.flush(2000.0) is not None
    assert pair.streams() == pair.view.num_bookings == 2
    assert pair.loads[A].prefill_queue_ms(2001.0) <= 10.0
    pair.view.close(2100.0)
    assert pair.loads == {}


def test_lag_is_measured_without_a_common_clock() -> None:
    pair = Pair(delay_ms=1_000_000.0)
    assert pair.view.lag_ms(0.0) == math.inf
    pair.subscribe(0.0)
    now = 0.0
    for _ in range(10):
        now += HEARTBEAT_MS
        pair.flush(now)
    assert pair.view.lag_ms(now + pair.delay_ms) == pytest.approx(0.0, abs=0.1)
    pair.view.round_trip(6.0)
    pair.view.round_trip(30.0)
    assert pair.view.lag_ms(now + pair.delay_ms) == pytest.approx(3.0, abs=0.1)
    # The way gets longer: seen with the first item that is late.
    pair.delay_ms += 80.0
    now += HEARTBEAT_MS
    assert pair.flush(now) == pytest.approx(83.0, abs=0.1)
    assert pair.view.lag_ms(now + pair.delay_ms) == pytest.approx(83.0, abs=0.1)
    # Nothing comes any more: seen once a heartbeat is overdue.
    assert pair.view.lag_ms(now + pair.delay_ms + HEARTBEAT_MS + 150.0) == pytest.approx(153.0, abs=0.1)
    assert pair.view.lag_ms(now + pair.delay_ms + 2 * FORGET_MS) == math.inf


def test_lag_falls_again_when_the_way_is_short_again() -> None:
    pair = Pair()
    pair.subscribe(0.0)
    pair.delay_ms = 400.0
    pair.flush(100.0)
    pair.delay_ms = 1.0
    for step in range(40):
        pair.flush(500.0 + step * HEARTBEAT_MS)
    assert pair.view.lag_ms(500.0 + 40 * HEARTBEAT_MS) < FRESH_MS


def test_a_report_that_had_the_booking_already_does_not_count_it_twice() -> None:
    load = WorkerLoad()
    load.report(EngineLoad(num_running=2), {}, 100.0)
    assert load.others(101.0) == (2, 0)
    load.book(-1, 110.0, prefill_ms=1, work_ms=1, kv_tokens=1, prompt_tokens=1, at=95.0)
    assert load.others(111.0) == (1, 0)
    load.book(-2, 112.0, prefill_ms=1, work_ms=1, kv_tokens=1, prompt_tokens=1, at=105.0)
    assert load.others(113.0) == (1, 0), "made after the report"


# What a decision looks at


def test_the_numbers_of_the_research() -> None:
    assert num_drawn(40, 0.0) is num_drawn(40, FRESH_MS) is None
    assert num_drawn(40, FRESH_MS + 0.1) == (4, 8)
    assert num_drawn(40, STALE_MS) == num_drawn(40, math.inf) == (4, 4)
    assert num_drawn(4, math.inf) == (1, 2)
    assert num_drawn(8, math.inf) == (2, 2)


@given(
    num=st.integers(1, 60),
    lag=st.floats(0, 1e4),
    seed=st.integers(0, 1000),
    depths=st.lists(st.integers(0, 9), min_size=60, max_size=60),
)
def test_the_deepest_overlaps_and_the_session_are_always_looked_at(
    num: int, lag: float, seed: int, depths: list[int]
) -> None:
    workers = [InstanceId(f"w{n}") for n in range(num)]
    overlaps = dict(zip(workers, depths, strict=False))
    drawn = draw_candidates(workers, overlaps, lag, Random(seed), session=workers[-1])
    if drawn is None:
        assert lag <= FRESH_MS or num <= 12
        return
    assert drawn <= set(workers)
    assert workers[-1] in drawn
    assert any(overlaps[worker] == max(overlaps.values()) for worker in drawn)
    sizes = num_drawn(num, lag)
    assert sizes is not None
    assert len(drawn) <= sum(sizes) + 1


def candidates(num: int, **fields: int) -> list[Candidate]:
    return [Candidate(InstanceId(f"w{n:02}"), 64, **fields) for n in range(num)]


def test_a_stale_view_draws_and_still_finds_the_only_room() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    core.peer_lag_ms = math.inf
    request = RouteRequest("m", 64, 16)
    workers = candidates(20, max_seqs=1)
    winners: list[InstanceId] = []
    for step in range(20):
        choice = core.admit(request, workers, float(step))
        assert isinstance(choice, Choice)
        assert choice.num_candidates == 20
        winners.append(choice.winner)
    assert len(set(winners)) == 20
    assert isinstance(core.admit(request, workers, 30.0), NoRoom)


class Linked:
    """Two routers of one deployment; what one books the other knows delay_ms later, or never."""

    def __init__(self, seed: int, exchange: bool) -> None:
        self.logs = (BookingLog(), BookingLog())
        self.cores = tuple(RoutingCore(RouterMode.KV, Random(seed * 2 + n), log) for n, log in enumerate(self.logs))
        self.views = (PeerView(self.cores[0].others), PeerView(self.cores[1].others))
        self.exchange = exchange
        for number in range(2):
            self.logs[number].follow(True)
            for part in self.logs[number].snapshot(0.0):
                self.views[1 - number].receive(part, 0.0)

    def tell(self, now: float) -> None:
        for number in range(2):
            changes = self.logs[number].take(now)
            if self.exchange:
                assert self.views[1 - number].receive(changes, now) is not None


@pytest.mark.parametrize("exchange", [True, False])
def test_two_routers_fill_a_fleet_evenly_only_if_they_talk(exchange: bool) -> None:
    worst = 0
    for seed in range(20):
        linked = Linked(seed, exchange)
        counts: dict[InstanceId, int] = {}
        for step in range(8):
            core = linked.cores[step % 2]
            choice = core.choose(RouteRequest("m", 4096, 64), candidates(8), step * 10.0)
            assert choice is not None
            counts[choice.winner] = counts.get(choice.winner, 0) + 1
            linked.tell(step * 10.0)
        worst = max(worst, *counts.values())
    assert (worst == 1) is exchange
