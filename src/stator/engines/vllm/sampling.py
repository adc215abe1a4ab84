"""What vLLM is asked for, from an EngineRequest. No vLLM type appears here: these are keyword arguments."""

import json
from collections.abc import Mapping
from typing import Any

from stator.core.tools.grammar import to_structural_tag
from stator.messages.engine import EngineRequest, SamplingParams
from stator.messages.grammar import Choice, Grammar, Json, Literal, OwnGrammar, Regex
from stator.messages.tokens import num_tokens

CANNOT_RESUME = ("seed", "presence_penalty", "frequency_penalty", "grammar")
"""vLLM takes resumed output for prompt: it draws from the seed's beginning, and penalties over output and grammars do
not see it.
The repetition penalty counts prompt and output alike."""


def sampling_arguments(request: EngineRequest, special_tokens: Mapping[str, int] = {}) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams, for the output that is left after resume_ids.

    structured_outputs: those of vLLM's StructuredOutputsParams. special_tokens: the model's, text to id.
    """
    sampling = request.sampling
    resumed = num_tokens(request.resume_ids)
    return {
        "max_tokens": sampling.max_tokens - resumed,
        "min_tokens": max(0, sampling.min_tokens - resumed),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": _seed(sampling),
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "logit_bias": dict(sampling.logit_bias) or None,
        "allowed_token_ids": list(sampling.allowed_token_ids) or None,
        "structured_outputs": None
        if sampling.grammar is None
        else structured_outputs(sampling.grammar, special_tokens),
        **_TEXT_IS_ELSEWHERE,
    }


def structured_outputs(grammar: Grammar, special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """The plain forms by their own names, which every backend of vLLM has; trees as a structural tag, xgrammar's."""
    match grammar:
        case OwnGrammar(text):
            return {"grammar": text}
        case Json(schema):
            return {"json": schema}
        case Regex(pattern):
            return {"regex": pattern}
        case Choice(options) if all(isinstance(option, Literal) for option in options):
            return {"choice": [option.text for option in options if isinstance(option, Literal)]}
        case _:
            return {"structural_tag": json.dumps(to_structural_tag(grammar, special_tokens))}


def prefill_arguments(transfer: dict[str, Any]) -> dict[str, Any]:
    """The same for a prefill, whose one token nobody reads. transfer: vLLM's `kv_transfer_params`."""
    extra = {"kv_transfer_params": transfer}
    return {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "extra_args": extra, **_TEXT_IS_ELSEWHERE}


_TEXT_IS_ELSEWHERE = {"detokenize": False, "skip_clone": True}


def _seed(sampling: SamplingParams) -> int | None:
    # A request with a seed is sampled on its own, which is slow; one that nobody asked for buys nothing here.
    return None if sampling.seed_drawn else sampling.seed
