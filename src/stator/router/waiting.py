"""The `route` calls that wait for room: `core.admission` on the loop, with what clients are told."""

import asyncio
import math
from collections.abc import Callable
from random import Random

from stator.core.admission import Line, Need, QueueLimits, Reason, Refusal, Wait, Waiter, WaitingLines
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.processor import RouteRequest
from stator.transport.base import Call

LOOK_EVERY_S = 0.25
"""While somebody waits: predictions change with time alone, and predicted prefill work passes."""

Place = Callable[[Call, RouteRequest, float, Line], Wait | None]
"""Answer the call, or say what it waits for. With the seconds it waited, and those before it in line."""


class WaitingCalls:
    """Owns the calls from `join` until they are placed, refused or cancelled.

    num_instances: of a model, now. refused: told of every refusal's reason.
    """

    def __init__(
        self,
        limits: QueueLimits,
        rng: Random,
        *,
        place: Place,
        num_instances: Callable[[str], int],
        no_instance: Callable[[str], StatorError],
        refused: Callable[[str], None],
    ) -> None:
        self._lines = WaitingLines(limits, rng)
        self._place = place
        self._num_instances = num_instances
        self._no_instance = no_instance
        self._refused = refused
        self._calls: dict[int, tuple[Call, Waiter]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None

    @property
    def num_waiting(self) -> int:
        return self._lines.num_waiting

    @property
    def num_waiting_tokens(self) -> int:
        return self._lines.num_tokens

    def waits(self, model: str) -> bool:
        return self._lines.waits(model)

    def join(self, call: Call, request: RouteRequest, need: Need) -> None:
        """Wait in line, or end the call with OVERLOADED."""
        seconds = call.context.deadline
        deadline = math.inf if seconds is None else seconds * 1e3
        num_instances = self._num_instances(request.model)
        joined = self._lines.join(request, need, self._now(), deadline=deadline, num_instances=num_instances)
        if isinstance(joined, Refusal):
            self._refuse(call, request.model, joined, num_instances)
            return
        self._calls[joined.number] = (call, joined)
        call.on_cancel(lambda: self._cancelled(joined))
        self.look_soon()
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_EVERY_S, self._look_again)

    def look_soon(self) -> None:
        """Room may have appeared: offer it, once for all that happens in this turn of the loop."""
        if self._calls and self._soon is None:
            self._soon = self._loop.call_soon(self._look)

    def forget_instance(self, instance_id: InstanceId) -> None:
        self._lines.forget_instance(instance_id)

    def close(self) -> None:
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        self._timer = self._soon = None
        for call, waiter in list(self._calls.values()):
            self._leave(waiter)
            call.end(StatorError(ErrorCode.DRAINING, "the router is stopping; send the request again"))

    def _now(self) -> float:
        return self._loop.time() * 1e3

    def _cancelled(self, waiter: Waiter) -> None:
        if waiter.number in self._calls:
            self._leave(waiter)
            self.look_soon()

    def _leave(self, waiter: Waiter) -> None:
        self._lines.leave(waiter)
        self._calls.pop(waiter.number, None)

    def _look_again(self) -> None:
        self._timer = None
        self._look()
        if self._calls:
            self._timer = self._loop.call_later(LOOK_EVERY_S, self._look_again)

    def _look(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        for model in self._lines.models():
            num_instances = self._num_instances(model)
            if not num_instances:
                self._lose(model)
                continue
            self._lines.serve(model, self._place_waiter, self._now(), num_instances)
            for waiter, refusal in self._lines.give_up(model, self._now(), num_instances):
                call, _ = self._calls.pop(waiter.number)
                self._refuse(call, model, refusal, num_instances)

    def _place_waiter(self, waiter: Waiter, line: Line) -> Wait | None:
        call, _ = self._calls[waiter.number]
        waited_s = (self._now() - waiter.joined_at) / 1e3
        wait = self._place(call, waiter.request, waited_s, line)
        if wait is None:
            del self._calls[waiter.number]
        return wait

    def _lose(self, model: str) -> None:
        for call, waiter in list(self._calls.values()):
            if waiter.request.model == model:
                self._leave(waiter)
                call.end(self._no_instance(model))

    def _refuse(self, call: Call, model: str, refusal: Refusal, num_instances: int) -> None:
        self._refused(refusal.reason.value)
        call.end(
            StatorError(
                ErrorCode.OVERLOADED,
                self._why(model, refusal, num_instances),
                retry_after_s=refusal.retry_after_s,
            )
        )

    def _why(self, model: str, refusal: Refusal, num_instances: int) -> str:
        workers = f"the {num_instances} workers" if num_instances > 1 else "the only worker"
        full = f"{workers} of {model} have no room" if num_instances > 1 else f"{workers} of {model} has no room"
        again = f"try again in about {math.ceil(refusal.retry_after_s)} s"
        wait_s = refusal.wait_ms / 1e3
        match refusal.reason:
            case Reason.FULL:
                return f"{full} and {self.num_waiting} requests wait already, as many as may; {again}"
            case Reason.WAIT:
                allowed_s = self._lines.limits.max_wait_ms / 1e3
                return f"{full}, and no request waits longer than {allowed_s:g} s; {again}"
            case Reason.DEADLINE:
                return f"{full}; a wait of about {wait_s:.1f} s leaves too little of this request's time; {again}"
