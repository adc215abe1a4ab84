"""Whether workers hold what the router believes: predicted overlap against the engine's own count. Pure.

A worker whose cache is persistently smaller than predicted (events lost, blocks evicted before they are used, another
block size or salt) draws requests that gain nothing there. Its overlap then counts by the share that was found, until
the predictions fit again, and its name is given for a warning at most once in WARN_EVERY_MS.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from stator.ids import InstanceId

WINDOW = 200
MIN_SAMPLES = 20
MIN_OVER = 5
TOLERATED_SHARE = 0.05
WARN_EVERY_MS = 60_000.0


class Outcome(StrEnum):
    EXACT = "exact"
    OVER = "over"
    UNDER = "under"


def outcome_of(difference: int) -> Outcome:
    """difference: as of `core.cost.overlap_difference`."""
    return Outcome.EXACT if not difference else Outcome.UNDER if difference > 0 else Outcome.OVER


@dataclass(slots=True)
class _Window:
    """The last predictions of a worker: (predicted blocks, blocks of them that were there)."""

    samples: deque[tuple[int, int]] = field(default_factory=lambda: deque[tuple[int, int]](maxlen=WINDOW))
    num_over: int = 0
    num_predicted: int = 0
    num_found: int = 0
    warned_at: float | None = None

    def add(self, predicted: int, found: int) -> None:
        if len(self.samples) == WINDOW:
            self._count(*self.samples.popleft(), -1)
        self.samples.append((predicted, found))
        self._count(predicted, found, 1)

    def _count(self, predicted: int, found: int, sign: int) -> None:
        self.num_over += sign * (found < predicted)
        self.num_predicted += sign * predicted
        self.num_found += sign * found

    @property
    def over_share(self) -> float:
        if len(self.samples) < MIN_SAMPLES or self.num_over < MIN_OVER:
            return 0.0
        return self.num_over / len(self.samples)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """For the warning: of `of` predictions for the worker num_over were too high; trust is what its overlap counts."""

    instance_id: InstanceId
    num_over: int
    of: int
    trust: float


class OverlapCheck:
    def __init__(self) -> None:
        self._windows: dict[InstanceId, _Window] = {}
        self._trust: dict[InstanceId, float] = {}

    def observe(self, instance_id: InstanceId, predicted: int, difference: int, now: float) -> Mismatch | None:
        """A compared prediction that rested on the worker's events. Returns what to warn of, if it is time to."""
        window = self._windows.get(instance_id)
        if window is None:
            window = self._windows[instance_id] = _Window()
        window.add(predicted, predicted + min(0, difference))
        self._set_trust(instance_id, window)
        due = window.warned_at is None or now - window.warned_at >= WARN_EVERY_MS
        if window.over_share <= TOLERATED_SHARE or not due:
            return None
        window.warned_at = now
        return Mismatch(instance_id, window.num_over, len(window.samples), self.trust(instance_id))

    def trust(self, instance_id: InstanceId) -> float:
        """0 to 1: 1 unless too many of the last predictions were too high, then the share of blocks that was found."""
        return self._trust.get(instance_id, 1.0)

    def drop(self, instance_id: InstanceId) -> None:
        self._windows.pop(instance_id, None)
        self._trust.pop(instance_id, None)

    def _set_trust(self, instance_id: InstanceId, window: _Window) -> None:
        if window.over_share > TOLERATED_SHARE and window.num_predicted:
            self._trust[instance_id] = window.num_found / window.num_predicted
        else:
            self._trust.pop(instance_id, None)
