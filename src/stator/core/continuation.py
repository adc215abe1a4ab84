"""Whether and how a request goes on after an instance failed it.

The truth about a request is the list of token ids the Processor has received. A failure that another instance may not
repeat (`ErrorInfo.elsewhere`) is answered by asking the router again, without the instances that failed, and sending
the prompt plus the received ids. Rules, in order:

1. A failure that is not `elsewhere` is final.
2. Two engine crashes in a step that was computing this request's prompt or first token (ENGINE_CRASHED) mark the
   request itself as the cause: final. Deaths, kills, drains and lost connections do not count.
3. Ids that already complete the output (max_tokens reached, or a stop token last) need no other instance: the stream
   ends normally; only its last frame was lost.
4. More than `migration_limit` further attempts: final, with the last failure. An instance that drains has not failed,
   and one that is full has not begun what another continues: these do not count, unless the limit is 0.
5. After the first token, a request whose state no engine can rebuild from ids (`core.resuming`) ends with
   NOT_RESUMABLE.

When the router has only instances that failed this request already, or none, the request waits and asks again, less and
less often: `wait_s` long if tokens were delivered (a restart takes seconds, and the client has half an answer), a
moment if not (the client can send it again, which the error says). Second tries on an instance that failed us before do
not count as migrations; the wait bounds them. Times are seconds of one monotonic clock.
"""

from collections.abc import Collection
from dataclasses import dataclass

from stator.core.resuming import NEVER_RESUMED, first_used
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import FinishReason, SamplingParams

MAX_CRASHES = 2
DEFAULT_WAIT_S = 30.0

UNDELIVERED_WAIT_S = 1.0
"""How long a request that has delivered nothing may retry instances that failed it. One whose connection broke is back
in less; a longer wait is better spent by the client, whose request then goes through admission again."""

YOUNG_ROUTER_WAIT_S = 5.0
"""How long a router is believed to know less than we do: one that was started while a hub came back empty learns of the
instances as they register again, which takes them some seconds."""

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0
RETRY_AFTER_S = 2.0

_BETWEEN_US = frozenset({ErrorCode.UNAUTHORIZED, ErrorCode.NOT_FOUND})
"""Failures of a call between instances that say nothing about the client: a wrong token, a missing endpoint."""

