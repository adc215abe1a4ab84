"""Picking the next token from logits.

Semantics of the parameters and their order are vLLM's: allowed tokens, grammar, minimum tokens, bias, penalties,
temperature, min_p, top_k, top_p.
Randomness is one uniform number made from (seed, position) alone, so that a sequence that is continued elsewhere, or
in another batch, draws the same tokens. Each row is computed on its own.
"""

import struct
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from stator.engines.local.runner import SampleSpec
from stator.messages.engine import SamplingParams

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy, as in vLLM."""

_MASK_64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, determined by (seed, position). seed: any 64-bit integer."""
    digest = xxhash.xxh3_64_intdigest(struct.pack("<Qq", seed & _MASK_64, position))
    return (digest >> 11) * 2.0**-53


def sample_tokens(logits: F32, specs: Sequence[SampleSpec], eos_token_ids: frozenset[int]) -> list[int]:
    """One token per row. logits: [rows, vocab_size], changed in place. Equal logits: the lowest id wins."""
    for row, spec in zip(logits, specs, strict=True):
        adjust_logits(row, spec, eos_token_ids)
    greedy = np.argmax(logits, axis=-1)
    return [
        int(greedy[index])
        if spec.params.temperature < GREEDY_BELOW or logits[index, greedy[index]] == -np.inf
        else _draw(logits[index], spec)
        for index, spec in enumerate(specs)
    ]


def adjust_logits(row: F32, spec: SampleSpec, eos_token_ids: frozenset[int]) -> None:
    """Apply allowed_token_ids, grammar, min_tokens, logit_bias and penalties to one row in place.

    Ending tokens (the model's and the request's) are impossible until min_tokens were generated, `ignore_eos` or not,
    except where its grammar leaves an output nothing but to end. Repetition divides positive and multiplies negative
    logits of tokens in prompt or output; frequency and presence subtract, per occurrence and once, for tokens in the
    output.
    """
    params = spec.params
    if params.allowed_token_ids:
        allowed = _in_vocabulary(params.allowed_token_ids, len(row))
        kept = row[allowed]
        row[:] = -np.inf
        row[allowed] = kept
    over = spec.grammar is not None and spec.grammar.restrict(row, spec.output_ids or ())
    if spec.num_output < params.min_tokens and not over:
        row[_in_vocabulary([*eos_token_ids, *params.stop_token_ids], len(row))] = -np.inf
    for token_id, bias in params.logit_bias:
        row[token_id] += np.float32(bias)
    output = _in_vocabulary(spec.output_ids or (), len(row))
    if params.repetition_penalty != 1.0:
        seen = np.union1d(output, _in_vocabulary(spec.prompt_ids or (), len(row)))
        # Beyond this a logit would be no number any more.
        penalty = np.float32(min(max(params.repetition_penalty, 1e-30), 1e30))
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    if (params.frequency_penalty or params.presence_penalty) and len(output):
        tokens, counts = np.unique(output, return_counts=True)
        row[tokens] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        row[tokens] -= np.float32(params.presence_penalty)


def _in_vocabulary(ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    array = np.array(ids, np.int64)
    return array[(array >= 0) & (array < vocab_size)]


def _draw(row: F32, spec: SampleSpec) -> int:
    """The first token whose cumulative probability, in the order of ids, exceeds the uniform number."""
    probabilities = token_probabilities(row, spec.params)
    cumulative = np.cumsum(probabilities)
    target = uniform(spec.seed, spec.position) * cumulative[-1]
    token = int(np.searchsorted(cumulative, target, side="right"))
    # rounding may put the target at the very end, behind the last token that can be drawn
    return min(token, int(np.flatnonzero(probabilities)[-1]))


def token_probabilities(row: F32, params: SamplingParams) -> F64:
    """Probabilities of one row after temperature, min_p, top_k and top_p, in float64; they sum to 1.

    top_k keeps tokens that tie with the k-th. top_p keeps the fewest most likely tokens that reach top_p together, at
    least one; among equals the lower id first.
    """
    scaled = row.astype(np.float64) / params.temperature
    scaled -= scaled.max()
    weights = np.exp(scaled)
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0  # the likeliest token weighs exactly 1
    if 0 < params.top_k < len(weights):
        weights[weights < np.partition(weights, -params.top_k)[-params.top_k]] = 0.0
    weights /= weights.sum()
    if params.top_p < 1.0:
        # all tokens below this share are together less than what may be cut, so only the others need sorting
        candidates = np.flatnonzero(weights >= (1.0 - params.top_p) / len(weights))
        order = candidates[np.argsort(-weights[candidates], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        before[0] = -1.0  # the likeliest token always stays
        nucleus = order[before < params.top_p]
        kept = np.zeros_like(weights)
        kept[nucleus] = weights[nucleus]
        weights = kept / kept.sum()
    return weights
