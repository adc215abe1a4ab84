"""One request, from its prompt to its last delta: route, generate, continue elsewhere, end once.

The life of a `Generation`: an *attempt* asks the router for an instance (that call stays open as the booking) and then
opens `generate` on it. Tokens are turned into text and pushed into the client's call inside the callback that brought
them; no task is involved. When an attempt fails, `core.continuation` says whether another follows, and the next one
sends what was received as resume_ids, while detokenizer and stop matcher just go on.

Ways out, each taken once and each releasing booking and engine stream: the engine finished, a stop string matched, a
failure that ends the request, or the client's call was cancelled (its deadline included).
"""

import functools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from stator.core.continuation import Continuation, Finish, GiveUp, Retry
from stator.errors import Ending, ErrorCode, StatorError
from stator.ids import BlockHash, InstanceId
from stator.messages.engine import EngineRequest, FinishReason, SamplingParams, TokenDelta
from stator.messages.openai import PromptTokensDetails, Usage
from stator.messages.processor import (
    EXPLAIN_HEADER,
    SESSION_HEADER,
    CompletionDelta,
    RouteDecision,
    RouteRequest,
)
from stator.messages.routing import RouteObservation
from stator.messages.tokens import TokenBuffer, num_tokens, pack
from stator.processor.feedback import RouteFeedback
from stator.processor.output import OutputText
from stator.runtime.context import CallContext
from stator.transport.base import Call, StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)

RouterTarget = Target | Callable[[], Target]
"""The Router's `route` endpoint, or a function that finds it and raises StatorError if there is none."""

_ENDINGS = {FinishReason.STOP: Ending.STOP, FinishReason.LENGTH: Ending.LENGTH}


@dataclass(slots=True)
class GenerationRequest:
    """model: the name the router knows. stop_ids: ids that end the output (eos unless ignored, and stop_token_ids)."""

    model: str
    prompt_ids: TokenBuffer
    block_hashes: list[BlockHash]
    sampling: SamplingParams
    stop_ids: Collection[int]
    priority: int = 0
    cache_salt: str | None = None


@functools.lru_cache(maxsize=4096)
def _generate_target(addresses: tuple[str, ...], instance_id: InstanceId) -> Target:
    return Target(addresses, "generate", instance_id)


