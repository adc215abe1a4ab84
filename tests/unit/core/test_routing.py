from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.cost import StepTime
from stator.core.routing import Candidate, Choice, RouterMode, RoutingCore
from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.messages.processor import RouteRequest

STEP = StepTime(a=2, b=0.1, c=0, d0=2, d1=0.05, d2=1e-4)
BLOCK = 16


def candidates(*names: str, max_num_seqs: int = 4, step: StepTime = STEP) -> list[Candidate]:
    return [Candidate(InstanceId(n), max_num_seqs, BLOCK, step) for n in names]


def request(
    tokens: int = 10, exclude: tuple[str, ...] = (), hashes: list[int] | None = None, session: str | None = None
) -> RouteRequest:
    excluded = tuple(InstanceId(e) for e in exclude)
    return RouteRequest("m", tokens, 16, hashes or [], excluded, session)


def choose(
    core: RoutingCore,
    who: list[Candidate],
    what: RouteRequest | None = None,
    now: float = 0.0,
    held: dict[str, int] | None = None,
) -> Choice:
    found = {InstanceId(n): blocks for n, blocks in (held or {}).items()}
    choice = core.choose(what or request(), who, now, held=found)
    assert choice is not None
    return choice


def winners(core: RoutingCore, who: list[Candidate], count: int) -> list[str]:
    return [choose(core, who).winner for _ in range(count)]


def test_round_robin_takes_everyone_in_turn_and_survives_comings_and_goings() -> None:
    core = RoutingCore(RouterMode.ROUND_ROBIN, Random(1))
    assert winners(core, candidates("a", "b", "c"), 4) == ["a", "b", "c", "a"]
    assert winners(core, candidates("a", "c"), 2) == ["c", "a"]
    assert winners(core, candidates("a", "b", "c"), 2) == ["b", "c"]


@pytest.mark.parametrize("mode", [RouterMode.LEAST_LOADED, RouterMode.KV])
def test_a_burst_spreads_evenly_because_bookings_count_at_once(mode: RouterMode) -> None:
    core = RoutingCore(mode, Random(1))
    assert Counter(winners(core, candidates("a", "b", "c", "d"), 100)) == dict.fromkeys("abcd", 25)


def test_load_is_relative_to_capacity() -> None:
    core = RoutingCore(RouterMode.LEAST_LOADED, Random(1))
    who = [Candidate(InstanceId("big"), 30), Candidate(InstanceId("small"), 10)]
    assert Counter(winners(core, who, 40)) == {"big": 30, "small": 10}


def test_equal_request_counts_go_to_fewer_prompt_tokens() -> None:
    core = RoutingCore(RouterMode.LEAST_LOADED, Random(1))
    first = choose(core, candidates("a", "b"), request(1000))
    second = choose(core, candidates("a", "b"))
    third = choose(core, candidates("a", "b"))
    assert first.winner != second.winner
    assert third.winner == second.winner


@pytest.mark.parametrize("mode", RouterMode)
def test_an_excluded_instance_is_used_only_when_no_other_is_left(mode: RouterMode) -> None:
    core = RoutingCore(mode, Random(1))
    for _ in range(8):
        assert choose(core, candidates("a", "b"), request(exclude=("a",))).winner == "b"
    assert choose(core, candidates("a"), request(exclude=("a",))).winner == "a"


@pytest.mark.parametrize("mode", RouterMode)
def test_no_candidate_no_choice(mode: RouterMode) -> None:
    assert RoutingCore(mode, Random(1)).choose(request(), [], 0.0) is None


def test_the_cached_prefix_draws_a_request_until_the_queue_there_costs_more() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    who = candidates("a", "b", max_num_seqs=64)
    places = [choose(core, who, request(800, hashes=[]), held={"a": 45}).winner for _ in range(12)]
    assert places[0] == "a"
    assert "b" in places, "what a worker holds must not make a hot spot of it"
    assert Counter(places)["a"] > Counter(places)["b"]


def test_siblings_of_a_burst_follow_the_first_before_any_event() -> None:
    core = RoutingCore(RouterMode.KV, Random(3))
    who = candidates("a", "b", "c", max_num_seqs=64)
    hashes = list(range(1000, 1050))
    first = choose(core, who, request(805, hashes=hashes))
    second = choose(core, who, request(805, hashes=[*hashes[:49], 7]), now=40.0)
    assert second.winner == first.winner
    assert second.overlap.blocks == 0
    assert second.overlap.booked == 49


def test_what_a_failed_request_would_have_computed_is_not_expected_any_more() -> None:
    core = RoutingCore(RouterMode.KV, Random(3))
    who = candidates("a", "b", max_num_seqs=64)
    hashes = list(range(1000, 1050))
    first = choose(core, who, request(805, hashes=hashes))
    core.failed(first.booking, 0.0)
    core.release(first.booking, 1.0)
    assert choose(core, who, request(805, hashes=hashes), now=2.0).overlap.booked == 0


