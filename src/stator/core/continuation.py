"""Whether and how a request goes on after an instance failed it.

The truth about a request is the list of token ids the Processor has received. A failure that another instance may not
repeat (`ErrorInfo.elsewhere`) is answered by asking the router again, without the instances that failed, and sending
the prompt plus the received ids. Rules, in order:

1. A failure that is not `elsewhere` is final.
2. Two engine crashes before any token of an attempt mark the request itself as the cause: final.
3. Ids that already complete the output (max_tokens reached, or a stop token last) need no other instance: the stream
   ends normally; only its last frame was lost.
4. More than `migration_limit` further attempts: final, with the last failure.
"""

from collections.abc import Collection
from dataclasses import dataclass

from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import FinishReason

MAX_PREFILL_CRASHES = 2

_BETWEEN_US = frozenset({ErrorCode.UNAUTHORIZED, ErrorCode.NOT_FOUND})
"""Failures of a call between instances that say nothing about the client: a wrong token, a missing endpoint."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Route again without `exclude`, then generate with the received ids as resume_ids."""

    exclude: tuple[InstanceId, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The received ids are the whole output."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class GiveUp:
    error: StatorError


class Continuation:
    """One per request.

    max_tokens, min_tokens: of the request, output tokens. stop_ids: ids that end the output once min_tokens is reached.
    received: every output token so far, over all attempts. num_retries: further attempts allowed so far.
    """

    def __init__(self, *, migration_limit: int, max_tokens: int, min_tokens: int, stop_ids: Collection[int]) -> None:
        self._limit = migration_limit
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._stop_ids = stop_ids
        self._exclude: tuple[InstanceId, ...] = ()
        self._prefill_crashes = 0
        self._tokens_before = 0
        self.received: list[int] = []
        self.num_retries = 0
        self.last_error: StatorError | None = None

    @property
    def exclude(self) -> tuple[InstanceId, ...]:
        return self._exclude

    def on_engine_failure(self, error: StatorError, instance_id: InstanceId) -> Retry | Finish | GiveUp:
        got_tokens = len(self.received) > self._tokens_before
        self._tokens_before = len(self.received)
        self.last_error = error
        if not error.info.elsewhere:
            return GiveUp(_for_client(error))
        if error.code is ErrorCode.ENGINE_DEAD and not got_tokens:
            self._prefill_crashes += 1
            if self._prefill_crashes >= MAX_PREFILL_CRASHES:
                return GiveUp(_poison(error))
        reason = self._complete()
        if reason is not None:
            return Finish(reason)
        self._exclude = (*self._exclude, instance_id)
        return self._retry(error)

    def on_router_failure(self, error: StatorError) -> Retry | GiveUp:
        """A router that was lost is asked again. One that has no other instance to offer leaves the failure that made
        us ask, when that tells the caller more: an overloaded or draining instance is not a missing one."""
        if error.info.elsewhere:
            return self._retry(error)
        last = self.last_error
        if error.code is ErrorCode.NO_INSTANCE and last is not None and last.code is ErrorCode.OVERLOADED:
            return GiveUp(last)
        return GiveUp(_for_client(error))

    def _retry(self, error: StatorError) -> Retry | GiveUp:
        if self.num_retries >= self._limit:
            return GiveUp(error)
        self.num_retries += 1
        return Retry(self._exclude)

    def _complete(self) -> FinishReason | None:
        num_tokens = len(self.received)
        if num_tokens and num_tokens > self._min_tokens and self.received[-1] in self._stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self._max_tokens else None


def _for_client(error: StatorError) -> StatorError:
    """A client that gets our peer's 401 would look for the mistake in its own key."""
    if error.code not in _BETWEEN_US:
        return error
    return StatorError(ErrorCode.INTERNAL, "an instance of this deployment refused the call; its log has the reason")


def _poison(error: StatorError) -> StatorError:
    return StatorError(
        error.code,
        f"{MAX_PREFILL_CRASHES} engines crashed while computing this request's prompt; it is not sent to another. "
        "See the workers' logs for the cause.",
    )
