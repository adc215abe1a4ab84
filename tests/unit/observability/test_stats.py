from hypothesis import given
from hypothesis import strategies as st

from stator.messages.engine import EngineLoad
from stator.observability.logs import format_worker_stats
from stator.observability.stats import worker_rates

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