def test_booked_blocks_expire() -> None:
    core = RoutingCore(RouterMode.KV, Random(3))
    who = candidates("a", max_num_seqs=64)
    core.release(choose(core, who, request(805, hashes=[1, 2, 3])).booking, 10.0)
    assert choose(core, who, request(805, hashes=[1, 2, 3]), now=300.0).overlap.booked == 3
    assert choose(core, who, request(805, hashes=[1, 2, 3]), now=60_000.0).overlap.booked == 0


def test_a_session_prefers_its_instance_but_does_not_wait_for_it() -> None:
    core = RoutingCore(RouterMode.KV, Random(5))
    who = candidates("a", "b", "c", "d", max_num_seqs=64)
    first = choose(core, who, request(400, session="s"))
    core.release(first.booking, 5.0)
    for turn in range(5):
        again = choose(core, who, request(400, session="s"), now=1e6 * (turn + 1))
        assert again.winner == first.winner
        assert again.candidates()[0].affinity_ms < 0
        core.release(again.booking, 1e6 * (turn + 1) + 50)
    choose(core, [c for c in who if c.instance_id == first.winner], request(4000), now=1e8)
    assert choose(core, who, request(400, session="s"), now=1e8).winner != first.winner


def test_a_view_that_is_not_up_to_date_counts_for_less() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    who = candidates("old", "new", max_num_seqs=64)
    held = {InstanceId("old"): 40, InstanceId("new"): 30}
    choice = core.choose(request(800), who, 0.0, held=held, stale={InstanceId("old")})
    assert choice is not None and choice.winner == "new"


def test_an_instance_that_never_has_what_it_should_loses_its_overlap() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    who = candidates("liar", "b", max_num_seqs=64)
    for _ in range(40):
        core.check.observe(InstanceId("liar"), 40, -40, 0.0)
    choice = choose(core, who, request(800), held={"liar": 40, "b": 10})
    assert choice.winner == "b"


def test_the_slower_of_two_kinds_of_workers_is_taken_when_the_other_is_full() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    who = [*candidates("fast", max_num_seqs=8), *candidates("slow", max_num_seqs=8, step=STEP.scaled(3))]
    places = [choose(core, who).winner for _ in range(16)]
    assert places[0] == "fast"
    assert "slow" in places


def test_a_report_adds_the_load_of_others_only() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    who = candidates("a", "b", max_num_seqs=64)
    mine = [choose(core, candidates("a", max_num_seqs=64), request(100)) for _ in range(3)]
    load = core.load(InstanceId("a"))
    load.report(EngineLoad(num_running=2, num_waiting=1), {}, 1.0)
    assert load.others(1.0) == (0, 0), "all three are this router's own"
    for choice in mine:
        core.release(choice.booking, 2.0)
    load.report(EngineLoad(num_running=3), {}, 3.0)
    assert load.others(3.0) == (0, 0), "they may have ended after the reading"
    load.report(EngineLoad(num_running=9, num_waiting=2), {}, 4.0)
    assert load.others(4.0) == (9, 2)
    assert choose(core, who, now=5.0).winner == "b"
    assert load.others(60_000.0) == (0, 0), "an old report says nothing"


def test_prefills_done_elsewhere_do_not_queue_here() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    load = core.load(InstanceId("a"))
    for step in range(1, 8):
        load.report(EngineLoad(), {"remote": 10 * step, "local": 0}, float(step))
    assert load.local_share < 0.02
    choose(core, candidates("a"), request(1000))
    assert load.prefill_queue_ms(0.0) < 5


def test_a_prefill_waits_in_line_until_its_first_token_or_until_it_is_overdue() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    who = candidates("a", max_num_seqs=64)
    first, second = choose(core, who, request(1000)), choose(core, who, request(1000))
    load = core.load(InstanceId("a"))
    assert load.prefill_queue_ms(0.0) == pytest.approx(204)
    assert load.prefill_queue_ms(50.0) == pytest.approx(154)
    assert load.prefill_queue_ms(500.0) == pytest.approx(102), "the second cannot have started"
    core.first_token(first.booking, 500.0)
    assert load.prefill_queue_ms(550.0) == pytest.approx(52)
    core.first_token(second.booking, 600.0)
    assert load.prefill_queue_ms(600.0) == 0
    choose(core, who, request(1000), now=700.0)
    assert load.prefill_queue_ms(100_000.0) == 0
    assert load.num_streams == 3


