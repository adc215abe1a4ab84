"""What a request costs at a worker, in milliseconds, so that cached blocks, queues and running streams compare. Pure.

With N new prompt tokens behind a cached prefix of P, L expected output tokens, and a worker with B streams that hold
KV tokens together:

    prefill = a + b N + c N (P + N/2)
    step    = d0 + d1 (B + 1) + d2 (KV + prompt + L/2)            one decode step with the newcomer

    cost = queue + prefill + L step                               what the request itself will see
         + ALPHA B prefill + B L (d1 + d2 (prompt + L/2))         what it takes from the streams that run there
         + affinity

A step that computes prefills beside its decodes (chunked prefill):

    mixed = max(d0 + d1 B, a + b (N + B)) + c sum N (P + N/2) + d2 KV

ALPHA is 0.1 because chunked prefill delays a running stream by a part of the prefill only; between 0.03 and 0.3 the
choice hardly changes. The d0 of a step is counted, so that a slow GPU costs more than a fast one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

ALPHA = 0.1


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds: a per prefill, b per new token, c per new token and token before it; d0 per decode step, d1 per
    stream in it, d2 per KV token that its streams hold."""

    a: float
    b: float
    c: float
    d0: float
    d1: float
    d2: float

    def prefill_ms(self, num_new: float, num_prefix: float = 0.0) -> float:
        return self.a + self.b * num_new + self.c * num_new * (num_prefix + num_new / 2)

    def decode_ms(self, num_streams: float, num_kv_tokens: float) -> float:
        """One step."""
        return self.d0 + self.d1 * num_streams + self.d2 * num_kv_tokens

    def mixed_ms(self, chunks: Iterable[tuple[int, int]]) -> float:
        """One step that computes these chunks: (tokens before it, its tokens), one of a single token being a decode."""
        num_decodes = num_kv = num_new = 0
        num_pairs = 0.0
        for num_before, num_tokens in chunks:
            if num_tokens == 1:
                num_decodes += 1
                num_kv += num_before
            else:
                num_new += num_tokens
                num_pairs += num_tokens * (num_before + num_tokens / 2)
        linear = self.d0 + self.d1 * num_decodes
        if num_new:
            linear = max(linear, self.a + self.b * (num_new + num_decodes))
        return linear + self.c * num_pairs + self.d2 * num_kv

    def scaled(self, factor: float) -> "StepTime":
        return StepTime(*(x * factor for x in (self.a, self.b, self.c, self.d0, self.d1, self.d2)))


@dataclass(frozen=True, slots=True)
class StepTimeRow:
    """Constants and where they hold: patterns with `*`, matched without regard to case against the engine's name, the
    model's id and the device. source: where the numbers are from."""

    engine: str
    model: str
    device: str
    step_time: StepTime
    source: str

    def matches(self, engine: str, model: str, device: str) -> bool:
        given = ((self.engine, engine), (self.device, device))
        return self.matches_model(model) and all(fnmatchcase(text.lower(), pattern.lower()) for pattern, text in given)

    def matches_model(self, model: str) -> bool:
        return fnmatchcase(model.lower(), self.model.lower())


def find_row(rows: Iterable[StepTimeRow], *, engine: str, model: str, device: str) -> StepTimeRow | None:
    """The first that matches."""
    return next((row for row in rows if row.matches(engine, model, device)), None)


class Terms(NamedTuple):
    """Parts of a cost, in ms."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    harm_ms: float
    affinity_ms: float

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.prefill_ms + self.decode_ms + self.harm_ms + self.affinity_ms


class Quote:
    """One request's cost at the workers of one step time. Linear in a worker's state, so what does not depend on the
    worker is computed once: `total_ms` is called for every candidate of every request.

    num_prompt_tokens, num_output_tokens: of the request, the latter expected.
    """

    __slots__ = ("_decode", "_harm_per_stream", "_per_kv", "_prefill", "_prompt", "_step", "per_stream", "step_ms")

    def __init__(self, step: StepTime, num_prompt_tokens: int, num_output_tokens: float) -> None:
        held = num_prompt_tokens + num_output_tokens / 2
        self._step = step
        self._prompt = num_prompt_tokens
        self._prefill: dict[float, float] = {}
        self._decode = num_output_tokens * (step.d0 + step.d1 + step.d2 * held)
        self._per_kv = num_output_tokens * step.d2
        self._harm_per_stream = num_output_tokens * (step.d1 + step.d2 * held)
        self.per_stream = num_output_tokens * step.d1 + self._harm_per_stream
        self.step_ms = step.decode_ms(1, held)

    def prefill_ms(self, num_cached: float) -> float:
        """With that many leading tokens cached. An engine computes at least the last token, for its logits."""
        known = self._prefill.get(num_cached)
        if known is None:
            new = max(1.0, self._prompt - num_cached)
            known = self._prefill[num_cached] = self._step.prefill_ms(new, self._prompt - new)
        return known

    def total_ms(
        self, num_cached: float, queue_ms: float, num_streams: float, num_kv_tokens: float, local_share: float
    ) -> float:
        """As the sum of `terms`, without affinity. local_share: the part of its prefills that the worker computes
        itself, 0 to 1; prefills that are done elsewhere do not delay its streams."""
        prefill_ms = self.prefill_ms(num_cached)
        return (
            queue_ms
            + prefill_ms * (1.0 + ALPHA * local_share * num_streams)
            + self._decode
            + self.per_stream * num_streams
            + self._per_kv * num_kv_tokens
        )

    def terms(
        self,
        num_cached: float,
        queue_ms: float,
        num_streams: float,
        num_kv_tokens: float,
        local_share: float,
        affinity_ms: float = 0.0,
    ) -> Terms:
        prefill_ms = self.prefill_ms(num_cached)
        held_streams_ms = (self.per_stream - self._harm_per_stream) * num_streams
        return Terms(
            queue_ms=queue_ms,
            prefill_ms=prefill_ms,
            decode_ms=self._decode + held_streams_ms + self._per_kv * num_kv_tokens,
            harm_ms=num_streams * (ALPHA * local_share * prefill_ms + self._harm_per_stream),
            affinity_ms=affinity_ms,
        )


def overlap_difference(overlap_blocks: int, num_cached_tokens: int, num_total_tokens: int, block_size: int) -> int:
    """Blocks that an engine found in its cache beyond (negative: short of) the predicted ones; 0 when it was exact.

    num_cached_tokens: the engine's count. num_total_tokens: of the sequence that it started with. Engines compute at
    least the last token again, some the last block: of a prompt that is cached to its end they report that much less,
    which is no error of the prediction.
    """
    if overlap_blocks * block_size >= num_total_tokens and num_cached_tokens >= (overlap_blocks - 1) * block_size:
        return 0
    found = num_cached_tokens + 1 if num_cached_tokens == num_total_tokens - 1 else num_cached_tokens
    return found // block_size - overlap_blocks
