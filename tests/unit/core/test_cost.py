import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.cost import ALPHA, Quote, StepTime, StepTimeRow, find_row, overlap_difference

H200_405B = StepTime(14.6, 0.1202, 1.84e-6, 22.6, 0.0809, 1.28e-5)


def test_a_prefill_and_a_step_are_what_the_formulas_say() -> None:
    step = StepTime(a=10, b=0.1, c=0.001, d0=20, d1=0.5, d2=0.01)
    assert step.prefill_ms(100) == pytest.approx(10 + 10 + 0.001 * 100 * 50)
    assert step.prefill_ms(100, 1000) == pytest.approx(10 + 10 + 0.001 * 100 * 1050)
    assert step.decode_ms(4, 2000) == pytest.approx(20 + 2 + 20)
    assert step.scaled(2).prefill_ms(100) == pytest.approx(2 * step.prefill_ms(100))


def test_a_mixed_step_is_the_longer_of_its_linear_parts_and_all_of_its_attention() -> None:
    step = StepTime(a=10, b=0.1, c=0.001, d0=20, d1=0.5, d2=0.01)
    decodes = [(1000, 1), (500, 1)]
    assert step.mixed_ms(decodes) == pytest.approx(20 + 2 * 0.5 + 0.01 * 1500)
    assert step.mixed_ms(decodes) == pytest.approx(step.decode_ms(2, 1500))
    # A small prefill hides behind the weights that the decodes read anyway.
    assert step.mixed_ms([*decodes, (0, 10)]) == pytest.approx(21 + 0.001 * 10 * 5 + 15)
    # A large one takes 10 + 0.1 x (300 + 2), and its attention over the 40 tokens before it.
    assert step.mixed_ms([*decodes, (40, 300)]) == pytest.approx(40.2 + 0.001 * 300 * (40 + 150) + 15)
    two = step.mixed_ms([(0, 100), (200, 100)])
    assert two == pytest.approx(10 + 20 + 0.001 * (100 * 50 + 100 * 250))
    assert step.mixed_ms([(40, 300)]) == pytest.approx(step.prefill_ms(300, 40))


def test_8k_tokens_on_a_405b_take_a_second() -> None:
    assert 900 < H200_405B.prefill_ms(8192) < 1150


@given(
    prompt=st.integers(1, 100_000),
    output=st.integers(1, 4000),
    cached=st.floats(0, 1),
    queue=st.floats(0, 1e5),
    streams=st.integers(0, 256),
    kv=st.floats(0, 1e6),
    local=st.floats(0, 1),
)
def test_a_total_is_the_sum_of_its_terms(
    prompt: int, output: int, cached: float, queue: float, streams: int, kv: float, local: float
) -> None:
    quote = Quote(H200_405B, prompt, output)
    state = (cached * prompt, queue, streams, kv, local)
    terms = quote.terms(*state)
    assert quote.total_ms(*state) == pytest.approx(terms.total_ms)
    assert min(terms) >= 0
    held = prompt + output / 2
    assert terms.decode_ms == pytest.approx(output * H200_405B.decode_ms(streams + 1, kv + held))
    harm = streams * output * (H200_405B.d1 + H200_405B.d2 * held) + ALPHA * local * streams * terms.prefill_ms
    assert terms.harm_ms == pytest.approx(harm)


@given(
    prompt=st.integers(2, 10_000),
    cached=st.integers(0, 10_000),
    queue=st.floats(0, 1e4),
    streams=st.integers(0, 64),
    kv=st.floats(0, 1e5),
)
def test_more_cached_costs_less_and_more_load_costs_more(
    prompt: int, cached: int, queue: float, streams: int, kv: float
) -> None:
    quote = Quote(H200_405B, prompt, 100)
    base = quote.total_ms(cached, queue, streams, kv, 1.0)
    assert quote.total_ms(cached + 64, queue, streams, kv, 1.0) <= base + 1e-6
    assert quote.total_ms(cached, queue + 1, streams, kv, 1.0) > base
    assert quote.total_ms(cached, queue, streams + 1, kv, 1.0) > base
    assert quote.total_ms(cached, queue, streams, kv + 1000, 1.0) > base


def test_a_prompt_that_is_cached_to_its_end_computes_its_last_token() -> None:
    quote = Quote(H200_405B, 640, 10)
    assert quote.prefill_ms(640) == pytest.approx(H200_405B.prefill_ms(1, 639))


def test_waiting_beats_recomputing_until_the_queue_is_longer_than_the_prefill() -> None:
    quote = Quote(H200_405B, 8000, 300)
    cold = quote.total_ms(0, 0, 0, 0, 1.0)
    assert quote.total_ms(7936, 500, 0, 0, 1.0) < cold
    assert quote.total_ms(7936, 1200, 0, 0, 1.0) > cold


ROWS = (
    StepTimeRow("vllm*", "*405b*fp8*", "*h200*", H200_405B, "a"),
    StepTimeRow("vllm*", "*", "*h100*", StepTime(1, 1, 1, 1, 1, 1), "b"),
)


def test_the_first_row_that_fits_is_used() -> None:
    name = "nvidia/Llama-3.1-405B-Instruct-FP8"
    assert find_row(ROWS, engine="vllm", model=name, device="8 x NVIDIA H200") is ROWS[0]
    assert find_row(ROWS, engine="vllm", model=name, device="NVIDIA H100 80GB HBM3") is ROWS[1]
    assert find_row(ROWS, engine="local", model=name, device="cpu") is None


@pytest.mark.parametrize(
    ("overlap", "cached", "total", "difference"),
    [
        (0, 0, 100, 0),
        (3, 192, 200, 0),
        (3, 191, 192, 0),  # all cached, the last token computed again
        (3, 128, 192, 0),  # all cached, the last block computed again
        (3, 128, 200, -1),
        (3, 64, 192, -2),
        (0, 64, 200, 1),
        (1, 191, 192, 2),
        (0, 63, 64, 1),
        (1, 0, 64, 0),
    ],
)
def test_difference_from_the_engines_count(overlap: int, cached: int, total: int, difference: int) -> None:
    assert overlap_difference(overlap, cached, total, 64) == difference


@given(blocks=st.integers(0, 50), tail=st.integers(1, 63), found=st.integers(0, 50))
def test_any_other_count_of_blocks_is_a_difference(blocks: int, tail: int, found: int) -> None:
    total = 50 * 64 + tail
    assert overlap_difference(blocks, found * 64, total, 64) == found - blocks