def test_the_decision_explains_itself() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    who = candidates(*(f"w{n:02}" for n in range(20)), max_num_seqs=64)
    choice = choose(core, who, request(800), held={"w07": 20, "w13": 40})
    assert choice.winner == "w13"
    assert (choice.num_candidates, len(choice.candidates())) == (20, 8)
    best, next_best = choice.candidates()[:2]
    assert (best.instance_id, best.overlap_blocks) == ("w13", 40)
    assert (next_best.instance_id, next_best.overlap_blocks) == ("w07", 20)
    for terms in choice.candidates():
        parts = terms.queue_ms + terms.prefill_ms + terms.decode_ms + terms.harm_ms + terms.affinity_ms
        assert terms.total_ms == pytest.approx(parts)
    assert choice.cost_ms == pytest.approx(best.total_ms)


def test_the_expected_length_is_learned_and_capped() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    assert choose(core, candidates("a")).expected_output_tokens == 16
    for _ in range(20):
        core.finished("m", 5)
    assert choose(core, candidates("a")).expected_output_tokens == 5


STEPS = st.lists(
    st.tuples(st.sampled_from(["book", "first", "release", "fail", "gone"]), st.integers(1, 5000), st.integers(0, 9)),
    max_size=80,
)


@given(mode=st.sampled_from(RouterMode), seed=st.integers(0, 2**32), steps=STEPS)
def test_bookings_return_to_zero_and_one_seed_gives_one_history(
    mode: RouterMode, seed: int, steps: list[tuple[str, int, int]]
) -> None:
    def play() -> list[str]:
        core = RoutingCore(mode, Random(seed))
        names = ("a", "b", "c")
        open_bookings: list[int] = []
        history: list[str] = []
        now = 0.0
        for what, tokens, pick in steps:
            now += tokens / 10
            if what == "book":
                hashes = [pick * 1000 + i for i in range(tokens // BLOCK)]
                held = {names[pick % 3]: min(pick, len(hashes))}
                choice = choose(core, candidates(*names), request(tokens, hashes=hashes, session=str(pick)), now, held)
                open_bookings.append(choice.booking)
                history.append(choice.winner)
            elif what == "gone":
                core.drop_worker(InstanceId(names[pick % 3]))
            elif open_bookings and what == "first":
                core.first_token(open_bookings[pick % len(open_bookings)], now)
            elif open_bookings:
                booking = open_bookings.pop(pick % len(open_bookings))
                if what == "fail":
                    core.failed(booking, now)
                core.release(booking, now)
                core.release(booking, now)
        for booking in open_bookings:
            core.release(booking, now)
        assert core.num_bookings == 0
        for name in names:
            load = core.load(InstanceId(name))
            assert (load.num_streams, load.prompt_tokens, load.kv_tokens) == (0, 0, 0.0)
            assert load.ahead(now, 4, 100.0) == (0, 0)
        choose(core, candidates(*names), request(10, hashes=[1]), now + 1e9)
        assert core.num_booked_blocks <= 1
        return history

    assert play() == play()


def test_a_running_request_is_booked_where_it_runs() -> None:
    """It counts as a stream with its KV, with no prefill ahead, until it is released; nothing is chosen."""
    core = RoutingCore(RouterMode.KV, Random(1))
    who = candidates("a", "b")
    running = RouteRequest("m", 100, 16, booked_on=InstanceId("a"), started=True, session_id="s")
    bookings = [core.book_existing(running, who[0], 0.0) for _ in range(3)]
    load = core.load(InstanceId("a"))
    assert (core.num_bookings, load.num_streams, load.prompt_tokens) == (3, 3, 300)
    assert load.kv_tokens >= 300
    assert load.prefill_queue_ms(0.0) == 0.0
    assert core.session_instance(running) == "a"
    assert choose(core, who).winner == "b", "the load is seen"
    for booking in bookings:
        core.release(booking, 1.0)
    assert (load.num_streams, load.kv_tokens) == (0, 0.0)


def test_a_request_that_is_still_prefilled_is_booked_with_its_prefill() -> None:
    core = RoutingCore(RouterMode.KV, Random(1))
    (who,) = candidates("a")
    booking = core.book_existing(RouteRequest("m", 1000, 16, booked_on=InstanceId("a")), who, 0.0)
    assert core.load(InstanceId("a")).prefill_queue_ms(0.0) > 0.0
    core.first_token(booking, 5.0)
    assert core.load(InstanceId("a")).prefill_queue_ms(5.0) == 0.0


def test_a_request_on_an_unknown_instance_is_booked_and_released() -> None:
    core = RoutingCore(RouterMode.LEAST_LOADED, Random(1))
    running = RouteRequest("m", 100, 16, booked_on=InstanceId("new"), started=True)
    booking = core.book_existing(running, Candidate(InstanceId("new")), 0.0)
    assert core.load(InstanceId("new")).num_streams == 1
    core.drop_worker(InstanceId("new"))
    core.release(booking, 1.0)
    assert core.num_bookings == 0
