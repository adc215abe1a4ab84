"""Clocks of what is kept for others until they are late: leases, and jobs in their hands."""

import asyncio
import logging
import math
from typing import Protocol

from stator.core.running_time import MAX_GAP_S, RunningTime
from stator.runtime.context import loop_time

logger = logging.getLogger(__name__)

READ_EVERY_S = MAX_GAP_S / 4


class Clock(Protocol):
    def now(self) -> float:
        """Seconds; never goes back."""
        ...

    def on_loop(self, time: float) -> float:
        """When the loop's clock shows that time of this one, if nothing comes between."""
        ...


class LoopClock:
    """Implements Clock: the running loop's own."""

    def now(self) -> float:
        return loop_time()

    def on_loop(self, time: float) -> float:
        return time


class RunningClock:
    """Implements Clock: the loop's, without the time in which this process stood still. From its making, on a running
    loop, until `close`. name: whose, for messages to people."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._time = RunningTime(self._loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._tick()

    def now(self) -> float:
        before_s = self._time.stood_still_s
        now = self._time.read(self._loop.time())
        if (stood_still_s := self._time.stood_still_s - before_s) > MAX_GAP_S:
            logger.warning("%s stood still for %.1f s, which nobody else is late for", self._name, stood_still_s)
        return now

    def on_loop(self, time: float) -> float:
        stood_still_s = self._time.stood_still_s
        # Not an unmeasurable moment too soon: on a loop whose time stands still between timers it would never be then.
        return math.nextafter(time + stood_still_s, math.inf) if stood_still_s else time

    def close(self) -> None:
        """No more readings by itself. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self.now()
        self._timer = self._loop.call_later(READ_EVERY_S, self._tick)
