from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.booked_blocks import BookedBlocks
from stator.core.cost import StepTime
from stator.core.overlap_check import MIN_OVER, MIN_SAMPLES, WARN_EVERY_MS, WINDOW, OverlapCheck
from stator.core.routing import Candidate, Choice, RouterMode, RoutingCore
from stator.core.routing_memory import OutputLengths, Sessions
from stator.ids import InstanceId, RequestId
from stator.messages.engine import EngineInfo, EngineLoad
from stator.messages.processor import RouteRequest
from stator.messages.reports import DECISION_S, DIFFERENCE_BLOCKS
from stator.router.counters import RouterCounters
from stator.router.decisions import DecisionLog
from stator.router.step_time import MAX_FACTOR, SpeedFactor, shipped_step_times

A, B = InstanceId("a"), InstanceId("b")


def info(engine: str, model_id: str, device: str, model: str = "served") -> EngineInfo:
    return EngineInfo(engine, "1", model, 64, 100, 16, 512, 2048, model_id=model_id, device=device)


@pytest.mark.parametrize(
    ("given_info", "a", "d0"),
    [
        (info("vllm", "nvidia/Llama-3.1-405B-Instruct-FP8", "8 x NVIDIA H100 80GB HBM3"), 17.5, 26.8),
        (info("vllm", "nvidia/Llama-3.1-405B-Instruct-FP8", "8 x NVIDIA H200"), 14.6, 22.6),
        (info("vllm", "nvidia/Llama-3_3-Nemotron-Super-49B-v1", "8 x NVIDIA A100-SXM4-80GB"), 22.1, 12.3),
        (info("vllm", "nvidia/Llama-3_3-Nemotron-Super-49B-v1", "8 x NVIDIA H100 80GB HBM3"), 5.2, 7.26),
        (info("vllm", "nvidia/Llama-3_3-Nemotron-Super-49B-v1-FP8", "8 x NVIDIA H100 80GB HBM3"), 7.1, 6.10),
        (info("vllm", "nvidia/Llama-3.1-405B-Instruct-FP8", "8 x NVIDIA A100-SXM4-80GB"), 40, 42),
        (info("local", "stator:tiny-llama", "cpu"), 1.6, 2.57),
        (info("sim", "stator:tiny-llama", "simulated 49b-h200-fp8"), 6.7, 5.66),
        (info("sim", "any", "simulated 49b-h200-fp8 at speed 2.0"), 3.35, 2.83),
        (info("local", "", "", model="tiny-decilm"), 1.38, 1.86),
    ],
)
def test_shipped_constants_are_found(given_info: EngineInfo, a: float, d0: float) -> None:
    step_time = shipped_step_times().of(given_info)
    assert step_time is not None
    assert (step_time.a, step_time.d0) == (a, d0)


def test_unknown_models_and_engines_have_none_and_every_row_names_its_source() -> None:
    shipped = shipped_step_times()
    assert shipped.of(info("vllm", "some/model", "NVIDIA H100")) is None
    assert shipped.of(info("sim", "stator:tiny-llama", "cpu")) is None
    assert shipped.of(info("sim", "stator:tiny-llama", "simulated gpu")) is None
    assert shipped.of(info("sim", "stator:tiny-llama", "simulated tiny-llama at speed x")) is None
    assert shipped.of(info("local", "m", "simulated tiny-llama")) is None
    assert shipped.of(None) is None
    assert all(row.source for row in shipped.rows)
    assert all(each.kv.source and each.kv.num_tokens > 10_000 for each in shipped.named)
    assert len({each.name for each in shipped.named}) == len(shipped.named) == len(shipped.rows)


def reading(steps: int, generated: int, running: int = 1) -> EngineLoad:
    return EngineLoad(num_running=running, steps_total=steps, generation_tokens_total=generated)


