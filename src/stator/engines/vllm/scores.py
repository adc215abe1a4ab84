"""vLLM's probabilities of tokens in ours. No vLLM type is imported: what is read is said at each function."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stator.messages.engine import LOWEST_LOGPROB, EngineRequest, TokenDelta, TokenScore
from stator.messages.tokens import unpack

Position = Mapping[int, Any]
"""By token id, an object with `logprob` and `rank`: the token that came, and the likeliest."""


def with_scores(delta: TokenDelta, request: EngineRequest, output: Any, *, first: bool) -> TokenDelta:
    """output: the RequestOutput that the delta is of. first: the request's first."""
    sampling = request.sampling
    scores = of_prompt = None
    if sampling.logprobs is not None:
        scores = token_scores(delta.token_ids, output.outputs[0].logprobs, sampling.logprobs)
    if first and sampling.prompt_logprobs is not None:
        of_prompt = prompt_scores(unpack(request.prompt_ids), output.prompt_logprobs, sampling.prompt_logprobs)
    return msgspec.structs.replace(delta, scores=scores, prompt_scores=of_prompt)


def token_scores(token_ids: Sequence[int], positions: Sequence[Position], num_top: int) -> list[TokenScore]:
    """positions: as `CompletionOutput.logprobs`, one for each token."""
    return [_score(token_id, at, num_top) for token_id, at in zip(token_ids, positions, strict=True)]


def prompt_scores(
    prompt_ids: Sequence[int], positions: Sequence[Position | None] | None, num_top: int
) -> list[TokenScore]:
    """positions: as `RequestOutput.prompt_logprobs`; what the first token has is None. Of the others."""
    return [
        _score(token_id, at, num_top) for token_id, at in zip(prompt_ids[1:], (positions or [])[1:], strict=False) if at
    ]


def _score(token_id: int, at: Position, num_top: int) -> TokenScore:
    own = at[token_id]
    ranked = sorted((each.rank, other) for other, each in at.items())
    top = [other for _, other in ranked[:num_top]]
    return TokenScore(_finite(own.logprob), own.rank, top, [_finite(at[other].logprob) for other in top])


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST_LOGPROB)
