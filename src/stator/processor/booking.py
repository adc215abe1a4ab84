"""Routers as a Processor's requests see them: one to ask, the wait for one, and bookings that outlive their router.

A router that ended a call, or could not be reached, is *in doubt* for a moment, growing while it stays so: another one
is asked if there is any. When all are in doubt, or none is there, requests wait: until a router appears in discovery,
or one in doubt is due for another try. The wait is bounded; past it the client is told to come back.

A request that runs needs no router. When its booking is lost with one, it goes on, and is booked again at the next:
that router counts its load and releases it with the request, as if it had chosen the instance itself. Thousands do so
at a bounded rate, beside which new requests are routed.
"""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Protocol

from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.instances import InstanceState
from stator.runtime.context import loop_time
from stator.runtime.directory import DirectoryChange, InstanceDirectory
from stator.transport.base import Target

RouterTarget = Target | Callable[[], Target]
"""The Router's `route` endpoint, or a function that finds it and raises StatorError if there is none."""

DEFAULT_ROUTER_WAIT_S = 30.0
"""A router starts in seconds; its supervisor waits longer after each crash."""

MAX_WAITING = 4_096
RETRY_AFTER_S = 2.0
FIRST_DOUBT_S = 0.1
MAX_DOUBT_S = 2.0
MAX_FINDS = 16

REBOOK_EVERY_S = 0.05
REBOOK_AT_ONCE = 50
MAX_REBOOKINGS = 8
"""Of one booking in a row, without a router that kept it: one that refuses has a reason that does not pass."""

_LOST = frozenset({ErrorCode.INSTANCE_LOST, ErrorCode.STALE_INSTANCE, ErrorCode.DRAINING})
"""Ends of a `route` call that tell of the router, not of the request."""


class Booked(Protocol):
    """A running request's booking."""

    @property
    def closed(self) -> bool: ...

    def book_again(self, router: Target) -> None: ...


class RouterWait:
    """One request's wait for a router; `cancel` ends it without a word."""

    __slots__ = ("_bookings", "give_up", "on_router", "until")

    def __init__(
        self, bookings: "Bookings", until: float, on_router: Callable[[], None], give_up: Callable[[StatorError], None]
    ) -> None:
        self._bookings = bookings
        self.until = until
        self.on_router = on_router
        self.give_up = give_up

    def cancel(self) -> None:
        self._bookings.leave(self)


class _Doubt:
    __slots__ = ("delay_s", "until")

    def __init__(self) -> None:
        self.delay_s = FIRST_DOUBT_S
        self.until = 0.0