def test_the_fallback_is_scaled_by_what_busy_workers_report() -> None:
    base = StepTime(8, 0.03, 0, 8, 0.03, 0)
    factor = SpeedFactor(base)
    assert not factor.report(A, reading(0, 0), 0.0)
    assert factor.report(A, reading(25, 25), 1000.0), "40 ms a step instead of 8"
    assert factor.step_time.d0 == pytest.approx(40, rel=0.01)
    kept = factor.step_time
    assert not factor.report(A, reading(50, 50), 2000.0)
    assert factor.step_time is kept, "no new object for next to no change"
    assert not factor.report(A, reading(60, 60, running=0), 60_000.0), "it was idle in between"
    assert not factor.report(B, reading(1000, 1000), 0.0), "another worker's first reading"
    assert not factor.report(A, reading(0, 0), 61_000.0), "its engine started again"
    factor.forget(A)
    for n in range(50):
        factor.report(B, reading(1000 + 5 * n, 1000), 1e7 * n)
    assert factor.step_time.d0 <= 8 * MAX_FACTOR


def test_one_slow_worker_does_not_make_a_slow_kind() -> None:
    factor = SpeedFactor(StepTime(8, 0.03, 0, 8, 0.03, 0))
    names = [InstanceId(n) for n in "abc"]
    for turn in range(1, 20):
        for name in names:
            steps = turn * (10 if name == "c" else 100)
            factor.report(name, reading(steps, steps), turn * 1000.0)
    assert factor.step_time.d0 == pytest.approx(10, rel=0.11)


def test_overlap_is_trusted_until_predictions_are_persistently_too_high() -> None:
    check = OverlapCheck()
    for n in range(MIN_SAMPLES - 1):
        assert check.observe(A, 10, -5, float(n)) is None
        assert check.trust(A) == 1.0
    warning = check.observe(A, 10, -5, 100.0)
    assert warning is not None
    assert (warning.instance_id, warning.num_over, warning.of) == (A, MIN_SAMPLES, MIN_SAMPLES)
    assert check.trust(A) == pytest.approx(0.5)
    assert check.trust(B) == 1.0
    assert check.observe(A, 10, -5, 200.0) is None, "once a minute"
    assert check.observe(A, 10, -5, 100.0 + WARN_EVERY_MS) is not None
    for _ in range(WINDOW):
        check.observe(A, 10, 0, 300.0)
    assert check.trust(A) == 1.0
    check.observe(B, 4, -4, 0.0)
    check.drop(B)


def test_rare_and_too_low_predictions_are_no_alarm() -> None:
    check = OverlapCheck()
    for n in range(1000):
        assert check.observe(A, 10, -1 if n % 25 == 0 else 3, float(n)) is None
    assert check.trust(A) == 1.0


@given(differences=st.lists(st.integers(-8, 8), max_size=3 * WINDOW))
def test_trust_is_the_share_found_of_the_last_predictions(differences: list[int]) -> None:
    check = OverlapCheck()
    for n, difference in enumerate(differences):
        check.observe(A, 8, difference, float(n))
    last = differences[-WINDOW:]
    over = sum(d < 0 for d in last)
    expected = 1.0
    if len(last) >= MIN_SAMPLES and over >= MIN_OVER and over / len(last) > 0.05:
        expected = sum(8 + min(0, d) for d in last) / (8 * len(last))
    assert check.trust(A) == pytest.approx(expected)


