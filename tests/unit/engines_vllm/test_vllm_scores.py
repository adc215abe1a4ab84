"""vLLM's probabilities in ours: which token was first, what is told of how many, and no infinity."""

from types import SimpleNamespace
from typing import Any

import pytest

from stator.engines.vllm.sampling import sampling_arguments
from stator.engines.vllm.scores import prompt_scores, token_scores, with_scores
from stator.messages.engine import LOWEST_LOGPROB, TokenDelta, TokenScore
from stator.testing.contracts.engine_suite import make_request


def at(*ranked: tuple[int, float, int]) -> dict[int, Any]:
    """(token id, logprob, rank), the sampled one first, as vLLM orders them."""
    return {token_id: SimpleNamespace(logprob=logprob, rank=rank) for token_id, logprob, rank in ranked}


def test_a_token_beside_the_likeliest_and_among_them() -> None:
    beside = at((9, -3.0, 7), (5, -0.1, 1), (4, -2.5, 2))
    among = at((4, -2.5, 2), (5, -0.1, 1))
    assert token_scores([9, 4], [beside, among], 2) == [
        TokenScore(-3.0, 7, [5, 4], [-0.1, -2.5]),
        TokenScore(-2.5, 2, [5, 4], [-0.1, -2.5]),
    ]
    assert token_scores([9], [at((9, -3.0, 7))], 0) == [TokenScore(-3.0, 7, [], [])]


def test_what_cannot_come_has_a_number_that_json_knows() -> None:
    (score,) = token_scores([9], [at((9, float("-inf"), 4096))], 0)
    assert score.logprob == LOWEST_LOGPROB


def test_a_prompts_first_token_has_none() -> None:
    positions = [None, at((6, -1.0, 1)), at((7, -2.0, 3), (1, -0.5, 1))]
    assert [score.logprob for score in prompt_scores([5, 6, 7], positions, 1)] == [-1.0, -2.0]
    assert prompt_scores([5, 6], None, 1) == []


@pytest.mark.parametrize("first", [True, False])
def test_a_delta_has_what_was_asked_for(first: bool) -> None:
    output = SimpleNamespace(
        outputs=[SimpleNamespace(logprobs=[at((7, -1.0, 1))])], prompt_logprobs=[None, at((6, -2.0, 2))]
    )
    delta = TokenDelta([7], None, 0)
    both = with_scores(delta, make_request("a", [5, 6], logprobs=0, prompt_logprobs=0), output, first=first)
    assert both.scores == [TokenScore(-1.0, 1, [], [])]
    assert both.prompt_scores == ([TokenScore(-2.0, 2, [], [])] if first else None)
    assert with_scores(delta, make_request("a", [5, 6]), output, first=first) == delta


def test_what_vllm_is_asked_for() -> None:
    plain = sampling_arguments(make_request("a", [5]))
    absent = [plain[name] for name in ("logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids")]
    assert absent == [None] * 4
    fields: dict[str, Any] = {
        "logprobs": 2,
        "prompt_logprobs": 0,
        "logit_bias": ((3, 1.5),),
        "allowed_token_ids": (3, 4),
    }
    asked = sampling_arguments(make_request("a", [5], **fields))
    assert (asked["logprobs"], asked["prompt_logprobs"]) == (2, 0)
    assert (asked["logit_bias"], asked["allowed_token_ids"]) == ({3: 1.5}, [3, 4])
