"""Time in which a process ran. Pure: whoever owns it says what time it is, again and again.

A process that stands still (SIGSTOP, a frozen group of processes, a machine out of memory) hears from nobody, so that
what others owed it by then is not late. Of the time between two readings at most `max_gap_s` counts: they must come
more often than that while the process runs.
"""

MAX_GAP_S = 1.0


class RunningTime:
    """began: the first reading. Times before and after are of the caller's clock, in seconds."""

    def __init__(self, began: float, max_gap_s: float = MAX_GAP_S) -> None:
        self._last = began
        self._max_gap_s = max_gap_s
        self._stood_still_s = 0.0

    @property
    def stood_still_s(self) -> float:
        """In all, until the last reading."""
        return self._stood_still_s

    def read(self, now: float) -> float:
        """The running time at now. It begins as the caller's clock, falls behind it, and never goes back."""
        now = max(now, self._last)
        self._stood_still_s += max(0.0, now - self._last - self._max_gap_s)
        self._last = now
        return now - self._stood_still_s