class Bookings:
    """One per Processor. directory: tells of routers that come; without one, only time does.

    begun: a router has placed a request of this Processor before, so that a new router need not wait for others.
    """

    def __init__(
        self,
        router: RouterTarget,
        rng: Random,
        directory: InstanceDirectory | None = None,
        *,
        wait_s: float = DEFAULT_ROUTER_WAIT_S,
    ) -> None:
        self.begun = False
        self._router = router
        self._rng = rng
        self._wait_s = wait_s
        self._doubts: dict[InstanceId | None, _Doubt] = {}
        self._waiting: dict[RouterWait, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._unbooked: dict[Booked, None] = {}
        self._rebooking: asyncio.TimerHandle | None = None
        self._unsubscribe = None if directory is None else directory.subscribe(self._changed)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_unbooked(self) -> int:
        """Running requests that no router counts."""
        return len(self._unbooked)

    def close(self) -> None:
        """What waits is the caller's to end."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        for timer in (self._timer, self._rebooking):
            if timer is not None:
                timer.cancel()
        self._timer = self._rebooking = None
        self._waiting.clear()
        self._unbooked.clear()

    # Routers

    def find(self) -> Target:
        """A router that is not in doubt. Raises StatorError(NO_INSTANCE)."""
        if not self._doubts:
            return self._find()
        now = loop_time()
        seen: set[InstanceId | None] = set()
        # Each is found in its turn; once one comes again, all were seen.
        for _ in range(MAX_FINDS):
            target = self._find()
            doubt = self._doubts.get(target.instance_id)
            if doubt is None or doubt.until <= now:
                return target
            if target.instance_id in seen:
                break
            seen.add(target.instance_id)
        raise StatorError(ErrorCode.NO_INSTANCE, "the router was lost; another is awaited", retry_after_s=RETRY_AFTER_S)

    @staticmethod
    def is_lost(error: StatorError) -> bool:
        """Whether a `route` call that ended so says that its router is gone, and nothing about the request."""
        return error.code in _LOST

    def lost(self, router: Target) -> None:
        """It ended a call, or could not be reached."""
        now = loop_time()
        doubt = self._doubts.get(router.instance_id)
        if doubt is None:
            doubt = self._doubts[router.instance_id] = _Doubt()
        elif doubt.until > now:
            return  # Many calls end with one connection.
        else:
            doubt.delay_s = min(doubt.delay_s * 2, MAX_DOUBT_S)
        doubt.until = now + doubt.delay_s * self._rng.uniform(0.5, 1.0)

    def answered(self, router: Target) -> None:
        self.begun = True
        if self._doubts:
            self._doubts.pop(router.instance_id, None)

    def _find(self) -> Target:
        return self._router if isinstance(self._router, Target) else self._router()

    # The wait for a router

    def wait(
        self, since: float, on_router: Callable[[], None], give_up: Callable[[StatorError], None]
    ) -> RouterWait | StatorError:
        """Calls on_router when it is worth asking again, or give_up when that has taken too long; or neither, after a
        cancel. since: when the request's wait began, perhaps before this. An error: it may not wait (any more)."""
        until = since + self._wait_s
        if until <= loop_time() or len(self._waiting) >= MAX_WAITING:
            return self._nobody()
        waiting = RouterWait(self, until, on_router, give_up)
        self._waiting[waiting] = None
        self._set_timer()
        return waiting

    def leave(self, waiting: RouterWait) -> None:
        self._waiting.pop(waiting, None)

    def _nobody(self) -> StatorError:
        message = "no router is there to place the request; one may be starting. Try again"
        return StatorError(ErrorCode.NO_INSTANCE, message, retry_after_s=RETRY_AFTER_S)

    def _changed(self, change: DirectoryChange) -> None:
        for info in change.removed:
            self._doubts.pop(info.instance_id, None)
        if any(info.state is InstanceState.READY for info in (*change.added, *change.changed)):
            self._wake()

    def _set_timer(self) -> None:
        """For the end of the first wait, and of the first doubt. Without a doubt there is no router: then it is for
        discovery to wake those that wait, or for time where there is none."""
        now = loop_time()
        ends = [doubt.until for doubt in self._doubts.values() if doubt.until > now]
        if not ends and self._unsubscribe is None:
            ends = [now + MAX_DOUBT_S]
        if self._waiting:
            ends.append(next(iter(self._waiting)).until)
        if not ends or not (self._waiting or self._unbooked):
            return
        if self._timer is not None:
            if self._timer.when() <= min(ends):
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(min(ends), self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = loop_time()
        for waiting in [w for w in self._waiting if w.until <= now]:
            if self._waiting.pop(waiting, self) is None:
                waiting.give_up(self._nobody())
        self._wake()

    def _wake(self) -> None:
        """Let all that wait ask, if there is anybody to ask; one that is disappointed waits again."""
        if not (self._waiting or self._unbooked):
            return
        try:
            self.find()
        except StatorError:
            self._set_timer()
            return
        for waiting in list(self._waiting):
            if self._waiting.pop(waiting, self) is None:
                waiting.on_router()
        if self._unbooked:
            self._rebook_soon()

    # Bookings that were lost

    def rebook(self, booked: Booked) -> None:
        """Its router is gone; book it again when there is one."""
        self._unbooked[booked] = None
        self._rebook_soon()

    def _rebook_soon(self) -> None:
        if self._rebooking is None:
            delay_s = REBOOK_EVERY_S * self._rng.uniform(0.5, 1.5)
            self._rebooking = asyncio.get_running_loop().call_later(delay_s, self._rebook)

    def _rebook(self) -> None:
        self._rebooking = None
        self._unbooked = {booked: None for booked in self._unbooked if not booked.closed}
        for booked in list(self._unbooked)[:REBOOK_AT_ONCE]:
            try:
                router = self.find()
            except StatorError:
                self._set_timer()
                return
            del self._unbooked[booked]
            booked.book_again(router)
        if self._unbooked:
            self._rebook_soon()
