"""What vLLM is asked for, from an EngineRequest. No vLLM type appears here: these are keyword arguments."""

from typing import Any

from stator.messages.engine import EngineRequest, SamplingParams
from stator.messages.tokens import num_tokens

CANNOT_RESUME = ("seed", "presence_penalty", "frequency_penalty", "grammar")
"""vLLM takes resumed output for prompt: it draws from the seed's beginning, and penalties over output and grammars do
not see it.
The repetition penalty counts prompt and output alike."""


def sampling_arguments(request: EngineRequest) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams, for the output that is left after resume_ids."""
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
        **_TEXT_IS_ELSEWHERE,
    }


def prefill_arguments(transfer: dict[str, Any]) -> dict[str, Any]:
    """The same for a prefill, whose one token nobody reads. transfer: vLLM's `kv_transfer_params`."""
    extra = {"kv_transfer_params": transfer}
    return {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "extra_args": extra, **_TEXT_IS_ELSEWHERE}


_TEXT_IS_ELSEWHERE = {"detokenize": False, "skip_clone": True}


def _seed(sampling: SamplingParams) -> int | None:
    # A request with a seed is sampled on its own, which is slow; one that nobody asked for buys nothing here.
    return None if sampling.seed_drawn else sampling.seed
