"""Which step-time constants hold for a worker: those shipped for its engine, model and device, or a scaled fallback."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from stator.core.cost import StepTime, StepTimeRow, find_row
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo, EngineLoad

MIN_FACTOR, MAX_FACTOR = 0.01, 100.0
FACTOR_WEIGHT = 0.3
MIN_STEPS = 5
CHANGE = 0.1


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The shipped table."""

    rows: tuple[StepTimeRow, ...]
    fallback: StepTime

    def of(self, info: EngineInfo | None) -> StepTime | None:
        """None when no row matches."""
        if info is None:
            return None
        row = find_row(self.rows, engine=info.engine, model=info.model_id or info.model, device=info.device)
        return None if row is None else row.step_time


@cache
def shipped_step_times() -> StepTimes:
    table = tomllib.loads((files("stator.router") / "step_time.toml").read_text(encoding="utf-8"))
    rows: Sequence[Mapping[str, Any]] = table["row"]
    return StepTimes(
        tuple(StepTimeRow(r["engine"], r["model"], r["device"], _step_time(r), r["source"]) for r in rows),
        _step_time(table["fallback"]),
    )


def _step_time(row: Mapping[str, Any]) -> StepTime:
    return StepTime(*(float(row[name]) for name in ("a", "b", "c", "d0", "d1", "d2")))


class SpeedFactor:
    """How much slower (above 1) than the fallback constants the workers of one kind are, by their own reports.

    Only intervals at whose both ends a worker had requests count: then it computed all the time, and what it computed
    should have taken the interval's length. A short idle time in between makes it look a little slower than it is.
    `step_time` is a new object only after the factor has moved by CHANGE.
    """

    def __init__(self, base: StepTime) -> None:
        self.step_time = base
        self._base = base
        self._factor: float | None = None
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
        self._factor = factor if self._factor is None else self._factor + FACTOR_WEIGHT * (factor - self._factor)
        if abs(self._factor / self._applied - 1) < CHANGE:
            return False
        self._applied = self._factor
        self.step_time = self._base.scaled(self._factor)
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
