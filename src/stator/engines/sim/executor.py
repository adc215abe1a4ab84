"""Steps that only take time: a StepExecutor on the loop itself, without a thread, on real or virtual time."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from stator.config.step_times import NamedRow
from stator.engines.local.runner import Chunk, Runner, import_blocks
from stator.engines.sim.faults import StepFaults

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_LAG_S = 0.25
"""So far behind its own timing model an engine may be and still catch up; beyond, it is slower than what it plays."""

LAG_WARNING_S = 30.0


class SimExecutor:
    """Computes at once, on the event loop, and returns when the step's time is over. Implements StepExecutor.

    A step's time is `StepTime.mixed_ms` of its chunks, by the simulated speed and the faults' slowdown. A step that
    follows another without a pause begins when that one should have ended: what the machine needs for the simulation
    itself, and timers that are late, do not add up. busy_s: all steps together, as the model says. lag_s: how much
    longer they took, as far as it could not be caught up.

    KV blocks from a peer share one link: they come one after another, at `KvFacts.transfer_gb_per_s`.
    """

    def __init__(self, simulated: NamedRow, *, speed: float = 1.0, faults: StepFaults | None = None) -> None:
        self.faults = faults or StepFaults()
        self.busy_s = 0.0
        self.lag_s = 0.0
        self._step_time = simulated.row.step_time
        self._kv = simulated.kv
        self._speed = speed
        self._end = 0.0
        self._follows = False
        self._link_free_at = 0.0
        self._warned_at: float | None = None
        self._waits: asyncio.Future[None] | None = None
        self._closed = False

    async def run(self, job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._closed:
            raise RuntimeError("the sim engine's executor is closed")
        return job(*args, **kwargs)

    async def step(self, runner: Runner, chunks: Sequence[Chunk]) -> list[int | None]:
        loop = asyncio.get_running_loop()
        begin = self._begin(loop.time())
        sampled = runner.step(chunks)
        duration = self._duration_s(chunks)
        self.busy_s += duration
        self._end = begin + duration
        await self._sleep_until(self._end)
        await self.faults.pass_or_fail(chunks)
        # The engine plans the next step, if there is one, before the loop runs anything else.
        self._follows = True
        loop.call_soon(self._pause)
        return sampled

    async def receive(self, runner: Runner, blocks: Sequence[tuple[int, bytes]]) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        seconds = self._kv.transfer_s(len(blocks) * runner.block_size) / self._speed
        self._link_free_at = max(now, self._link_free_at) + seconds
        await asyncio.sleep(self._link_free_at - now)
        await self.run(import_blocks, runner, blocks)

    async def close(self) -> None:
        self._closed = True

    def hurry(self) -> None:
        """The step under way, if there is one, is over now."""
        if self._waits is not None:
            _wake(self._waits)

    async def _sleep_until(self, when: float) -> None:
        # At least one turn of the loop, however late it is: a step must not starve what it has caused.
        loop = asyncio.get_running_loop()
        self._waits = loop.create_future()
        timer = loop.call_at(when, _wake, self._waits)
        try:
            await self._waits
        finally:
            timer.cancel()
            self._waits = None

    def _duration_s(self, chunks: Sequence[Chunk]) -> float:
        ms = self._step_time.mixed_ms((chunk.start, len(chunk.token_ids)) for chunk in chunks)
        return ms * self.faults.slowdown / self._speed / 1e3

    def _begin(self, now: float) -> float:
        if not self._follows:
            return now
        lag = now - self._end
        if lag <= MAX_LAG_S:
            return self._end
        self.lag_s += lag
        if self._warned_at is None or now - self._warned_at >= LAG_WARNING_S:
            self._warned_at = now
            logger.warning(
                "the simulation cannot keep up: this machine was %.2f s late for a step, %.1f s in all; results are "
                "slower than what is simulated (lower sim-speed or the load, or use more machines)",
                lag, self.lag_s,
            )  # fmt: skip
        return now

    def _pause(self) -> None:
        self._follows = False


def _wake(waits: asyncio.Future[None]) -> None:
    if not waits.done():
        waits.set_result(None)