class Generation:
    """on_done is called once, when nothing of the request is open any more."""

    def __init__(
        self,
        call: Call,
        request: GenerationRequest,
        output: OutputText,
        *,
        client: TransportClient,
        router: RouterTarget,
        feedback: RouteFeedback,
        migration_limit: int,
        on_done: Callable[["Generation"], None],
    ) -> None:
        self._call = call
        context = call.context
        # The end of the call at its deadline cancels what is opened here.
        self._context = CallContext(context.request_id, context.deadline, context.headers, watched=True)
        self._request = request
        self._output = output
        self._client = client
        self._router = router
        self._feedback = feedback
        self._on_done = on_done
        self._continuation = Continuation(
            migration_limit=migration_limit,
            max_tokens=request.sampling.max_tokens,
            min_tokens=request.sampling.min_tokens,
            stop_ids=request.stop_ids,
        )
        self._num_prompt_tokens = num_tokens(request.prompt_ids)
        self._attempt: _Attempt | None = None
        self._num_cached: int | None = None
        self._num_pushed = 0
        self._over = False

    def start(self) -> None:
        self._call.on_cancel(self._cancelled)
        if self._over:
            return
        try:
            self._begin_attempt()
        except Exception:
            self.fail()

    def end(self, error: StatorError) -> None:
        """End the request with a failure, if it has not ended."""
        if not self._over:
            self._release()
            self._call.end(error)

    def fail(self) -> None:
        """End the request because of the exception being handled."""
        logger.exception("request %s failed in the processor", self._call.context.request_id)
        self.end(StatorError(ErrorCode.INTERNAL, "the processor failed; its log has the reason"))

    # Attempts

    def _begin_attempt(self) -> None:
        request, received = self._request, self._continuation.received
        route = RouteRequest(
            model=request.model,
            num_prompt_tokens=self._num_prompt_tokens + len(received),
            max_tokens=request.sampling.max_tokens - len(received),
            block_hashes=list(request.block_hashes),
            exclude=self._continuation.exclude,
            session_id=self._call.context.headers.get(SESSION_HEADER),
        )
        attempt = self._attempt = _Attempt(self)
        try:
            target = self._router if isinstance(self._router, Target) else self._router()
        except StatorError as error:
            self.on_router_failure(attempt, error)
            return
        attempt.router = target
        attempt.booking = self._client.open(
            target, route, _RouteSink(attempt), context=self._context, item_type=RouteDecision
        )

    def on_decision(self, attempt: "_Attempt", decision: RouteDecision) -> None:
        attempt.instance_id = decision.instance_id
        attempt.decision = decision
        request = self._request
        engine_request = EngineRequest(
            request_id=self._call.context.request_id,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            resume_ids=pack(self._continuation.received),
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        target = _generate_target(decision.addresses, decision.instance_id)
        attempt.stream = self._client.open(
            target, engine_request, _TokenSink(attempt), context=self._context, item_type=TokenDelta
        )

    def on_router_failure(self, attempt: "_Attempt", error: StatorError) -> None:
        attempt.close()
        self._follow(self._continuation.on_router_failure(error))

    def on_engine_failure(self, attempt: "_Attempt", instance_id: InstanceId, error: StatorError) -> None:
        attempt.close()
        self._follow(self._continuation.on_engine_failure(error, instance_id))

    def _follow(self, effect: Retry | Finish | GiveUp) -> None:
        match effect:
            case GiveUp(error):
                self.end(error)
            case Finish(reason):
                # The stop token itself was pushed as text, which is right: stop_ids are special, or the client's own.
                self._finish(_ENDINGS[reason], self._output.push_last((), stopped=False))
            case Retry():
                last = self._continuation.last_error
                logger.warning(
                    "request %s goes on elsewhere after %d tokens: %s",
                    self._call.context.request_id,
                    len(self._continuation.received),
                    "the router was lost" if last is None else last.message,
                )
                self._begin_attempt()

    # Tokens

    def on_tokens(self, instance_id: InstanceId, deltas: Sequence[TokenDelta]) -> None:
        """All deltas of one frame become one CompletionDelta; several are there when this process was busy."""
        last = deltas[-1]
        if self._attempt is not None and not self._attempt.started:
            self._started(self._attempt, deltas[0])
        token_ids = last.token_ids if len(deltas) == 1 else [i for delta in deltas for i in delta.token_ids]
        output = self._output
        self._continuation.received += token_ids
        if last.finish_reason is not None:
            text = output.push_last(token_ids, stopped=last.finish_reason is FinishReason.STOP)
            ending = Ending.STOP if output.stopped else _ENDINGS[last.finish_reason]
            # Its stream ends by itself; a cancel would be one more frame for every request.
            if self._attempt is not None:
                self._attempt.stream = None
            self._finish(ending, text, instance_id)
            return
        text = output.push(token_ids)
        if output.stopped:
            self._finish(Ending.STOP, text, instance_id)
        elif not self._num_pushed and output.num_tokens:
            self._push(self._explained(CompletionDelta(text, output.num_tokens, instance_id=instance_id)))
        elif text:
            self._push(CompletionDelta(text, output.num_tokens - self._num_pushed))

    def _started(self, attempt: "_Attempt", first: TokenDelta) -> None:
        """The first tokens of an attempt are here: what the engine had cached is known."""
        attempt.started = True
        if self._num_cached is None:
            self._num_cached = first.num_cached_tokens or 0
        self._tell_router(
            attempt,
            num_cached_tokens=first.num_cached_tokens,
            fetched=first.num_transferred_tokens > 0,
            num_total_tokens=self._num_prompt_tokens + len(self._continuation.received),
        )

    def on_attempt_closed(self, attempt: "_Attempt") -> None:
        if not attempt.started:
            # Before the booking ends, with which the router forgets what it expected of this attempt.
            self._tell_router(attempt, at_once=True, failed=True)

    def _tell_router(self, attempt: "_Attempt", *, at_once: bool = False, **what: Any) -> None:
        decision, router = attempt.decision, attempt.router
        if decision is not None and decision.booking and router is not None:
            self._feedback.add(router, RouteObservation(decision.booking, **what), at_once=at_once)

    def _explained(self, delta: CompletionDelta) -> CompletionDelta:
        """With the reasons of the route decision, if the client wants them."""
        decision = None if self._attempt is None else self._attempt.decision
        if decision is None or self._call.context.headers.get(EXPLAIN_HEADER) != "1":
            return delta
        return msgspec.structs.replace(delta, overlap_blocks=decision.overlap_blocks, cost_ms=decision.cost_ms)

    def _push(self, delta: CompletionDelta) -> None:
        self._num_pushed = self._output.num_tokens
        self._call.items((delta,))

    # Endings

    def _finish(self, ending: Ending, text: str, instance_id: InstanceId | None = None) -> None:
        num_output = self._output.num_tokens
        usage = Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_output,
            total_tokens=self._num_prompt_tokens + num_output,
            prompt_tokens_details=PromptTokensDetails(self._num_cached or 0),
        )
        first = instance_id if not self._num_pushed else None
        last = CompletionDelta(text, num_output - self._num_pushed, ending, usage, first)
        if first is not None:
            last = self._explained(last)
        if self._attempt is not None:
            self._tell_router(self._attempt, num_output_tokens=num_output)
        self._release()
        self._call.items((last,))
        self._call.end()

    def _cancelled(self) -> None:
        if not self._over:
            self._release()

    def _release(self) -> None:
        self._over = True
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.close()
        self._on_done(self)


