import math
from collections import Counter
from random import Random

import pytest

from stator.core.admission import Line, Need, QueueLimits, Wait, Waiter, WaitingLines
from stator.core.candidates import Candidate
from stator.core.cost import StepTime
from stator.core.instance_speed import DEAD_ZONE, HALF_MS, MAX_SLOWNESS, MIN_OBSERVED, InstanceSpeeds
from stator.core.routing import Choice, NoRoom, RouterMode, RoutingCore
from stator.core.worker_load import KV_SHARE, PREFILL_AHEAD_MS, REPORT_VALID_MS, WorkerLoad, seqs_let_in
from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.messages.processor import RouteRequest

STEP = StepTime(a=2, b=0.1, c=0, d0=2, d1=0.05, d2=1e-4)
BLOCK = 16
A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")


def candidates(*names: str, max_num_seqs: int = 4, num_kv_tokens: int = 0, step: StepTime = STEP) -> list[Candidate]:
    limit = seqs_let_in(max_num_seqs)
    return [Candidate(InstanceId(n), max_num_seqs, BLOCK, step, limit, num_kv_tokens) for n in names]


def request(tokens: int = 10, max_tokens: int = 16, exclude: tuple[InstanceId, ...] = ()) -> RouteRequest:
    return RouteRequest("m", tokens, max_tokens, [], exclude)


def book(
    load: WorkerLoad, booking: int, *, prefill_ms: float = 1.0, kv_tokens: float = 100.0, now: float = 0.0
) -> None:
    load.book(booking, now, prefill_ms=prefill_ms, work_ms=10, kv_tokens=kv_tokens, prompt_tokens=10)


@pytest.mark.parametrize(("places", "let_in"), [(1, 2), (4, 5), (16, 17), (256, 272)])
def test_an_engine_gets_a_little_more_than_it_has_places_for(places: int, let_in: int) -> None:
    assert seqs_let_in(places) == let_in


def test_room_ends_with_the_places_and_comes_back_with_a_release() -> None:
    load = WorkerLoad()
    for booking in range(5):
        assert load.has_room(0.0, 5, 0, 1)
        book(load, booking)
    assert not load.has_room(0.0, 5, 0, 1)
    assert load.has_room(0.0, 0, 0, 1), "no bound is known"
    load.release(3, 0.0)
    assert load.has_room(0.0, 5, 0, 1)


def test_what_is_prefilled_elsewhere_takes_no_place_yet_up_to_half_of_them() -> None:
    load = WorkerLoad()
    load.report(EngineLoad(), {"remote": 0}, 0.0)
    for reports in range(1, 20):
        load.report(EngineLoad(), {"remote": 10 * reports}, 0.0)
    for booking in range(15):
        assert load.has_room(0.0, 10, 0, 1), booking
        book(load, booking)
    assert not load.has_room(0.0, 10, 0, 1)
    for booking in range(4):
        load.first_token(booking, 0.0)
    load.release(0, 0.0)
    assert load.has_room(0.0, 10, 0, 1)
    load.first_token(4, 0.0)
    for booking in range(5, 15):
        load.first_token(booking, 0.0)
    assert not load.has_room(0.0, 10, 0, 1), "they run here now"


def test_requests_of_other_routers_take_places_while_their_report_is_valid() -> None:
    load = WorkerLoad()
    load.report(EngineLoad(num_running=4, num_waiting=1), {}, 0.0)
    assert not load.has_room(1.0, 5, 0, 1)
    assert load.has_room(REPORT_VALID_MS, 5, 0, 1)


def test_room_is_bounded_in_kv_tokens_and_an_idle_instance_takes_what_it_can() -> None:
    load = WorkerLoad()
    assert load.has_room(0.0, 9, 1000, 5000)
    book(load, 1, kv_tokens=500)
    most = KV_SHARE * 1000 - 500
    assert load.has_room(0.0, 9, 1000, most)
    assert not load.has_room(0.0, 9, 1000, most + 1)


