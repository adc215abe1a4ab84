"""One remote prefill as its decode worker sees it. Pure.

Rules. The prefill ends in exactly one of: *fetched* (the engine gets the transfer), *local* (the engine computes the
prompt itself), *crashed* (an engine died of it: it must not be computed here too, the request's owner decides),
*cancelled* (the request ended first). The first usable completion wins; any later one is told that
it is not wanted, so that its blocks are released. Whatever ends the wait other than a completion also cancels the
job, since it may still be queued or redelivered.

    PENDING --completion--------------------------> FETCHED   start the engine with the transfer
    PENDING --error completion, put failed, late,
              queue lost, no prefill instance left-> LOCAL     cancel the job, start the engine without
    PENDING --crashed completion------------------> CRASHED   cancel the job, end the request
    PENDING --request ended-----------------------> CANCELLED cancel the job
"""

from dataclasses import dataclass
from enum import StrEnum

from stator.messages.engine import PrefillResult


class State(StrEnum):
    PENDING = "pending"
    FETCHED = "fetched"
    LOCAL = "local"
    CRASHED = "crashed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Completed:
    """A prefill worker reports; result None means that it could not, for the reason in error. crashed: its engine
    failed in a step that computed this job."""

    result: PrefillResult | None
    error: str | None = None
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class GaveUp:
    """Nothing will come, or too late. reason is for people and for the metric's label."""

    reason: str


@dataclass(frozen=True, slots=True)
class RequestEnded:
    pass


@dataclass(frozen=True, slots=True)
class StartFetched:
    result: PrefillResult


@dataclass(frozen=True, slots=True)
class StartLocal:
    reason: str


@dataclass(frozen=True, slots=True)
class EndCrashed:
    """End the request with ENGINE_CRASHED."""

    reason: str


@dataclass(frozen=True, slots=True)
class CancelJob:
    pass


@dataclass(frozen=True, slots=True)
class Reply:
    """Tells the reporting prefill worker whether its blocks are wanted."""

    accepted: bool


Event = Completed | GaveUp | RequestEnded
Effect = StartFetched | StartLocal | EndCrashed | CancelJob | Reply


class RemotePrefill:
    """State of one job; `handle` is the only entry, its effects are carried out by the worker in order."""

    def __init__(self) -> None:
        self.state = State.PENDING

    def handle(self, event: Event) -> list[Effect]:
        if isinstance(event, Completed):
            return self._completed(event)
        if self.state is not State.PENDING:
            return []
        if isinstance(event, RequestEnded):
            self.state = State.CANCELLED
            return [CancelJob()]
        self.state = State.LOCAL
        return [CancelJob(), StartLocal(event.reason)]

    def _completed(self, event: Completed) -> list[Effect]:
        if self.state is not State.PENDING:
            return [Reply(accepted=False)]
        if event.result is None:
            reason = event.error or "the prefill worker gave no reason"
            if event.crashed:
                self.state = State.CRASHED
                return [Reply(accepted=False), CancelJob(), EndCrashed(reason)]
            self.state = State.LOCAL
            return [Reply(accepted=False), StartLocal(reason)]
        self.state = State.FETCHED
        return [Reply(accepted=True), StartFetched(event.result)]
