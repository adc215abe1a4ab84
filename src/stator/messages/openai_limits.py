"""How much the fields of OpenAI's requests may ask for. The Processor checks by it, `/openapi.json` tells it."""

from dataclasses import dataclass

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_ALLOWED_TOKEN_IDS = 4096
MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100
MAX_TOP_LOGPROBS = 20
"""As vLLM allows by default."""
MAX_N = 128
MAX_CHOICES = 512
"""Of all prompts of a request together; each is a sequence in an engine."""
MAX_ID_DIGITS = 10

INFINITY = float("inf")
_INT32 = (-(2**31), 2**31 - 1)
_INT64 = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Range:
    """low and high included, but `low` if low_excluded, and infinity. words: what is expected, for a refusal."""

    low: float
    high: float
    words: str
    low_excluded: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_excluded else value >= self.low
        return above and value <= self.high and value != INFINITY


def _between(low: float, high: float) -> Range:
    return Range(low, high, f"between {low:g} and {high:g}")


RANGES: dict[str, Range] = {
    "temperature": _between(0, 2),
    "top_p": Range(0, 1, "above 0 and at most 1", low_excluded=True),
    "top_k": Range(-1, _INT32[1], "at least 0, or -1 for off"),
    "min_p": _between(0, 1),
    "presence_penalty": _between(-2, 2),
    "frequency_penalty": _between(-2, 2),
    "repetition_penalty": Range(0, INFINITY, "above 0", low_excluded=True),
    "seed": Range(*_INT64, "a signed 64-bit integer"),
    "priority": Range(*_INT32, "a signed 32-bit integer"),
    "min_tokens": Range(0, _INT32[1], "at least 0"),
    "max_tokens": Range(1, _INT32[1], "at least 1"),
    "max_completion_tokens": Range(1, _INT32[1], "at least 1"),
    "n": _between(1, MAX_N),
    "top_logprobs": _between(0, MAX_TOP_LOGPROBS),
    "prompt_logprobs": _between(0, MAX_TOP_LOGPROBS),
}
"""Of the numbers that both endpoints, or one of them, take. Of none is it said in its type."""
