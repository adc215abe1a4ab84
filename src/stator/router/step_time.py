"""How long the steps of a worker take: the shipped constants (`config.step_times`), or a fallback scaled by reports."""

from statistics import median

from stator.config.step_times import StepTimes, shipped_step_times
from stator.core.cost import StepTime
from stator.ids import InstanceId
from stator.messages.engine import EngineLoad

__all__ = ["SpeedFactor", "StepTimes", "shipped_step_times"]

MIN_FACTOR, MAX_FACTOR = 0.01, 100.0
FACTOR_WEIGHT = 0.3
MIN_STEPS = 5
CHANGE = 0.1


class SpeedFactor:
    """How much slower (above 1) than the fallback constants the workers of one kind are, by their own reports: the
    median worker, so that a slow one among them is told from a slow kind (core.instance_speed).

    Only intervals at whose both ends a worker had requests count: then it computed all the time, and what it computed
    should have taken the interval's length. A short idle time in between makes it look a little slower than it is.
    `step_time` is a new object only after the factor has moved by CHANGE.
    """

    def __init__(self, base: StepTime) -> None:
        self.step_time = base
        self._base = base
        self._factors: dict[InstanceId, float] = {}
        self._applied = 1.0
        self._last: dict[InstanceId, tuple[float, EngineLoad]] = {}

    def report(self, instance_id: InstanceId, load: EngineLoad, now_ms: float) -> bool:
        """Whether `step_time` changed."""
        last = self._last.get(instance_id)
        self._last[instance_id] = (now_ms, load)
        if last is None or not last[1].num_running or not load.num_running:
            return False
        factor = self._factor_of(load, last[1], now_ms - last[0])
        if factor is None:
            return False
        known = self._factors.get(instance_id, factor)
        self._factors[instance_id] = known + FACTOR_WEIGHT * (factor - known)
        usual = median(self._factors.values())
        if abs(usual / self._applied - 1) < CHANGE:
            return False
        self._applied = usual
        self.step_time = self._base.scaled(usual)
        return True

    def _factor_of(self, after: EngineLoad, before: EngineLoad, interval_ms: float) -> float | None:
        steps = after.steps_total - before.steps_total
        computed = after.prompt_tokens_computed_total - before.prompt_tokens_computed_total
        generated = after.generation_tokens_total - before.generation_tokens_total
        if steps < MIN_STEPS or computed < 0 or generated < 0:
            return None
        base = self._base
        predicted_ms = steps * base.d0 + computed * base.b + generated * base.d1
        return min(MAX_FACTOR, max(MIN_FACTOR, interval_ms / predicted_ms))

    def forget(self, instance_id: InstanceId) -> None:
        self._last.pop(instance_id, None)
        self._factors.pop(instance_id, None)
