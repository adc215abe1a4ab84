"""Notices that this process stood still (SIGSTOP, a frozen machine, a blocked loop) for as long as a lease lasts.

Others take it for dead by then, and went on without it. What it has ready to send is old, and must not be sent.
"""

import asyncio
from collections.abc import Callable

from stator.runtime.context import loop_time

TICK_S = 1.0


class PauseWatch:
    """From `start` to `close`. on_pause: called at most once, with the seconds. clock: of the loop, or one like it that
    does not stand still within an iteration of the loop."""

    def __init__(
        self, limit_s: float, on_pause: Callable[[float], None], clock: Callable[[], float] = loop_time
    ) -> None:
        self._limit_s = limit_s
        self._on_pause = on_pause
        self._clock = clock
        self._last: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._last = self._clock()
        self._tick()

    def look(self) -> None:
        """Called by the timer, and at once by whoever learns that the process goes on again (SIGCONT): the timer may
        come after what has become ready meanwhile."""
        if self._last is None:
            return
        now = self._clock()
        stood_still_s, self._last = now - self._last, now
        if stood_still_s >= self._limit_s:
            self.close()
            self._on_pause(stood_still_s)

    def close(self) -> None:
        self._last = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self.look()
        if self._last is not None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)
