"""Sampling parameters, one by one, and that a draw depends on (seed, position) and the row alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.engines.local.runner import SampleSpec
from stator.engines.local.sampler import adjust_logits, sample_tokens, token_probabilities, uniform
from stator.messages.engine import SamplingParams

EOS = frozenset({0})
NONE = frozenset[int]()
LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.07, 0.03], np.float32))


def spec(seed: int = 1, position: int = 5, num_output: int = 0, **params: Any) -> SampleSpec:
    history = {name: params.pop(name) for name in ("prompt_ids", "output_ids") if name in params}
    return SampleSpec(SamplingParams(max_tokens=9, **params), seed, position, num_output, **history)


def probabilities(logits: np.ndarray = LOGITS, **params: Any) -> list[float]:
    return token_probabilities(logits.copy(), SamplingParams(max_tokens=9, **params)).round(4).tolist()


def adjusted(logits: list[float], **params: Any) -> list[float]:
    row = np.array(logits, np.float32)
    adjust_logits(row, spec(**params), EOS)
    return row.tolist()


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    rows = np.array([[1, 3, 3, 0], [5, 5, 5, 5]], np.float32)
    assert sample_tokens(rows, [spec(temperature=0.0)] * 2, NONE) == [1, 0]


def test_temperature_sharpens_and_flattens() -> None:
    assert probabilities() == [0.4, 0.3, 0.2, 0.07, 0.03]
    squares = np.array([0.16, 0.09, 0.04, 0.0049, 0.0009])
    assert probabilities(temperature=0.5) == pytest.approx((squares / squares.sum()).tolist(), abs=1e-4)
    assert max(probabilities(temperature=100.0)) < 0.21
    tiny = token_probabilities(LOGITS * 50, SamplingParams(max_tokens=1, temperature=1e-4))
    assert tiny.tolist() == [1, 0, 0, 0, 0]


def test_top_k_keeps_the_likeliest_and_ties() -> None:
    assert probabilities(top_k=2) == [0.5714, 0.4286, 0, 0, 0]
    assert probabilities(top_k=99) == probabilities()
    assert probabilities(np.zeros(4, np.float32), top_k=1) == [0.25] * 4


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4), (1.0, 5), (0.0, 1)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    expected = np.array([0.4, 0.3, 0.2, 0.07, 0.03])[:kept]
    assert probabilities(top_p=top_p)[:kept] == pytest.approx((expected / expected.sum()).tolist(), abs=1e-4)
    assert not any(probabilities(top_p=top_p)[kept:])


def test_top_p_takes_lower_ids_first_among_equals() -> None:
    assert probabilities(np.zeros(4, np.float32), top_p=0.6) == [0.3333, 0.3333, 0.3333, 0]


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40), st.floats(0, 0.9999))
def test_top_p_equals_sorting_the_whole_vocabulary(logits: list[float], top_p: float) -> None:
    row = np.array(logits, np.float32)
    full = token_probabilities(row, SamplingParams(max_tokens=1))
    order = sorted(range(len(row)), key=lambda token: (-full[token], token))
    kept, total = set[int](), 0.0
    for token in order:
        if kept and total >= top_p:
            break
        kept.add(token)
        total += full[token]
    found = set(np.flatnonzero(token_probabilities(row, SamplingParams(max_tokens=1, top_p=top_p))).tolist())
    # sums in another order may differ by rounding at the very border
    assert found == {t for t in kept if full[t] > 0} or abs(sum(full[t] for t in found & kept) - top_p) < 1e-9


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert probabilities(min_p=0.45) == pytest.approx([0.4444, 0.3333, 0.2222, 0, 0], abs=1e-4)
    assert probabilities(min_p=1.0) == [1, 0, 0, 0, 0]


def test_limits_combine_in_order() -> None:
    """top_p works on what top_k left: 0.4 and 0.3 of 0.9 reach 0.7, of 1.0 they would not."""
    assert probabilities(top_k=3, top_p=0.7) == [0.5714, 0.4286, 0, 0, 0]


@pytest.mark.parametrize("penalty", [5e-324, 1e-38, 1e38, 1.7e308])
def test_no_repetition_penalty_makes_a_logit_that_is_no_number(penalty: float):
    # Warnings of numpy are errors here.
    row = adjusted([2.0, -2.0, 0.5, 0.5], repetition_penalty=penalty, prompt_ids=[0], output_ids=[1])
    assert np.isfinite(row).all()


def test_penalties() -> None:
    start = [2.0, -2.0, 1.0, 0.5]
    history = {"prompt_ids": [0], "output_ids": [1, 2, 2]}
    assert adjusted(start, presence_penalty=0.5, **history) == [2.0, -2.5, 0.5, 0.5]
    assert adjusted(start, frequency_penalty=0.5, **history) == [2.0, -2.5, 0.0, 0.5]
    assert adjusted(start, repetition_penalty=2.0, **history) == [1.0, -4.0, 0.5, 0.5]
    assert adjusted(start, repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=-1.0, **history) == [
        1.0,
        -4.0,
        -0.5,
        0.5,
    ]
    assert adjusted(start, presence_penalty=1.0) == start


def test_min_tokens_makes_ending_tokens_impossible() -> None:
    rows = np.array([[9, 8, 7, 1]] * 3, np.float32)
    specs = [
        spec(num_output=n, min_tokens=2, stop_token_ids=(1, 77), temperature=t, ignore_eos=True)
        for n, t in ((0, 0.0), (1, 0.01), (2, 0.0))
    ]
    assert sample_tokens(rows, specs, EOS) == [2, 2, 0]


def test_bias_is_added_before_penalties_and_after_what_may_come() -> None:
    assert adjusted([1, 1, 1], logit_bias=((1, 2.5), (2, -1.0))) == [1, 3.5, 0]
    penalized = adjusted([1, 1, 1], logit_bias=((1, 3.0),), repetition_penalty=2.0, prompt_ids=[1], output_ids=[])
    assert penalized == [1, 2, 1]
    inf = float("inf")
    assert adjusted([1, 2, 3], allowed_token_ids=(1,), logit_bias=((2, 100.0),)) == [-inf, 2, -inf]


def test_where_nothing_may_come_something_does() -> None:
    rows = np.zeros((1, 4), np.float32)
    barred = spec(allowed_token_ids=(0,), min_tokens=3)
    assert sample_tokens(rows, [barred], EOS) == [0]


def test_draws_follow_the_distribution() -> None:
    count = 20_000
    rows = np.tile(LOGITS, (count, 1))
    tokens = sample_tokens(rows, [spec(seed=7, position=i) for i in range(count)], NONE)
    expected = np.exp(LOGITS.astype(float)) * count
    chi_square = float(((np.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize("by", ["position", "seed"])
def test_uniform_numbers_are_even_and_uncorrelated(by: str) -> None:
    count = 20_000
    numbers = np.array([uniform(3, i) if by == "position" else uniform(i, 3) for i in range(count)])
    bins = np.histogram(numbers, 20, (0, 1))[0]
    assert float(((bins - count / 20) ** 2 / (count / 20)).sum()) < 43.8  # 19 degrees of freedom, p = 0.001
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 0.025
    assert 0 <= numbers.min() < numbers.max() < 1


def test_seeds_of_any_sign_and_size_work() -> None:
    assert len({uniform(seed, 1) for seed in (0, -1, 2**63, 2**64 - 2, -(2**63) + 1)}) == 5


@given(seed=st.integers(0, 2**63), start=st.integers(0, 1000), data=st.data())
def test_a_draw_depends_on_seed_position_and_row_alone(seed: int, start: int, data: st.DataObject) -> None:
    """Resumed at any position, alone or in any batch, a sequence continues with the same tokens."""
    random = np.random.default_rng(seed % 1000)
    rows = random.standard_normal((6, 50)).astype(np.float32)
    specs = [
        spec(seed, start + i, num_output=i, temperature=0.9, top_p=0.9, top_k=30, output_ids=list(range(i)),
             presence_penalty=0.2)
        for i in range(6)
    ]  # fmt: skip
    together = sample_tokens(rows.copy(), specs, NONE)
    order = data.draw(st.permutations(range(6)))
    shuffled = sample_tokens(rows[order].copy(), [specs[i] for i in order], NONE)
    assert [together[i] for i in order] == shuffled
    assert [sample_tokens(rows[i : i + 1].copy(), [specs[i]], NONE)[0] for i in range(6)] == together


def test_masked_tokens_are_never_drawn() -> None:
    row = np.array([[-np.inf, 0.0, -np.inf]], np.float32)
    for position in range(200):
        assert sample_tokens(row.copy(), [spec(position=position)], NONE) == [1]