_SAYS_WHY = frozenset({ErrorCode.NO_INSTANCE, ErrorCode.OVERLOADED})
"""Failures that tell the caller by themselves that there is no room now."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Route again without `exclude`, in `after_s` or as soon as an instance comes, then generate with the received ids
    as resume_ids."""

    exclude: tuple[InstanceId, ...]
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Finish:
    """The received ids are the whole output."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class GiveUp:
    error: StatorError


class Continuation:
    """One per request.

    sampling: of the request. stop_ids: ids that end the output once min_tokens is reached.
    received: every output token so far, over all attempts. num_retries: further attempts that counted so far.
    victims: instances whose engine crashed computing it, in order.
    """

    def __init__(
        self,
        *,
        migration_limit: int,
        sampling: SamplingParams,
        stop_ids: Collection[int],
        wait_s: float = DEFAULT_WAIT_S,
    ) -> None:
        self._limit = migration_limit
        self._sampling = sampling
        self._stop_ids = stop_ids
        self._wait_s = wait_s
        self._exclude: tuple[InstanceId, ...] = ()
        self._tokens_before = 0
        self._waiting_since: float | None = None
        self._num_waits = 0
        self._waited = False
        self.received: list[int] = []
        self.victims: list[InstanceId] = []
        self.num_retries = 0
        self.last_error: StatorError | None = None

    @property
    def exclude(self) -> tuple[InstanceId, ...]:
        return self._exclude

    def on_engine_failure(self, error: StatorError, instance_id: InstanceId, now: float) -> Retry | Finish | GiveUp:
        """instance_id: where the attempt was. The failure may be another's (`error.instance_id`)."""
        got_tokens = len(self.received) > self._tokens_before
        self._tokens_before = len(self.received)
        self._waited = False
        self.last_error = error
        if got_tokens:
            self._waiting_since, self._num_waits = None, 0
        if not error.info.elsewhere:
            return GiveUp(_for_client(error))
        culprit = error.instance_id or instance_id
        if error.code is ErrorCode.ENGINE_CRASHED:
            self.victims.append(culprit)
            if len(self.victims) >= MAX_CRASHES:
                return GiveUp(_poison())
        reason = self._complete()
        if reason is not None:
            return Finish(reason)
        again = instance_id in self._exclude
        if culprit == instance_id and not again:
            self._exclude = (*self._exclude, instance_id)
        if again and not got_tokens:
            return self._wait(error, now)
        uncounted = error.code is ErrorCode.DRAINING or (error.code is ErrorCode.OVERLOADED and bool(self.received))
        return self._retry(error, counted=not uncounted)

    def on_gone(self, instance_id: InstanceId, now: float) -> Retry | GiveUp:
        """The router chose an instance that is known to have left: nothing was sent there."""
        message = f"instance {instance_id} has left"
        self.last_error = StatorError(ErrorCode.INSTANCE_LOST, message)
        if instance_id in self._exclude:
            return self._wait(self.last_error, now)
        self._exclude = (*self._exclude, instance_id)
        return Retry(self._exclude)

    def on_decision(self, instance_id: InstanceId, now: float) -> Retry | GiveUp | None:
        """None: send the request there. A router falls back to excluded instances when it has no other; a second try
        on one comes after a wait, or attempts would be used up before anything could have changed."""
        if self._waited or instance_id not in self._exclude:
            return None
        assert self.last_error is not None, "an instance is excluded for a reason"
        return self._wait(self.last_error, now)

    def on_router_failure(self, error: StatorError, now: float, *, instance_known: bool = False) -> Retry | GiveUp:
        """A router that was lost or stops is asked again. One that has no instance to offer, or no room, is asked again
        later if the client has half an answer. Otherwise its refusal is the answer: it may have come after a wait, and
        asking at once would only lengthen the line. An instance that was full says more than that there is no other.

        instance_known: discovery shows one that the router may not have seen yet."""
        if error.code not in (ErrorCode.NO_INSTANCE, ErrorCode.OVERLOADED):
            return self._retry(error) if error.info.elsewhere else GiveUp(_for_client(error))
        if self.received:
            return self._wait(error, now)
        if instance_known and error.code is ErrorCode.NO_INSTANCE and not self._exclude:
            return self._wait(error, now, bound=YOUNG_ROUTER_WAIT_S)
        last = self.last_error
        if error.code is ErrorCode.NO_INSTANCE and last is not None and last.code is ErrorCode.OVERLOADED:
            return GiveUp(last)
        return GiveUp(error)

    def _retry(self, error: StatorError, *, counted: bool = True) -> Retry | GiveUp:
        if self._limit == 0 or counted and self.num_retries >= self._limit:
            return GiveUp(error)
        field = first_used(self._sampling, NEVER_RESUMED) if self.received else None
        if field is not None:
            return GiveUp(self.not_resumable(field, "no engine can rebuild that state"))
        self.num_retries += counted
        return Retry(self._exclude)

    def _wait(self, error: StatorError, now: float, *, bound: float = UNDELIVERED_WAIT_S) -> Retry | GiveUp:
        """bound: seconds in all, of a request that has delivered nothing."""
        if self._limit == 0:
            return GiveUp(self._nobody(error, 0.0))
        if self.received:
            bound = self._wait_s
        if self._waiting_since is None:
            self._waiting_since = now
        left = self._waiting_since + bound - now
        if left <= 0.0:
            return GiveUp(self._nobody(error, bound))
        delay = min(left, MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._num_waits, 10))
        self._num_waits += 1
        self._waited = True
        return Retry(self._exclude, delay)

    def _nobody(self, error: StatorError, waited_s: float) -> StatorError:
        """When the wait is over: 503 with the time for a retry, unless the failure says as much by itself. What a peer
        said is not quoted: it may name addresses."""
        after = f"; waited {waited_s:g} s to continue after {len(self.received)} tokens" if self.received else ""
        retry_after_s = error.retry_after_s or RETRY_AFTER_S
        if error.code in _SAYS_WHY:
            return StatorError(error.code, error.message + after, retry_after_s=retry_after_s)
        last = "drains" if error.code is ErrorCode.DRAINING else f"failed: {error.code.value}"
        message = f"no worker is left that could take the request{after}; the last one {last}"
        return StatorError(ErrorCode.NO_INSTANCE, message, retry_after_s=retry_after_s)

    def not_resumable(self, field: str, why: str) -> StatorError:
        """field: that the request uses. why: what cannot be done about it, and by whom."""
        lost = "the instance that ran it" if self.last_error is None else self.last_error.code.value
        return StatorError(
            ErrorCode.NOT_RESUMABLE,
            f"the request ended after {len(self.received)} tokens ({lost}), and one with {field!r} cannot be "
            f"continued: {why}. Nothing else was wrong with it; send it again",
            param=field,
        )

    def _complete(self) -> FinishReason | None:
        num_tokens = len(self.received)
        if num_tokens and num_tokens > self._sampling.min_tokens and self.received[-1] in self._stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self._sampling.max_tokens else None


def _for_client(error: StatorError) -> StatorError:
    """A client that gets our peer's 401 would look for the mistake in its own key."""
    if error.code not in _BETWEEN_US:
        return error
    return StatorError(ErrorCode.INTERNAL, "an instance of this deployment refused the call; its log has the reason")


def _poison() -> StatorError:
    return StatorError(
        ErrorCode.POISON_REQUEST,
        f"{MAX_CRASHES} engines crashed while computing this request's prompt; it is not sent to another. "
        "The Processor's log names them, and theirs have the cause.",
    )
