"""A model step that takes as long as a step-time model says, asleep: workers of one process then do not compete for its
cores, as they would not on machines of their own. What it computes is the fake runner's."""

import time
from collections.abc import Sequence

from stator.core.cost import StepTime
from stator.engines.local.runner import Chunk
from stator.testing.fake_runner import FakeRunner


def step_ms(step: StepTime, chunks: Sequence[Chunk]) -> float:
    """Of a step that mixes decodes (chunks of one token) and prefills."""
    decodes = [c for c in chunks if len(c.token_ids) == 1]
    prefills = [c for c in chunks if len(c.token_ids) > 1]
    num_new = sum(len(c.token_ids) for c in prefills)
    pairs = sum(len(c.token_ids) * (c.start + len(c.token_ids) / 2) for c in prefills)
    decode_ms = step.decode_ms(len(decodes), 0)
    linear_ms = max(decode_ms, step.prefill_ms(num_new + len(decodes)) - step.c * 0.5 * (num_new + len(decodes)) ** 2)
    return (linear_ms if prefills else decode_ms) + step.c * pairs + step.d2 * sum(c.start for c in decodes)


class TimedRunner(FakeRunner):
    """busy_ms: all steps together."""

    def __init__(self, step_time: StepTime, *, block_size: int, num_blocks: int, max_model_len: int) -> None:
        super().__init__(block_size=block_size, num_blocks=num_blocks, vocab_size=4096, max_model_len=max_model_len)
        self.busy_ms = 0.0
        self._step_time = step_time

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        begin = time.perf_counter()
        result = super().step(chunks)
        ms = step_ms(self._step_time, chunks)
        self.busy_ms += ms
        # What the fake computation took is part of the step, not in addition to it.
        time.sleep(max(0.0, ms / 1e3 - (time.perf_counter() - begin)))
        return result