class _Attempt:
    """The two streams of one attempt. Once closed, what still arrives on them is nobody's business."""

    __slots__ = ("booking", "closed", "decision", "generation", "instance_id", "router", "started", "stream")

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.booking: StreamHandle | None = None
        self.stream: StreamHandle | None = None
        self.instance_id: InstanceId | None = None
        self.router: Target | None = None
        self.decision: RouteDecision | None = None
        self.started = False
        self.closed = False

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.generation.on_attempt_closed(self)
        # The streams know their sinks, which know this: let go, or all of it is the garbage collector's.
        stream, self.stream = self.stream, None
        booking, self.booking = self.booking, None
        if stream is not None:
            stream.cancel()
        if booking is not None:
            booking.cancel()


class _RouteSink:
    """Gets one decision. The end of the call after it says that the booking is gone, not that the request is."""

    __slots__ = ("_attempt",)

    def __init__(self, attempt: _Attempt) -> None:
        self._attempt = attempt

    def items(self, items: Sequence[RouteDecision], /) -> None:
        attempt = self._attempt
        if not attempt.closed and attempt.instance_id is None:
            attempt.generation.on_decision(attempt, items[0])

    def end(self, error: StatorError | None = None, /) -> None:
        attempt = self._attempt
        if attempt.closed or attempt.instance_id is not None:
            return
        failure = error or StatorError(ErrorCode.PROTOCOL, "the router ended its call without a decision")
        attempt.generation.on_router_failure(attempt, failure)


class _TokenSink:
    __slots__ = ("_attempt",)

    def __init__(self, attempt: _Attempt) -> None:
        self._attempt = attempt

    def items(self, items: Sequence[TokenDelta], /) -> None:
        attempt = self._attempt
        if attempt.closed:
            return
        assert attempt.instance_id is not None
        try:
            attempt.generation.on_tokens(attempt.instance_id, items)
        except Exception:
            attempt.generation.fail()

    def end(self, error: StatorError | None = None, /) -> None:
        attempt = self._attempt
        if attempt.closed:
            return
        instance_id = attempt.instance_id
        assert instance_id is not None
        failure = error or StatorError(
            ErrorCode.PROTOCOL, f"instance {instance_id} ended its stream without a finish reason"
        )
        attempt.generation.on_engine_failure(attempt, instance_id, failure)
