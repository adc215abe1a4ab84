"""A worker's or a router's figures: pushed to subscribers once a second, logged in one line every five."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from stator.messages.engine import EngineLoad
from stator.messages.reports import ReportRequest, RouterStats, WorkerReport
from stator.observability.logs import format_router_stats, format_worker_stats
from stator.runtime.context import loop_time
from stator.transport.base import Call

logger = logging.getLogger(__name__)

LOG_EVERY_S = 5.0
MIN_INTERVAL_S = 0.1


def with_stalls(report: WorkerReport, stalls: int) -> WorkerReport:
    """stalls: of the worker's process and its predecessors (ServiceContext.stalls)."""
    return msgspec.structs.replace(report, stalls_total=stalls) if stalls else report


class Reporter:
    """Serves the `report` endpoint and owns the log line; both run on loop timers, between `start` and `close`."""

    def __init__(self, read: Callable[[], WorkerReport], *, min_interval_s: float = MIN_INTERVAL_S) -> None:
        self._read = read
        self._min_interval_s = min_interval_s
        self._subscribers: dict[Call, asyncio.TimerHandle] = {}
        self._log_timer: asyncio.TimerHandle | None = None
        self._last: tuple[float, EngineLoad] | None = None
        self._last_router = RouterStats()

    def start(self) -> None:
        self._last = (loop_time(), self._read().load)
        self._log_timer = asyncio.get_running_loop().call_later(LOG_EVERY_S, self._log)

    def report(self, call: Call) -> None:
        request: ReportRequest = call.request
        interval_s = max(self._min_interval_s, request.interval_s)
        call.on_cancel(lambda: self._unsubscribe(call))
        if not call.cancelled:
            self._push(call, interval_s)

    def _push(self, call: Call, interval_s: float) -> None:
        call.items([self._read()])
        loop = asyncio.get_running_loop()
        self._subscribers[call] = loop.call_later(interval_s, self._push, call, interval_s)

    def _unsubscribe(self, call: Call) -> None:
        timer = self._subscribers.pop(call, None)
        if timer is not None:
            timer.cancel()

    def _log(self) -> None:
        now, report = loop_time(), self._read()
        load, router = report.load, report.router
        assert self._last is not None
        then, before = self._last
        self._last = (now, load)
        # An idle worker says so once, not every five seconds for ever.
        if load != before or load.num_running or load.num_waiting:
            logger.info(format_worker_stats(before, load, now - then))
        if router is not None:
            # A router says something only when somebody waits or was turned away.
            if router.num_waiting or router.refusals != self._last_router.refusals:
                logger.info(format_router_stats(self._last_router, router, now - then))
            self._last_router = router
        self._log_timer = asyncio.get_running_loop().call_later(LOG_EVERY_S, self._log)

    def close(self) -> None:
        if self._log_timer is not None:
            self._log_timer.cancel()
        for call in list(self._subscribers):
            self._unsubscribe(call)
            call.end()
