"""Which step-time constants hold for a worker: those shipped for its engine, model and device, or a scaled fallback."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from stator.core.cost import StepTime, StepTimeRow, find_row
from stator.messages.engine import EngineInfo, EngineLoad

MIN_FACTOR, MAX_FACTOR = 0.01, 100.0
FACTOR_WEIGHT = 0.3
MIN_STEPS = 5


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
    """How much slower (above 1) than the fallback constants a worker is, by its own reports.

    Only intervals at whose both ends it had requests count: then it computed all the time, and what it computed should
    have taken the interval's length. A short idle time in between makes it look a little slower than it is.
    """

    def __init__(self, base: StepTime) -> None:
        self.factor = 1.0
        self._base = base
        self._last: tuple[float, EngineLoad] | None = None
        self._known = False

    @property
    def step_time(self) -> StepTime:
        return self._base.scaled(self.factor)

    def report(self, load: EngineLoad, now_ms: float) -> bool:
        """Whether the factor changed."""
        last, self._last = self._last, (now_ms, load)
        if last is None or not last[1].num_running or not load.num_running:
            return False
        then, before = last
        steps = load.steps_total - before.steps_total
        computed = load.prompt_tokens_computed_total - before.prompt_tokens_computed_total
        generated = load.generation_tokens_total - before.generation_tokens_total
        if steps < MIN_STEPS or computed < 0 or generated < 0:
            return False
        base = self._base
        predicted_ms = steps * base.d0 + computed * base.b + generated * base.d1
        factor = min(MAX_FACTOR, max(MIN_FACTOR, (now_ms - then) / predicted_ms))
        self.factor = self.factor + FACTOR_WEIGHT * (factor - self.factor) if self._known else factor
        self._known = True
        return True