def test_a_workers_own_count_of_kv_takes_the_place_of_what_was_booked() -> None:
    load = WorkerLoad()
    for booking in range(4):
        book(load, booking, kv_tokens=200)
        load.first_token(booking, 1.0)
    assert not load.has_room(1.0, 9, 1000, 200)
    load.report(EngineLoad(num_running=4, num_blocks=62, num_blocks_used=20), {}, 2.0, block_size=BLOCK)
    assert load.kv_used(2.0) == 320, "they share a prefix"
    book(load, 4, kv_tokens=200)
    assert load.kv_used(2.0) == 520
    load.report(EngineLoad(num_running=4, num_blocks=62, num_blocks_used=20), {}, 3.0, block_size=BLOCK)
    assert load.kv_used(3.0) == 520, "the last one's blocks may not be counted yet"
    load.release(0, 3.0)
    assert load.kv_used(3.0) == 320
    assert load.kv_used(3.0 + REPORT_VALID_MS) == load.kv_tokens == 800


def test_prefill_work_ahead_is_bounded_in_time() -> None:
    load = WorkerLoad()
    book(load, 1, prefill_ms=PREFILL_AHEAD_MS + 100)
    assert not load.has_room(0.0, 9, 0, 1)
    assert load.has_room(101.0, 9, 0, 1), "the engine has been at it"
    book(load, 2, prefill_ms=PREFILL_AHEAD_MS, now=101.0)
    load.first_token(1, 200.0)
    assert not load.has_room(200.0, 9, 0, 1)
    load.first_token(2, 300.0)
    assert load.has_room(300.0, 9, 0, 1)


