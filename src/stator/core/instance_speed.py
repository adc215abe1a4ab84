"""How fast each instance is beside the others, learned from when its first tokens came. Pure; times are in ms.

Step-time constants hold for a kind of engine, model and device. One instance of it may still be slower: a GPU that
throttles, a noisy neighbour, a bad link. Its first tokens then come later than predicted, by the same factor again and
again; so for each instance the logarithm of observed over predicted is averaged. What all have in common is the
constants' fault or the load's and makes no difference between them: an instance's *slowness* is its average's distance
from the median of all. Nothing below DEAD_ZONE counts, since loads differ, and nothing above MAX_SLOWNESS: what is
slower than that is left to the queue that it builds up.

A slow instance gets few requests, so there is little to learn from: what was observed counts half after HALF_MS, down
to nothing. An instance that is fast again so gets a request to prove it, and that one counts the more, the older the
rest is.
"""

import math
from dataclasses import dataclass
from statistics import median

from stator.ids import InstanceId

WEIGHT = 0.2
HALF_MS = 15_000.0
DEAD_ZONE = 1.5
MAX_SLOWNESS = 16.0
MIN_OBSERVED = 4

OVERHEAD_MS = 25.0
"""Added to both times: a first token is reported up to 10 ms late, and waits for the step that runs."""

MAX_RATIO = 64.0
"""One observation counts as no more than that: one of a minute, after a stall, is no hundred of a second."""

MEDIAN_EVERY_MS = 500.0


@dataclass(slots=True)
class _Speed:
    """log_ratio: average of the logarithms. at: of the last observation."""

    log_ratio: float
    at: float
    model: str
    num_observed: int = 1


class InstanceSpeeds:
    """Of the instances of one router. They are compared with those of the same model."""

    def __init__(self) -> None:
        self._speeds: dict[InstanceId, _Speed] = {}
        self._medians: dict[str, tuple[float, float]] = {}

    def observe(self, instance_id: InstanceId, model: str, predicted_ms: float, observed_ms: float, now: float) -> None:
        """predicted_ms: for an instance of usual speed, with what was ahead."""
        ratio = (observed_ms + OVERHEAD_MS) / (predicted_ms + OVERHEAD_MS)
        log_ratio = math.log(min(MAX_RATIO, max(1 / MAX_RATIO, ratio)))
        speed = self._speeds.get(instance_id)
        if speed is None:
            self._speeds[instance_id] = _Speed(log_ratio, now, model)
            return
        weight = max(1 - (1 - WEIGHT) * self._kept(speed, now), 1 / (speed.num_observed + 1))
        speed.log_ratio += weight * (log_ratio - speed.log_ratio)
        speed.num_observed += 1
        speed.at = now

    def slowness(self, instance_id: InstanceId, now: float) -> float:
        """1.0 for an instance like the others, 2.0 for one that takes twice as long; at least 1 / MAX_SLOWNESS."""
        speed = self._speeds.get(instance_id)
        if speed is None or speed.num_observed < MIN_OBSERVED:
            return 1.0
        distance = (speed.log_ratio - self._usual(speed.model, now)) * self._kept(speed, now)
        if abs(distance) < math.log(DEAD_ZONE):
            return 1.0
        return min(MAX_SLOWNESS, max(1 / MAX_SLOWNESS, math.exp(distance)))

    def drop(self, instance_id: InstanceId) -> None:
        self._speeds.pop(instance_id, None)

    def _usual(self, model: str, now: float) -> float:
        at, usual = self._medians.get(model, (-math.inf, 0.0))
        if now - at >= MEDIAN_EVERY_MS:
            known = [s.log_ratio for s in self._speeds.values() if s.model == model and s.num_observed >= MIN_OBSERVED]
            usual = median(known) if known else 0.0
            self._medians[model] = (now, usual)
        return usual

    @staticmethod
    def _kept(speed: _Speed, now: float) -> float:
        """How much of what was observed still counts, 1.0 down to 0.0."""
        return 0.5 ** (max(0.0, now - speed.at) / HALF_MS)
