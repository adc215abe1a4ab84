"""Whether an engine that has work makes steps: health by progress. Pure: the caller reads the engine and the clock.

Rules:

- Progress is a step that ended (`EngineLoad.steps_total` moved), or having no work. What waits for its blocks from a
  prefill engine, or for blocks that a finished prefill still holds, is not work: both end by time-outs of their own.
  It is for an engine that makes steps meanwhile (`EngineInfo.steps_while_waiting`): there the time-outs are its own.
- Time counts only while it was watched (`core.running_time`): a process that was stopped and goes on has not been
  hanging; its engine was stopped with it.
- No progress for the *patience* is a stall, which is told once.
- The patience is `timeout_s`; longer if this engine has made a step that took long (SLOW_STEP_FACTOR times its longest
  one); and when kernels may be compiled, `first_timeout_s`: while it is new, for FIRST_STEPS steps, and whenever it is
  asked for what it has not done before (`EngineLoad.num_first_uses`).

The default for `timeout_s` must outlast the longest healthy step there is, one with a whole batch of prompt tokens, yet
it should end before a lease does, which is the time that a silent worker costs. MIN_TOKENS_PER_S are rates below which
nobody runs an engine: 8192 tokens on a GPU take no more than 8.2 s at 1000 tokens a second.
"""

from dataclasses import dataclass

from stator.core.running_time import RunningTime
from stator.messages.engine import EngineInfo, EngineLoad

BASE_TIMEOUT_S = 8.0
"""With the period of the watch, under the 10 s of a lease."""

FIRST_TIMEOUT_S = 90.0
FIRST_STEPS = 32
SLOW_STEP_FACTOR = 3.0
MAX_GAP_S = 2.0
MIN_TOKENS_PER_S = {"cpu": 100.0}
MIN_TOKENS_PER_S_ELSEWHERE = 1000.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds; see the rules."""

    timeout_s: float
    first_timeout_s: float


@dataclass(frozen=True, slots=True)
class Stall:
    """seconds: without a step. longest_step_s: of this engine before."""

    seconds: float
    steps: int
    num_running: int
    num_waiting: int
    longest_step_s: float

    def __str__(self) -> str:
        return (
            f"the engine made no step for {self.seconds:.1f} s with {self.num_running} requests running and "
            f"{self.num_waiting} waiting, after {self.steps} steps of at most {self.longest_step_s:.1f} s"
        )


def patience_for(info: EngineInfo, configured_s: float | None) -> Patience | None:
    """configured_s: `progress-timeout`, which then holds from the first step on. None: nothing is watched."""
    if configured_s is not None:
        return Patience(configured_s, configured_s) if configured_s else None
    rate = MIN_TOKENS_PER_S.get(info.device, MIN_TOKENS_PER_S_ELSEWHERE)
    timeout_s = max(BASE_TIMEOUT_S, info.max_num_batched_tokens / rate)
    return Patience(timeout_s, max(FIRST_TIMEOUT_S, 3 * timeout_s))


class ProgressWatch:
    """One per engine, from its start. steps_while_waiting: as in EngineInfo."""

    def __init__(
        self,
        patience: Patience,
        load: EngineLoad,
        now: float,
        *,
        max_gap_s: float = MAX_GAP_S,
        steps_while_waiting: bool = False,
    ) -> None:
        self._patience = patience
        self._steps_while_waiting = steps_while_waiting
        self._steps = load.steps_total
        self._first_steps = load.steps_total
        self._time = RunningTime(now, max_gap_s)
        self._looked_at = now
        self._waited_s = 0.0
        self._longest_step_s = 0.0
        self._has_first_uses = load.num_first_uses > 0
        self._told = False

    def observe(self, load: EngineLoad, now: float) -> Stall | None:
        """A reading. now: seconds of any clock that only grows. The stall, if this reading shows one for the first
        time."""
        now = self._time.read(now)
        watched_s = now - self._looked_at
        self._looked_at = now
        made = load.steps_total - self._steps
        moved = made > 0 or not has_work(load, steps_while_waiting=self._steps_while_waiting)
        # Who asked first may be gone before the kernel is there.
        self._has_first_uses = load.num_first_uses > 0 or (self._has_first_uses and not moved)
        if made > 0:
            # Of several steps between two readings only the average is known; a long one is alone.
            self._longest_step_s = max(self._longest_step_s, (self._waited_s + watched_s) / made)
            self._steps = load.steps_total
        if moved:
            self._waited_s = 0.0
            return None
        self._waited_s += watched_s
        if self._told or self._waited_s < self.patience_s:
            return None
        self._told = True
        return Stall(self._waited_s, self._steps, load.num_running, load.num_waiting, self._longest_step_s)

    @property
    def patience_s(self) -> float:
        """How long nothing may happen now."""
        patience = self._patience
        is_new = self._steps - self._first_steps < FIRST_STEPS
        base_s = patience.first_timeout_s if is_new or self._has_first_uses else patience.timeout_s
        return max(base_s, SLOW_STEP_FACTOR * self._longest_step_s)


def has_work(load: EngineLoad, *, steps_while_waiting: bool = False) -> bool:
    """Blocks that are fetched or held may be what all the others wait for."""
    if load.num_running or (steps_while_waiting and load.num_waiting):
        return True
    return load.num_waiting > 0 and not load.num_fetching and not load.num_blocks_held
