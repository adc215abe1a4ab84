import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.messages.engine import EngineLoad
from stator.messages.reports import RouterStats, WorkerReport
from stator.observability.logs import format_router_stats, format_worker_stats
from stator.observability.reporting import LOG_EVERY_S, Reporter
from stator.observability.stats import worker_rates
from stator.testing.clock import run_virtual

BEFORE = EngineLoad(
    num_blocks=100,
    prompt_tokens_total=1000,
    prompt_tokens_cached_total=0,
    prompt_tokens_computed_total=1000,
    generation_tokens_total=500,
)


def test_the_line_a_worker_logs():
    after = EngineLoad(
        num_running=3,
        num_waiting=2,
        num_blocks=100,
        num_blocks_used=25,
        prompt_tokens_total=2000,
        prompt_tokens_cached_total=750,
        prompt_tokens_computed_total=1250,
        generation_tokens_total=1000,
    )
    assert format_worker_stats(BEFORE, after, 5.0) == (
        "Avg prompt throughput: 50.0 tokens/s, Avg generation throughput: 100.0 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 75.0%"
    )


def test_the_line_a_router_logs_while_workers_are_full():
    before = RouterStats(refusals={"queue_full": 2})
    after = RouterStats(
        num_bookings=68, num_waiting=12, num_waiting_tokens=9000, refusals={"queue_full": 3, "deadline": 4}
    )
    assert format_router_stats(before, after, 5.0) == (
        "Waiting for a worker with room: 12 reqs, 9000 prompt tokens, Refused: 5 reqs in 5 s, Running: 68 reqs"
    )


def test_a_router_logs_only_while_somebody_waits_or_is_refused(caplog: pytest.LogCaptureFixture):
    turned_away = RouterStats(refusals={"queue_full": 1})
    readings = [RouterStats(), RouterStats(num_waiting=1), RouterStats(), turned_away, turned_away]
    current = [RouterStats()]

    async def run() -> None:
        reporter = Reporter(lambda: WorkerReport(EngineLoad(), router=current[0]))
        reporter.start()
        for current[0] in readings:
            await asyncio.sleep(LOG_EVERY_S)
        reporter.close()

    with caplog.at_level(logging.INFO, logger="stator"):
        run_virtual(run())
    assert ["Waiting for" in record.message for record in caplog.records] == [True, True]


def test_without_a_prompt_in_the_interval_the_hit_rate_is_the_lifetimes():
    load = EngineLoad(prompt_tokens_total=400, prompt_tokens_cached_total=100)
    assert worker_rates(load, load, 5.0).prefix_hit_rate == 0.25


def test_an_engine_that_started_again_gives_no_negative_rates():
    rates = worker_rates(BEFORE, EngineLoad(), 5.0)
    assert (rates.prompt_tokens_per_s, rates.generation_tokens_per_s, rates.prefix_hit_rate) == (0.0, 0.0, 0.0)


counts = st.integers(0, 10**9)
loads = st.builds(
    EngineLoad,
    num_blocks=counts,
    num_blocks_used=counts,
    prompt_tokens_total=counts,
    prompt_tokens_cached_total=counts,
    prompt_tokens_computed_total=counts,
    generation_tokens_total=counts,
)


@given(loads, loads, st.floats(0, 100))
def test_rates_are_never_negative_and_fractions_stay_in_range(before: EngineLoad, after: EngineLoad, seconds: float):
    rates = worker_rates(before, after, seconds)
    assert rates.prompt_tokens_per_s >= 0
    assert rates.generation_tokens_per_s >= 0
    assert 0 <= rates.prefix_hit_rate <= 1
    assert 0 <= rates.kv_usage <= 1