def admit(
    core: RoutingCore, who: list[Candidate], what: RouteRequest | None = None, **options: object
) -> Choice | NoRoom:
    found = core.admit(what or request(), who, 0.0, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("mode", RouterMode)
def test_places_are_filled_everywhere_before_anybody_waits(mode: RouterMode) -> None:
    core = RoutingCore(mode, Random(1))
    who = candidates("a", "b", "c")
    placed = [admit(core, who) for _ in range(15)]
    assert Counter(c.winner for c in placed if isinstance(c, Choice)) == {"a": 5, "b": 5, "c": 5}
    waiting = admit(core, who)
    assert isinstance(waiting, NoRoom)
    assert waiting.waits_for in "abc"
    assert waiting.need.work_ms > 0 and waiting.need.service_ms > waiting.need.work_ms
    assert core.num_bookings == 15, "one that waits is not booked"


@pytest.mark.parametrize("mode", RouterMode)
def test_reserved_and_excluded_instances_get_nothing(mode: RouterMode) -> None:
    core = RoutingCore(mode, Random(1))
    who = candidates("a", "b", "c")
    for _ in range(5):
        choice = admit(core, who, request(exclude=(A,)), line=Line({B}, {}))
        assert isinstance(choice, Choice) and choice.winner == C
    waiting = admit(core, who, request(exclude=(A,)), line=Line({B}, {}))
    assert isinstance(waiting, NoRoom)


@pytest.mark.parametrize("mode", RouterMode)
def test_a_request_goes_only_where_it_can_ever_fit(mode: RouterMode) -> None:
    core = RoutingCore(mode, Random(1))
    who = [*candidates("a", num_kv_tokens=1000), *candidates("b", num_kv_tokens=4000)]
    for _ in range(3):
        core = RoutingCore(mode, Random(1))
        choice = admit(core, who, request(2000))
        assert isinstance(choice, Choice) and choice.winner == B


def test_a_full_instance_with_the_prefix_is_worth_waiting_for_if_computing_it_elsewhere_takes_longer() -> None:
    slow_prefill = StepTime(a=2, b=1.0, c=0, d0=1, d1=0.01, d2=0)
    who = candidates("a", "b", max_num_seqs=16, step=slow_prefill)
    core = RoutingCore(RouterMode.KV, Random(1))
    for _ in range(17):
        admit(core, who[:1])
    long = RouteRequest("m", 16_000, 16, [1])
    waiting = core.admit(long, who, 0.0, held={A: 999})
    assert isinstance(waiting, NoRoom) and waiting.waits_for == A, "16 s of prefill against a place in a moment"
    placed = core.admit(request(160), who, 0.0, held={A: 5})
    assert isinstance(placed, Choice) and placed.winner == B
    assert isinstance(core.admit(long, who, 0.0, held={A: 999}, line=Line({A}, {})), Choice), (
        "not for one that others wait for"
    )


def test_those_that_wait_by_choice_count_for_each_other() -> None:
    """One instance is a little cheaper; the others have nothing to do. A place there is worth a short wait, fifteen
    requests' one is not."""
    core = RoutingCore(RouterMode.KV, Random(1))
    a_little_faster = candidates("a", max_num_seqs=8, step=STEP.scaled(0.6))
    who = [*a_little_faster, *candidates("b", "c", max_num_seqs=8)]
    lines = WaitingLines(QueueLimits(), Random(1))
    placed: Counter[str] = Counter()

    def place(waiter: Waiter, line: Line) -> Wait | None:
        found = admit(core, who, waiter.request, line=line)
        if isinstance(found, NoRoom):
            return Wait(found.waits_for, found.by_choice)
        placed[found.winner] += 1
        return None

    for _ in range(24):
        lines.join(request(max_tokens=24), Need(1.0, 1.0), 0.0, deadline=math.inf, num_instances=3)
    lines.serve("m", place, 0.0, 3)
    assert placed["a"] == 9, "all that it is let have"
    assert lines.num_waiting < 6, "a few wait for it"
    assert placed["b"] and placed["c"] and placed.total() == 24 - lines.num_waiting


def observe(speeds: InstanceSpeeds, now: float, **ratios: float) -> None:
    for name, ratio in ratios.items():
        speeds.observe(InstanceId(name), "m", 1000.0, 1000.0 * ratio, now)


def test_an_instance_is_slow_beside_the_others_not_by_itself() -> None:
    speeds = InstanceSpeeds()
    for turn in range(20):
        observe(speeds, turn * 100.0, a=3, b=3.2, c=30, d=2.9)
    assert speeds.slowness(C, 2000.0) == pytest.approx(10, rel=0.1)
    assert [speeds.slowness(InstanceId(n), 2000.0) for n in "abd"] == [1, 1, 1], "the constants are off for all"
    assert speeds.slowness(InstanceId("new"), 2000.0) == 1


def test_one_late_token_makes_no_slow_instance() -> None:
    speeds = InstanceSpeeds()
    for turn in range(20):
        observe(speeds, turn * 100.0, a=1, b=1, c=1)
    observe(speeds, 2000.0, c=6)
    assert speeds.slowness(C, 2001.0) < DEAD_ZONE
    observe(speeds, 2000.0, d=50)
    assert speeds.slowness(InstanceId("d"), 2001.0) == 1, f"fewer than {MIN_OBSERVED} observations"


def test_it_is_bounded_forgotten_with_time_and_unlearned_quickly_after_that() -> None:
    speeds = InstanceSpeeds()
    for turn in range(40):
        observe(speeds, turn * 100.0, a=1, b=1, c=1000)
    now = 4000.0
    assert speeds.slowness(C, now) == MAX_SLOWNESS
    for later in range(30):
        observe(speeds, now + later * 2000.0, a=1, b=1)
    now += 2 * HALF_MS
    faded = speeds.slowness(C, now)
    assert 1 < faded < MAX_SLOWNESS / 2, "it is worth a try again"
    observe(speeds, now, c=1)
    assert speeds.slowness(C, now) < faded / 1.2
    for turn in range(12):
        observe(speeds, now + turn * 100.0, c=1)
    assert speeds.slowness(C, now + 1200.0) == 1
    speeds.drop(C)
    assert speeds.slowness(C, now) == 1


def test_models_are_compared_with_themselves() -> None:
    speeds = InstanceSpeeds()
    for turn in range(10):
        observe(speeds, turn * 100.0, a=1, b=1)
        speeds.observe(C, "other", 1000.0, 9000.0, turn * 100.0)
    assert speeds.slowness(C, 1000.0) == 1
