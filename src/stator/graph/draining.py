"""The drain of a process, as those who asked for it see it.

Nobody has asked; then a first request begins it, and everybody who asks gets progress until its end. A request that
could not be carried out (no successor came up) is answered with an error, and nobody has asked again.
"""

import asyncio
from collections.abc import Callable

from stator.errors import ErrorCode, StatorError
from stator.messages.instances import (
    DRAIN_ENDPOINT,
    STATUS_ENDPOINT,
    DrainPhase,
    DrainProgress,
    DrainRequest,
    InstanceStatus,
    SettingState,
    StatusRequest,
)
from stator.runtime.context import loop_time
from stator.transport.base import Call, Endpoint

PROGRESS_EVERY_S = 0.5
MAX_WATCHERS = 64


class DrainDesk:
    """Serves DRAIN_ENDPOINT and STATUS_ENDPOINT for all instances of one process.

    num_open: what the process still has to finish. begin: called with the first request. stalls, settings: see
    InstanceStatus.
    """

    def __init__(
        self,
        *,
        num_open: Callable[[], int],
        begin: Callable[[DrainRequest], None],
        stalls: int = 0,
        settings: Callable[[], tuple[SettingState, ...]] = lambda: (),
    ) -> None:
        self.request: DrainRequest | None = None
        self._num_open = num_open
        self._begin = begin
        self._stalls = stalls
        self._settings = settings
        self._made_at = loop_time()
        self._asked_at = 0.0
        self._phase = DrainPhase.DRAINING
        self._watchers: dict[Call, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(DRAIN_ENDPOINT, DrainRequest, self.drain),
            Endpoint(STATUS_ENDPOINT, StatusRequest, self.status),
        ]

    def drain(self, call: Call) -> None:
        """Push endpoint; see DrainRequest. A caller that leaves does not stop the drain."""
        request: DrainRequest = call.request
        if not request.timeout_s >= 0:
            message = f"timeout_s is {request.timeout_s}; it must be a number of seconds, 0 or more"
            call.end(StatorError(ErrorCode.INVALID_REQUEST, message, param="timeout_s"))
            return
        if len(self._watchers) >= MAX_WATCHERS:
            call.end(StatorError(ErrorCode.OVERLOADED, f"{MAX_WATCHERS} callers watch this drain already"))
            return
        if self.request is not None and self._phase.is_last:
            call.items([self._progress()])
            call.end()
            return
        self._watchers[call] = None
        call.on_cancel(lambda: self._watchers.pop(call, None))
        if self.request is None:
            self.request = request
            self._asked_at = loop_time()
            self._begin(request)
            self._tick()
        elif not call.cancelled:
            call.items([self._progress()])

    def status(self, call: Call) -> None:
        drain = self._progress() if self.request is not None else None
        uptime_s = loop_time() - self._made_at
        call.items([InstanceStatus(uptime_s, self._num_open(), self._stalls, drain, self._settings())])
        call.end()

    def show(self, phase: DrainPhase) -> None:
        """A new phase has begun; with one that is the last, everybody is told and the calls end."""
        self._phase = phase
        self._push()
        if phase.is_last:
            self._end(None)

    def refuse(self, error: StatorError) -> None:
        """The drain did not begin after all."""
        self.request = None
        self._end(error)

    def close(self) -> None:
        """For a process that ends in another way than by its drain."""
        self._end(
            StatorError(ErrorCode.INSTANCE_LOST, "the process ended before it was drained; its log has the reason")
        )

    def _progress(self) -> DrainProgress:
        restart = self.request is not None and self.request.restart
        return DrainProgress(self._phase, self._num_open(), loop_time() - self._asked_at, restart)

    def _push(self) -> None:
        if self._watchers:
            progress = self._progress()
            for call in list(self._watchers):
                call.items([progress])

    def _tick(self) -> None:
        self._push()
        self._timer = asyncio.get_running_loop().call_later(PROGRESS_EVERY_S, self._tick)

    def _end(self, error: StatorError | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        watchers, self._watchers = self._watchers, {}
        for call in watchers:
            call.end(error)
