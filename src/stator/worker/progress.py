"""Watches whether the engine makes steps (rules in core/progress.py), on a timer of the loop."""

import asyncio
import logging
from collections.abc import Callable

from stator.core.progress import ProgressWatch, patience_for
from stator.messages.engine import EngineInfo, EngineLoad
from stator.runtime.context import loop_time

logger = logging.getLogger(__name__)

MIN_PERIOD_S = 0.05
MAX_PERIOD_S = 0.5


class ProgressWatchdog:
    """From `start` to `close`. on_stall: called at most once, with what hangs, in words.

    read: the engine's load. timeout_s: `progress-timeout`; None for the default, 0 for no watch.
    """

    def __init__(
        self,
        read: Callable[[], EngineLoad],
        info: EngineInfo,
        *,
        timeout_s: float | None,
        on_stall: Callable[[str], None],
    ) -> None:
        self._read = read
        self._patience = patience_for(info, timeout_s)
        self._steps_while_waiting = info.steps_while_waiting
        self._on_stall = on_stall
        self._watch: ProgressWatch | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._patience is None:
            return
        self._period_s = min(MAX_PERIOD_S, max(MIN_PERIOD_S, self._patience.timeout_s / 10))
        self._watch = ProgressWatch(
            self._patience, self._read(), loop_time(), steps_while_waiting=self._steps_while_waiting
        )
        self._look_later()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._look)

    def _look(self) -> None:
        self._timer = None
        assert self._watch is not None
        stall = self._watch.observe(self._read(), loop_time())
        if stall is None:
            self._look_later()
            return
        logger.error("%s", stall)
        self._on_stall(str(stall))
