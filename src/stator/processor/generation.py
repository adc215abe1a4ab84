"""One request, from its prompt to its last delta: route, generate, continue elsewhere, end once.

The life of a `Generation`: an *attempt* asks the router for an instance (that call stays open as the booking) and then
opens `generate` on it. Tokens are turned into text and pushed into the client's call inside the callback that brought
them; no task is involved. When an attempt fails, `core.continuation` says whether another follows, and the next one
sends what was received as resume_ids, while detokenizer and stop matcher just go on.

Where no instance is left for a request with half an answer, it waits for one; the timer and `DecodeInstances` wake it.
Where there is no router, it waits for one; `Bookings` wakes it, and books running requests again when theirs is lost.

Ways out, each taken once and each releasing booking and engine stream: the engine finished, a stop string matched, a
failure that ends the request, or the client's call was cancelled (its deadline included).
"""

import asyncio
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
from stator.processor.answer_form import AnswerReader, named_by
from stator.processor.attempt import Attempt, RebookSink, RouteSink, TokenSink
from stator.processor.booking import MAX_REBOOKINGS, Bookings, RouterWait
from stator.processor.details import Details, Told
from stator.processor.feedback import RouteFeedback
from stator.processor.instances import DecodeInstances
from stator.processor.output import OutputText
from stator.runtime.context import CallContext, loop_time
from stator.transport.base import Call, StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)

_ENDINGS = {FinishReason.STOP: Ending.STOP, FinishReason.LENGTH: Ending.LENGTH}


@dataclass(slots=True)
class GenerationRequest:
    """model: the name the router knows. stop_ids: ids that end the output (eos unless ignored, and stop_token_ids).
    stops: strings that do. grammar_param: the client's field that asks for `sampling.grammar`. lora_name: an adapter of
    the model."""

    model: str
    prompt_ids: TokenBuffer
    block_hashes: list[BlockHash]
    sampling: SamplingParams
    stop_ids: Collection[int]
    stops: Sequence[str] = ()
    priority: int = 0
    cache_salt: str | None = None
    grammar_param: str | None = None
    lora_name: str | None = None