@given(
    seed=st.integers(0, 2**32),
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12), st.integers(1, 30)), max_size=40),
)
def test_booked_blocks_are_those_of_living_insertions(seed: int, steps: list[tuple[int, int, int]]) -> None:
    """Against a plain list. Chains are prefixes of five random ones, as prompts are."""
    rng = Random(seed)
    chains = [[rng.getrandbits(60) for _ in range(12)] for _ in range(5)]
    blocks, model, now = BookedBlocks(), list[tuple[float, InstanceId, list[int]]](), 0.0
    for chain, length, passed in steps:
        now += passed
        instance = (A, B)[length % 2]
        if chain < 5:
            blocks.add(instance, chains[chain][:length], now + 40)
            model.append((now + 40, instance, chains[chain][:length]))
        query = chains[rng.randrange(5)]
        held = {A: rng.randint(0, 12)}
        found = blocks.overlaps(query, held, now)
        for who in (A, B):
            most = max((len(h) for end, i, h in model if end > now and i == who and h[0] == query[0]), default=0)
            assert found.get(who, 0) == (most if most > held.get(who, 0) else 0)
    assert not blocks.overlaps(chains[0], {}, now + 1000)
    assert blocks.num_entries == 0


def test_booked_blocks_are_bounded_and_go_with_their_worker() -> None:
    blocks = BookedBlocks(max_entries=100)
    for n in range(50):
        blocks.add(A, list(range(n * 1000, n * 1000 + 10)), 1e9)
    assert blocks.num_entries == 100
    assert not blocks.overlaps([0], {}, 1.0)
    assert blocks.overlaps([49_000, 49_001], {}, 1.0) == {A: 2}
    blocks.drop_worker(A)
    assert not blocks.overlaps([49_000], {}, 1.0)


def test_lengths_are_a_running_median_and_sessions_are_bounded() -> None:
    lengths = OutputLengths()
    assert lengths.expected("m", 10_000) == 256
    assert lengths.expected("m", 7) == 7
    for n in range(400):
        lengths.add("m", 100 if n % 3 else 2000)
    assert lengths.expected("m", 10_000) == 100
    assert lengths.expected("other", 300) == 256
    sessions = Sessions(max_sessions=2)
    for name in ("x", "y", "x", "z"):
        sessions.put(name, A)
    assert [sessions.get(name) for name in "xyz"] == [A, None, A]


def decide(core: RoutingCore, request: RouteRequest) -> Choice:
    choice = core.choose(request, [Candidate(A), Candidate(B)], 0.0)
    assert choice is not None
    return choice


def test_the_log_keeps_the_last_decisions_and_finds_all_of_a_request() -> None:
    log, core = DecisionLog(max_decisions=3), RoutingCore(RouterMode.KV, Random(1))
    for n, name in enumerate(["r1", "r2", "r2", "r3"]):
        request = RouteRequest("m", 100 + n, 10, [1, 2, 3])
        log.add(RequestId(name), float(n), request, decide(core, request), 64, "events")
    assert len(log) == 3
    assert list(log.records(RequestId("r1"), 10)) == []
    assert log.by_booking(1) is None
    assert [r.num_prompt_tokens for r in log.records(RequestId("r2"), 10)] == [102, 101]
    assert [r.request_id for r in log.records(None, 2)] == ["r3", "r2"]
    record = next(log.records(RequestId("r3"), 1))
    assert (record.num_prompt_blocks, record.num_candidates, record.mode) == (3, 2, "kv")
    assert {terms.instance_id for terms in record.candidates} == {A, B}
    decided = log.by_booking(4)
    assert decided is not None and decided.num_prompt_blocks == 3


def test_counters_add_up() -> None:
    counters = RouterCounters()
    for seconds in (1e-6, 3e-5, 9.0):
        counters.decided("kv", seconds)
    counters.predicted("exact", "events", 0)
    counters.predicted("over", "booked", -3)
    stats = counters.stats(num_bookings=2, index=None)
    assert stats.decisions == {"kv": 3}
    assert stats.predictions == {"exact": {"events": 1}, "over": {"booked": 1}}
    assert len(stats.decision_counts) == len(DECISION_S) + 1 and sum(stats.decision_counts) == 3
    assert stats.decision_counts[0] == stats.decision_counts[-1] == 1
    assert len(stats.difference_counts) == len(DIFFERENCE_BLOCKS) + 1 and stats.difference_sum == 3
