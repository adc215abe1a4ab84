"""When a process that ended is started again. Pure: the caller has the clock.

States: up to `max_quick_failures` ends in a row that are quick (before the process was ready, or soon after) are
answered by a start after a doubling delay; one more and the policy gives up. A process that ran well for a while
starts again with the shortest delay, and so does one that fenced itself, or whose engine stalled: it did what it
should, and a stall takes its time. One that was drained in order to be started again starts at once.
"""

from dataclasses import dataclass

from stator.graph.protocol import ExitCode


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """quick_s: an end within so many seconds of being ready counts as quick."""

    first_delay_s: float = 0.5
    max_delay_s: float = 10.0
    quick_s: float = 10.0
    max_quick_failures: int = 5


class RestartPolicy:
    def __init__(self, limits: RestartLimits) -> None:
        self._limits = limits
        self.num_quick_failures = 0

    def ended(self, exit_code: int, ready_for_s: float | None) -> float | None:
        """Seconds until the next start; None if there is none.

        exit_code: negative for a signal. ready_for_s: how long the process was ready, None if it never was.
        """
        limits = self._limits
        if exit_code in (ExitCode.CONFIG, ExitCode.DRAINED):
            return None
        if exit_code == ExitCode.RESTART:
            return 0.0
        if exit_code in (ExitCode.FENCED, ExitCode.STALLED):
            return limits.first_delay_s
        if ready_for_s is not None and ready_for_s >= limits.quick_s:
            self.num_quick_failures = 0
            return limits.first_delay_s
        self.num_quick_failures += 1
        if self.num_quick_failures >= limits.max_quick_failures:
            return None
        return min(limits.max_delay_s, limits.first_delay_s * 2 ** (self.num_quick_failures - 1))