@functools.lru_cache(maxsize=4096)
def _generate_target(addresses: tuple[str, ...], instance_id: InstanceId) -> Target:
    return Target(addresses, "generate", instance_id)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all requests of a Processor have in common. migration_limit, migration_wait_s: as in ProcessorSettings."""

    client: TransportClient
    bookings: Bookings
    feedback: RouteFeedback
    instances: DecodeInstances
    migration_limit: int
    migration_wait_s: float


class Generation:
    """details: what the answer says of its tokens beside their text; None for a plain one, which is not slowed down.
    on_done is called once, when nothing of the request is open any more."""

    def __init__(
        self,
        call: Call,
        request: GenerationRequest,
        output: OutputText,
        shared: Shared,
        *,
        on_done: Callable[["Generation"], None],
        details: Details | None = None,
    ) -> None:
        self._call = call
        context = call.context
        # The end of the call at its deadline cancels what is opened here.
        self._context = CallContext(context.request_id, context.deadline, context.headers, watched=True)
        self._request = request
        self._output = output
        self._details = details
        self._client = shared.client
        self.bookings = shared.bookings
        self._feedback = shared.feedback
        self.instances = shared.instances
        self._on_done = on_done
        self._continuation = Continuation(
            migration_limit=shared.migration_limit,
            sampling=request.sampling,
            stop_ids=request.stop_ids,
            wait_s=shared.migration_wait_s,
        )
        self._num_prompt_tokens = num_tokens(request.prompt_ids)
        self._attempt: Attempt | None = None
        self._num_cached: int | None = None
        self._num_pushed = 0
        self._timer: asyncio.TimerHandle | None = None
        self._router_wait: RouterWait | None = None
        self._routerless_since: float | None = None
        self._over = False
        self._started_at = self._decided_at = loop_time()

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
            self._call.end(named_by(error, self._request.grammar_param))

    def fail(self) -> None:
        """End the request because of the exception being handled."""
        logger.exception("request %s failed in the processor", self._call.context.request_id)
        self.end(StatorError(ErrorCode.INTERNAL, "the processor failed; its log has the reason"))

    # Attempts

    def _begin_attempt(self) -> None:
        if self._continuation.victims and not self.instances.suspects.may_go(self._waited):
            return
        request, received = self._request, self._continuation.received
        exclude = self._continuation.exclude
        if received:
            unable, ask = self.instances.unable(request.model, request.sampling, request.lora_name)
            if not ask:
                self._follow(GiveUp(self._not_resumable(next(iter(unable.values())))))
                return
            exclude = tuple(dict.fromkeys((*exclude, *unable)))
        route = RouteRequest(
            model=request.model,
            num_prompt_tokens=self._num_prompt_tokens + len(received),
            max_tokens=request.sampling.max_tokens - len(received),
            block_hashes=list(request.block_hashes),
            exclude=exclude,
            session_id=self._call.context.headers.get(SESSION_HEADER),
            begun=self.bookings.begun,
            priority=request.priority,
            resumed=bool(received or self._continuation.exclude),
            lora_name=request.lora_name,
        )
        attempt = self._attempt = Attempt(self)
        try:
            target = self.bookings.find()
        except StatorError:
            attempt.close()
            self._wait_for_router()
            return
        attempt.router = target
        attempt.booking = self._client.open(
            target, route, RouteSink(attempt), context=self._context, item_type=RouteDecision
        )

    def on_decision(self, attempt: Attempt, decision: RouteDecision) -> None:
        attempt.instance_id = decision.instance_id
        attempt.decision = decision
        self._decided_at = loop_time()
        if attempt.router is not None:
            self.bookings.answered(attempt.router)
        self._routerless_since = None
        effect = self._objection(decision.instance_id)
        if effect is not None:
            attempt.close()
            self._follow(effect)
            return
        self.instances.opened(decision.instance_id, attempt)
        attempt.stream = self.open_stream(attempt, decision, self._request)

    def open_stream(self, attempt: Attempt, decision: RouteDecision, request: GenerationRequest) -> StreamHandle:
        engine_request = EngineRequest(
            request_id=self._call.context.request_id,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling if self._details is None else self._details.left_to_ask(request.sampling),
            resume_ids=pack(self._continuation.received),
            priority=request.priority,
            cache_salt=request.cache_salt,
            lora_name=request.lora_name,
        )
        target = _generate_target(decision.addresses, decision.instance_id)
        return self._client.open(
            target, engine_request, TokenSink(attempt), context=self._context, item_type=TokenDelta
        )

    def _objection(self, instance_id: InstanceId) -> Retry | GiveUp | None:
        """Why nothing is sent to the instance that the router chose, if so."""
        continuation, instances = self._continuation, self.instances
        if instances.is_gone(instance_id) or (continuation.received and not instances.is_known(instance_id)):
            return continuation.on_gone(instance_id, loop_time())
        if continuation.received:
            # The router takes an excluded instance when it has no other.
            field = instances.obstacle(instance_id, self._request.sampling)
            if field is not None:
                return GiveUp(self._not_resumable(field))
        return continuation.on_decision(instance_id, loop_time()) if continuation.exclude else None

    def _not_resumable(self, field: str) -> StatorError:
        return self._continuation.not_resumable(field, "the engines that are left cannot take it up where it was")

    # Bookings that end before their request

    def on_booking_end(self, attempt: Attempt, error: StatorError | None) -> None:
        """The router's call ended after its decision: the booking is gone, the request is not."""
        router, attempt.router, attempt.booking = attempt.router, None, None
        if router is not None and error is not None and self.bookings.is_lost(error):
            self.bookings.lost(router)
        attempt.num_rebookings += 1
        if attempt.num_rebookings <= MAX_REBOOKINGS:
            self.bookings.rebook(attempt)

    def book_again(self, attempt: Attempt, router: Target) -> None:
        num_received = len(self._continuation.received)
        again = RouteRequest(
            model=self._request.model,
            num_prompt_tokens=self._num_prompt_tokens + num_received,
            max_tokens=max(1, self._request.sampling.max_tokens - num_received),
            session_id=self._call.context.headers.get(SESSION_HEADER),
            begun=True,
            booked_on=attempt.instance_id,
            started=attempt.started,
            lora_name=self._request.lora_name,
        )
        sink = RebookSink(attempt, router, started=attempt.started)
        attempt.booking = self._client.open(router, again, sink, context=self._context, item_type=RouteDecision)

    def on_booked_again(self, attempt: Attempt, router: Target, decision: RouteDecision, *, started: bool) -> None:
        """started: what the router was told."""
        self.bookings.answered(router)
        if decision.instance_id != attempt.instance_id or attempt.decision is None:
            # A router of before re-booking chose an instance. It must not count the request there.
            booking, attempt.booking = attempt.booking, None
            attempt.num_rebookings = MAX_REBOOKINGS
            if booking is not None:
                booking.cancel()
            return
        attempt.num_rebookings = 0
        attempt.router = router
        attempt.decision = msgspec.structs.replace(attempt.decision, booking=decision.booking)
        if attempt.started and not started:
            # The first token came in between. "fetched": nothing is to be learned from it.
            self._tell_router(attempt, num_cached_tokens=0, fetched=True)

    def _wait_for_router(self) -> None:
        if self._routerless_since is None:
            self._routerless_since = loop_time()
        wait = self.bookings.wait(self._routerless_since, self._waited, self.end)
        if isinstance(wait, StatorError):
            self.end(wait)
        else:
            self._router_wait = wait

    def on_router_failure(self, attempt: Attempt, error: StatorError) -> None:
        router = attempt.router
        attempt.close()
        if router is not None and self.bookings.is_lost(error):
            self.bookings.lost(router)
            # Another router is asked at once, or the next one is awaited.
            if self._routerless_since is None:
                self._routerless_since = loop_time()
            self._begin_attempt()
            return
        known = self.instances.any_ready(self._request.model, self._request.lora_name)
        self._follow(self._continuation.on_router_failure(error, loop_time(), instance_known=known))

    def on_engine_failure(self, attempt: Attempt, instance_id: InstanceId, error: StatorError) -> None:
        attempt.close()
        if self._continuation.victims:
            self.instances.suspects.leave(self._waited)
        self._follow(self._continuation.on_engine_failure(error, instance_id, loop_time()))

    def _follow(self, effect: Retry | Finish | GiveUp) -> None:
        match effect:
            case GiveUp(error):
                self._log_end(error)
                self.end(error)
            case Finish(reason):
                # The stop token itself was pushed as text, which is right: stop_ids are special, or the client's own.
                self._finish(_ENDINGS[reason], self._output.push_last((), stopped=False))
            case Retry(after_s=0.0):
                self._log_retry("goes on elsewhere")
                self._begin_attempt()
            case Retry():
                self._log_retry(f"waits {effect.after_s:.1f} s for an instance to go on")
                self._wait(effect.after_s)

    def _wait(self, after_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(after_s, self._waited)
        self.instances.wake_on_change(self._waited)

    def _waited(self) -> None:
        if self._over:
            return
        self._stop_waiting()
        try:
            self._begin_attempt()
        except Exception:
            self.fail()

    def _stop_waiting(self) -> None:
        if self._router_wait is not None:
            self._router_wait.cancel()
            self._router_wait = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.instances.sleep(self._waited)

    def _log_retry(self, how: str) -> None:
        last = self._continuation.last_error
        logger.warning(
            "request %s %s after %d tokens: %s",
            self._call.context.request_id,
            how,
            len(self._continuation.received),
            "the router was lost" if last is None else last.message,
        )

    def _log_end(self, error: StatorError) -> None:
        request_id, continuation = self._call.context.request_id, self._continuation
        if error.code is ErrorCode.POISON_REQUEST:
            logger.error(
                "request %s is refused: the engines of %s crashed while computing its prompt",
                request_id,
                " and ".join(continuation.victims),
            )
        elif continuation.received:
            num_received, last = len(continuation.received), continuation.last_error
            logger.error("request %s ends after %d tokens: %r; before: %r", request_id, num_received, error, last)

    # Tokens

    def on_tokens(self, instance_id: InstanceId, deltas: Sequence[TokenDelta]) -> None:
        """All deltas of one frame become one CompletionDelta; several are there when this process was busy."""
        last = deltas[-1]
        if self._attempt is not None and not self._attempt.started:
            self._started(self._attempt, deltas[0])
        token_ids = last.token_ids if len(deltas) == 1 else [i for delta in deltas for i in delta.token_ids]
        output = self._output
        self._continuation.received += token_ids
        if self._details is not None:
            self._on_detailed_tokens(self._details, instance_id, deltas, token_ids)
            return
        if last.finish_reason is not None:
            if not self._continuation.received:
                raise _no_tokens(instance_id)
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

    def _on_detailed_tokens(
        self, details: Details, instance_id: InstanceId, deltas: Sequence[TokenDelta], token_ids: Sequence[int]
    ) -> None:
        """As on_tokens, of an answer that says more than text: every frame is told of, with or without new text."""
        output, reason = self._output, deltas[-1].finish_reason
        if reason is not None and not self._continuation.received:
            raise _no_tokens(instance_id)
        num_before = output.num_tokens
        if not details.shows_output:
            text = ""
        elif reason is None:
            text = output.push(token_ids)
        else:
            text = output.push_last(token_ids, stopped=reason is FinishReason.STOP)
        told = details.take(token_ids, deltas, output.num_tokens - num_before)
        ending = Ending.STOP if output.stopped else None if reason is None else _ENDINGS[reason]
        if ending is not None and not details.shows_output:
            ending = Ending.LENGTH
        if ending is not None:
            if reason is not None and self._attempt is not None:
                self._attempt.stream = None
            self._finish(ending, text, instance_id, told)
            return
        first = None if self._num_pushed else instance_id
        delta = CompletionDelta(
            text,
            output.num_tokens - self._num_pushed,
            usage=self._usage() if details.continuous_usage else None,
            instance_id=first,
            tokens=told.tokens,
            prompt=told.prompt,
        )
        if details.reader is not None:
            delta = _read(delta, details.reader)
        self._push(delta if first is None else self._explained(delta))

    def _started(self, attempt: Attempt, first: TokenDelta) -> None:
        """The first tokens of an attempt are here: what the engine had cached is known."""
        attempt.started = True
        if self._continuation.victims:
            self.instances.suspects.leave(self._waited)
        if self._num_cached is None:
            self._num_cached = first.num_cached_tokens or 0
        self._tell_router(
            attempt,
            num_cached_tokens=first.num_cached_tokens,
            fetched=first.num_transferred_tokens > 0,
            num_total_tokens=self._num_prompt_tokens + len(self._continuation.received),
        )

    def on_attempt_closed(self, attempt: Attempt) -> None:
        if not attempt.started:
            # Before the booking ends, with which the router forgets what it expected of this attempt.
            self._tell_router(attempt, at_once=True, failed=True)

    def _tell_router(self, attempt: Attempt, *, at_once: bool = False, **what: Any) -> None:
        decision, router = attempt.decision, attempt.router
        if decision is not None and decision.booking and router is not None:
            self._feedback.add(router, RouteObservation(decision.booking, **what), at_once=at_once)

    def _explained(self, delta: CompletionDelta) -> CompletionDelta:
        """With the reasons of the route decision, if the client wants them."""
        decision = None if self._attempt is None else self._attempt.decision
        if decision is None or self._call.context.headers.get(EXPLAIN_HEADER) != "1":
            return delta
        route_s, engine_s = self._decided_at - self._started_at, loop_time() - self._decided_at
        return msgspec.structs.replace(
            delta,
            overlap_blocks=decision.overlap_blocks,
            cost_ms=decision.cost_ms,
            phases_ms={"route": round(route_s * 1e3, 3), "engine": round(engine_s * 1e3, 3)},
        )

    def _push(self, delta: CompletionDelta) -> None:
        self._num_pushed = self._output.num_tokens
        self._call.items((delta,))

    # Endings

    def _usage(self) -> Usage:
        """So far."""
        num_output = self._output.num_tokens
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_output,
            total_tokens=self._num_prompt_tokens + num_output,
            prompt_tokens_details=PromptTokensDetails(self._num_cached or 0),
        )

    def _finish(
        self, ending: Ending, text: str, instance_id: InstanceId | None = None, told: Told | None = None
    ) -> None:
        num_output = self._output.num_tokens
        first = instance_id if not self._num_pushed else None
        last = CompletionDelta(
            text,
            num_output - self._num_pushed,
            ending,
            self._usage(),
            first,
            stop_string=self._output.stop_string,
        )
        if told is not None:
            last = msgspec.structs.replace(last, tokens=told.tokens, prompt=told.prompt)
        if self._details is not None and self._details.reader is not None:
            last = _read(last, self._details.reader)
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
        self._stop_waiting()
        if self._continuation.victims:
            self.instances.suspects.leave(self._waited)
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.close()
        self._on_done(self)


def _read(delta: CompletionDelta, reader: AnswerReader) -> CompletionDelta:
    """With its text taken apart."""
    ending = delta.ending
    found = reader.read(delta.text, last=ending is not None)
    return msgspec.structs.replace(
        delta,
        text=found.text,
        reasoning=found.reasoning,
        tool_calls=found.tool_calls,
        ending=None if ending is None else reader.ending(ending),
        parsed=delta.instance_id is not None,
    )


def _no_tokens(instance_id: InstanceId) -> StatorError:
    """An answer without a token is none: the client would get an empty 200."""
    return StatorError(ErrorCode.PROTOCOL, f"instance {instance_id} ended its stream well, but gave no token")
