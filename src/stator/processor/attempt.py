"""One attempt of a request on one instance: its two streams, and what comes on them.

The first stream is the booking, a call of the router's `route`; the second is `generate` on the instance it chose. What
arrives goes to the owner, which is the request; once the attempt is closed, nobody hears of it.
"""

from collections.abc import Sequence
from typing import Protocol

from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import TokenDelta
from stator.messages.processor import RouteDecision
from stator.processor.instances import DecodeInstances
from stator.transport.base import StreamHandle, Target


class AttemptOwner(Protocol):
    """The request. None of these is called for an attempt that is closed."""

    instances: DecodeInstances

    def on_decision(self, attempt: "Attempt", decision: RouteDecision) -> None: ...

    def on_router_failure(self, attempt: "Attempt", error: StatorError) -> None: ...

    def on_booking_end(self, attempt: "Attempt", error: StatorError | None) -> None:
        """The router's call ended after its decision: the booking is gone, the request is not."""
        ...

    def book_again(self, attempt: "Attempt", router: Target) -> None: ...

    def on_booked_again(self, attempt: "Attempt", router: Target, decision: RouteDecision, *, started: bool) -> None:
        """started: what the router was told."""
        ...

    def on_tokens(self, instance_id: InstanceId, deltas: Sequence[TokenDelta]) -> None: ...

    def on_engine_failure(self, attempt: "Attempt", instance_id: InstanceId, error: StatorError) -> None: ...

    def on_attempt_closed(self, attempt: "Attempt") -> None: ...

    def end(self, error: StatorError) -> None: ...

    def fail(self) -> None:
        """End the request because of the exception being handled."""
        ...


class Attempt:
    """The two streams of one attempt. Once closed, what still arrives on them is nobody's business."""

    __slots__ = (
        "booking", "closed", "decision", "instance_id", "num_rebookings", "owner", "router", "started", "stream",
    )  # fmt: skip

    def __init__(self, owner: AttemptOwner) -> None:
        self.owner = owner
        self.booking: StreamHandle | None = None
        self.stream: StreamHandle | None = None
        self.instance_id: InstanceId | None = None
        self.router: Target | None = None
        self.decision: RouteDecision | None = None
        self.num_rebookings = 0
        self.started = False
        self.closed = False

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.instance_id is not None:
            self.owner.instances.ended(self.instance_id, self)
        self.owner.on_attempt_closed(self)
        # The streams know their sinks, which know this: let go, or all of it is the garbage collector's.
        stream, self.stream = self.stream, None
        booking, self.booking = self.booking, None
        if stream is not None:
            stream.cancel()
        if booking is not None:
            booking.cancel()

    def book_again(self, router: Target) -> None:
        self.owner.book_again(self, router)

    def lost(self, error: StatorError) -> None:
        """Discovery says that the instance is gone."""
        if self.closed:
            return
        assert self.instance_id is not None
        try:
            self.owner.on_engine_failure(self, self.instance_id, error)
        except Exception:
            self.owner.fail()


class RouteSink:
    """Gets one decision. The end of the call after it says that the booking is gone, not that the request is."""

    __slots__ = ("_attempt",)

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def items(self, items: Sequence[RouteDecision], /) -> None:
        attempt = self._attempt
        if not attempt.closed and attempt.instance_id is None:
            attempt.owner.on_decision(attempt, items[0])

    def end(self, error: StatorError | None = None, /) -> None:
        attempt = self._attempt
        if attempt.closed:
            return
        if attempt.instance_id is not None:
            attempt.owner.on_booking_end(attempt, error)
            return
        failure = error or StatorError(ErrorCode.PROTOCOL, "the router ended its call without a decision")
        attempt.owner.on_router_failure(attempt, failure)


class RebookSink:
    """As RouteSink, of an attempt that has its instance. started: what the router was told."""

    __slots__ = ("_attempt", "_router", "_started")

    def __init__(self, attempt: Attempt, router: Target, *, started: bool) -> None:
        self._attempt = attempt
        self._router = router
        self._started = started

    def items(self, items: Sequence[RouteDecision], /) -> None:
        attempt = self._attempt
        if not attempt.closed:
            attempt.owner.on_booked_again(attempt, self._router, items[0], started=self._started)

    def end(self, error: StatorError | None = None, /) -> None:
        attempt = self._attempt
        if not attempt.closed:
            attempt.router = self._router
            attempt.owner.on_booking_end(attempt, error)


class TokenSink:
    __slots__ = ("_attempt",)

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def items(self, items: Sequence[TokenDelta], /) -> None:
        attempt = self._attempt
        if attempt.closed:
            return
        assert attempt.instance_id is not None
        try:
            attempt.owner.on_tokens(attempt.instance_id, items)
        except StatorError as error:
            attempt.owner.end(error)
        except Exception:
            attempt.owner.fail()

    def end(self, error: StatorError | None = None, /) -> None:
        attempt = self._attempt
        if attempt.closed:
            return
        instance_id = attempt.instance_id
        assert instance_id is not None
        failure = error or StatorError(
            ErrorCode.PROTOCOL, f"instance {instance_id} ended its stream without a finish reason"
        )
        attempt.owner.on_engine_failure(attempt, instance_id, failure)
