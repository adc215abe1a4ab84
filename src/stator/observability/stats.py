"""Rates and ratios from two readings of an engine. Pure."""

from dataclasses import dataclass

from stator.messages.engine import EngineLoad


@dataclass(frozen=True, slots=True)
class WorkerRates:
    """Tokens per second over an interval; prefix_hit_rate and kv_usage are fractions, 0.0 to 1.0."""

    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    prefix_hit_rate: float
    kv_usage: float


def worker_rates(before: EngineLoad, after: EngineLoad, seconds: float) -> WorkerRates:
    """What happened between two readings that are `seconds` apart.

    Prompt throughput counts the tokens that the engine computed, not those it found in its cache or fetched. The
    hit rate is the interval's, or the engine's lifetime's when the interval saw no prompt. Readings that went
    backwards (an engine that started again) give rates of zero, never negative ones.
    """
    computed = max(0, after.prompt_tokens_computed_total - before.prompt_tokens_computed_total)
    generated = max(0, after.generation_tokens_total - before.generation_tokens_total)
    prompt = after.prompt_tokens_total - before.prompt_tokens_total
    cached = after.prompt_tokens_cached_total - before.prompt_tokens_cached_total
    if prompt <= 0 or cached < 0:
        prompt, cached = after.prompt_tokens_total, after.prompt_tokens_cached_total
    return WorkerRates(
        prompt_tokens_per_s=computed / seconds if seconds > 0 else 0.0,
        generation_tokens_per_s=generated / seconds if seconds > 0 else 0.0,
        prefix_hit_rate=_fraction(cached, prompt),
        kv_usage=_fraction(after.num_blocks_used, after.num_blocks),
    )


def _fraction(part: int, whole: int) -> float:
    return min(1.0, part / whole) if whole > 0 else 0.0
