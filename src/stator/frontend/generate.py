"""Requests that generate: from the parsed head of a request to its last byte, its metrics and its log line."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from stator.errors import Ending, ErrorCode, StatorError
from stator.frontend.decode import CHAT, undeclared_fields
from stator.frontend.dialect import Asked, Dialect, StreamEncoder
from stator.frontend.http import ClientGone, Headers, HttpExchange, Pipe, Receive, internal_error
from stator.frontend.settings import FrontendSettings
from stator.frontend.stream import DeltaStream, Write
from stator.frontend.unary import Unary, not_served
from stator.ids import RequestId
from stator.messages.openai import ModelCard, Usage
from stator.messages.processor import EXPLAIN_HEADER, SESSION_HEADER, CompletionDelta
from stator.observability import access_log
from stator.observability.metrics import OTHER, Metrics, Tally
from stator.runtime.context import CallContext
from stator.transport.base import Target, TransportClient

logger = logging.getLogger(__name__)

TIMEOUT_HEADER = b"x-request-timeout-s"
CARRIED_HEADERS = {name.encode("ascii"): name for name in ("traceparent", "tracestate", SESSION_HEADER, EXPLAIN_HEADER)}
"""Request headers that travel with the call: trace context, and what concerns routing."""

MAX_CARRIED_HEADER_BYTES = 512
CLIENT_CLOSED_STATUS = 499

_PROCESSOR_LEFT = frozenset({ErrorCode.DRAINING, ErrorCode.INSTANCE_LOST, ErrorCode.STALE_INSTANCE})

Targets = Callable[[str], Sequence[Target]]
"""The Processors that serve an endpoint ("chat" or "completions") now; the Frontend takes them in turn."""


@dataclass(slots=True)
class _Record:
    """What metrics and log say about one request when it has ended. started: on the loop's clock."""

    endpoint: str
    started: float
    model: str = OTHER
    streamed: bool = False
    generates: bool = True
    num_tokens: int = 0
    first_token_at: float | None = None
    usage: Usage | None = None
    ending: Ending = Ending.CANCELLED
    status: int = CLIENT_CLOSED_STATUS
    error: ErrorCode | None = None

    def failed(self, error: StatorError, status: int) -> None:
        self.error = error.code
        self.ending = error.info.ending
        self.status = status


@dataclass(frozen=True, slots=True)
class _Call:
    """A request on its way to a Processor. latencies: where the times between its tokens are counted."""

    asked: Asked
    context: CallContext
    latencies: Tally
    loop: asyncio.AbstractEventLoop


class Generation:
    """Serves every endpoint whose answers are made of a Processor's deltas; owns the open requests.

    After `drain` new requests are refused while open ones go on; `idle` waits for their end, `abort` ends them.
    wall: Unix seconds, for the `created` of answers. of_model: whom to ask for a model; default: whoever targets finds.
    """

    def __init__(
        self,
        *,
        client: TransportClient,
        targets: Targets,
        models: Callable[[], Sequence[ModelCard]],
        metrics: Metrics,
        settings: FrontendSettings,
        rng: random.Random,
        wall: Callable[[], float] = time.time,
        of_model: Callable[[str], Targets] | None = None,
    ) -> None:
        self._client = client
        self._targets = targets
        self._of_model = of_model
        self._models = models
        self._metrics = metrics
        self._settings = settings
        self._wall = wall
        self._turn = rng.getrandbits(16)
        self._streams: dict[DeltaStream, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_open: dict[str, int] = {}
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._labels: frozenset[str] = frozenset()
        self.draining = False

    @property
    def num_open(self) -> int:
        return sum(self._num_open.values())

    def drain(self) -> None:
        self.draining = True

    async def idle(self) -> None:
        """Wait until no request is open."""
        await self._none_open.wait()

    def abort(self) -> None:
        """End every open stream with DRAINING; their clients are told."""
        for stream in list(self._streams):
            stream.fail(StatorError(ErrorCode.DRAINING, "The server stopped before this answer was complete."))

    async def handle(self, http: HttpExchange, dialect: Dialect | Unary) -> None:
        """Unary: an endpoint that answers with one item."""
        loop = self._loop
        if loop is None:
            # Asking for the running loop is a system call on CPython 3.11.
            loop = self._loop = asyncio.get_running_loop()
        label = dialect.label
        http.errors = dialect.errors
        record = _Record(label, loop.time())
        self._enter(label)
        try:
            if isinstance(dialect, Unary):
                await self._serve_unary(http, dialect, record)
            else:
                await self._serve(http, dialect, record, loop)
        except ClientGone:
            self._metrics.counter("client_disconnects_total", label).inc()
        except StatorError as error:
            record.failed(error, http.errors.status(error))
            await http.fail(error)
        except Exception:
            logger.exception("request %s failed in the frontend", http.call_id)
            error = internal_error()
            record.failed(error, http.errors.status(error))
            await http.fail(error)
        finally:
            self._num_open[label] -= 1
            if not self.num_open:
                self._none_open.set()
            self._account(http, record, loop.time())

    def _enter(self, endpoint: str) -> None:
        if endpoint not in self._num_open:
            # Read when a scrape asks; a request only counts.
            self._num_open[endpoint] = 0
            self._metrics.gauge("requests_in_progress", endpoint).set_function(lambda: self._num_open[endpoint])
        self._num_open[endpoint] += 1
        self._none_open.clear()

    def _admit(self) -> None:
        if self.draining:
            raise StatorError(
                ErrorCode.DRAINING, "This server is shutting down; send the request again.", retry_after_s=1.0
            )
        if self.num_open > self._settings.max_open_requests:
            raise StatorError(
                ErrorCode.OVERLOADED,
                f"This server has {self._settings.max_open_requests} open requests, which is its limit; try later.",
                retry_after_s=1.0,
            )

    async def _serve(
        self, http: HttpExchange, dialect: Dialect, record: _Record, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._admit()
        body = await http.read_body(self._settings.max_body_bytes, self._settings.receive_timeout_s)
        asked = dialect.decode(body)
        if isinstance(asked, Awaitable):
            asked = await asked
        request, endpoint = asked.request, dialect.endpoint
        if logger.isEnabledFor(logging.DEBUG) and (ignored := undeclared_fields(asked.body, body)):
            logger.debug("request %s: fields that are not known are ignored: %r", http.call_id, ignored)
        record.model = self._label(request.model)
        record.streamed = asked.streams
        record.generates = dialect.generates
        context = self._context(http, record.started)
        latencies = self._metrics.histogram("inter_token_latency_seconds", record.model, dialect.label)
        targets = self._serving(request.model)
        target = self._target(targets, endpoint, http.path)
        call = _Call(asked, context, latencies, loop)
        try:
            await self._answer(http, call, target, record)
        except StatorError as error:
            other = self._target_after(error, targets, endpoint, target) if record.first_token_at is None else None
            if other is None:
                raise self._of_all_models(asked.named(error), request.model) from None
            logger.warning("request %s goes to another Processor: %s", http.call_id, error.message)
            await self._answer(http, call, other, record)

    async def _serve_unary(self, http: HttpExchange, unary: Unary, record: _Record) -> None:
        self._admit()
        endpoint = unary.label
        body = await http.read_body(self._settings.max_body_bytes, self._settings.receive_timeout_s)
        request = unary.request(body, self._models, http.call_id)
        record.model = self._label(request.model or OTHER)
        context = self._context(http, record.started)
        targets = self._serving(request.model)
        target = self._target(targets, endpoint, http.path)
        try:
            answered = await unary.answer(http, self._client, target, request, context)
        except StatorError as error:
            if error.code is ErrorCode.NOT_FOUND:
                raise not_served(http.path) from error
            other = self._target_after(error, targets, endpoint, target)
            if other is None:
                raise self._of_all_models(error, request.model or "") from None
            answered = await unary.answer(http, self._client, other, request, context)
        record.status, record.ending, record.usage = 200, Ending.STOP, answered.usage
        await http.respond(200, answered.body)

    async def _answer(self, http: HttpExchange, call: "_Call", target: Target, record: _Record) -> None:
        settings = self._settings
        stream = DeltaStream(
            settings.max_buffered_deltas, call.latencies, call.loop, max_paused_s=settings.slow_reader_timeout_s
        )
        request = call.asked.request
        stream.attach(self._client.open(target, request, stream, context=call.context, item_type=CompletionDelta))
        self._streams[stream] = None
        watcher: asyncio.Task[None] | None = None
        if http.pipe is not None:
            http.pipe.on_leave(stream.client_gone)
        else:
            watcher = call.loop.create_task(_watch_disconnect(http.receive, stream))
        try:
            if call.asked.streams:
                await self._answer_stream(http, call.asked, stream, record)
            else:
                await self._answer_whole(http, call.asked, stream, record)
        finally:
            stream.close()
            self._streams.pop(stream, None)
            record.num_tokens = stream.num_tokens
            record.first_token_at = stream.first_token_at
            if http.pipe is not None:
                http.pipe.on_leave(None)
            if watcher is not None:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)

    def _label(self, model: str) -> str:
        """A model's name for metrics and log, if it is one that is or was served."""
        if model not in self._labels:
            self._labels = frozenset(card.id for card in self._models())
        return model if model in self._labels else OTHER

    def _of_all_models(self, error: StatorError, model: str) -> StatorError:
        """A Processor that does not know a model knows its own ones alone."""
        if error.code is not ErrorCode.MODEL_NOT_FOUND or self._of_model is None:
            return error
        served = ", ".join(card.id for card in self._models()) or "none"
        message = f"The model {model!r} does not exist. Models served here: {served}."
        return StatorError(ErrorCode.MODEL_NOT_FOUND, message, param="model")

    def _serving(self, model: str | None) -> Targets:
        """None: a request that names no model goes to our own namespace."""
        return self._targets if self._of_model is None or model is None else self._of_model(model)

    def _target(self, serving: Targets, endpoint: str, path: str) -> Target:
        targets = serving(endpoint)
        if not targets:
            if endpoint != CHAT and serving(CHAT):
                raise not_served(path)
            raise StatorError(ErrorCode.NO_INSTANCE, "No Processor is ready to take the request.", retry_after_s=1.0)
        self._turn += 1
        return targets[self._turn % len(targets)]

    def _target_after(self, error: StatorError, serving: Targets, endpoint: str, failed: Target) -> Target | None:
        """Another Processor, if the first one left before it had answered anything."""
        if error.code not in _PROCESSOR_LEFT or self.draining:
            return None
        others = [target for target in serving(endpoint) if target.instance_id != failed.instance_id]
        return others[self._turn % len(others)] if others else None

    def _context(self, http: HttpExchange, started: float) -> CallContext:
        headers: dict[str, str] = {}
        for raw_name in CARRIED_HEADERS.keys() & http.headers.keys():
            value = http.headers[raw_name]
            if len(value) <= MAX_CARRIED_HEADER_BYTES:
                headers[CARRIED_HEADERS[raw_name]] = value.decode("latin-1")
        return CallContext(RequestId(http.call_id), started + self._timeout_s(http), headers)

    def _timeout_s(self, http: HttpExchange) -> float:
        given = http.headers.get(TIMEOUT_HEADER)
        if given is None:
            return self._settings.default_deadline_s
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            name = TIMEOUT_HEADER.decode("ascii")
            raise StatorError(
                ErrorCode.INVALID_REQUEST, f"The header {name} must be a positive number of seconds.", param=name
            )
        return min(seconds, self._settings.max_deadline_s)

    async def _answer_stream(self, http: HttpExchange, asked: Asked, stream: DeltaStream, record: _Record) -> None:
        deltas = await stream.batch()
        if not deltas:
            raise _unfinished()
        encoder = asked.stream_encoder(http.call_id, int(self._wall()), deltas[0])
        last = deltas[-1]
        if last.ending is not None and asked.num_choices == 1:
            _usage(last, may_be_empty=asked.may_be_empty)
        await http.start_events(encoder.opening() + encoder.encode(deltas), _explanation(deltas[0]), encoder.failure)
        events = b""
        write = None if http.pipe is None else _writer(encoder, http.pipe)
        while not stream.complete:
            if events:
                await http.send_events(events)
                events = b""
            deltas = await stream.batch(write)
            if deltas:
                last = deltas[-1]
                events = encoder.encode(deltas)
        _finish(record, last, may_be_empty=asked.may_be_empty)
        await http.finish_events(events + encoder.closing())

    async def _answer_whole(self, http: HttpExchange, asked: Asked, stream: DeltaStream, record: _Record) -> None:
        deltas = await stream.batch()
        if not deltas:
            raise _unfinished()
        answer = asked.whole_encoder(http.call_id, int(self._wall()), deltas[0])
        last = deltas[-1]
        explanation = _explanation(deltas[0])
        while deltas:
            answer.add(deltas)
            last = deltas[-1]
            deltas = await stream.batch()
        usage = _finish(record, last, may_be_empty=asked.may_be_empty)
        await http.respond(200, answer.encode(usage), headers=explanation)

    def _account(self, http: HttpExchange, record: _Record, now: float) -> None:
        metrics, labels = self._metrics, (record.model, record.endpoint)
        metrics.counter("requests_total", *labels, str(record.status)).inc()
        metrics.histogram("request_duration_seconds", *labels).observe(now - record.started)
        if record.error is not None and record.ending is Ending.REJECTED:
            metrics.counter("rejected_total", record.error.value).inc()
        if record.first_token_at is not None:
            metrics.histogram("time_to_first_token_seconds", *labels).observe(record.first_token_at - record.started)
        usage = record.usage
        if usage is not None and record.generates:
            metrics.histogram("request_input_tokens", *labels).observe(usage.prompt_tokens)
            metrics.histogram("request_output_tokens", *labels).observe(usage.completion_tokens)
            metrics.histogram("request_cached_tokens", *labels).observe(usage.prompt_tokens_details.cached_tokens)
        if access_log.is_enabled():
            access_log.log(_access_line(http, record, now))


def _access_line(http: HttpExchange, record: _Record, now: float) -> str:
    usage, ended = record.usage, record.ending.value if record.error is None else record.error.value
    tokens_in, cached = "-", "-"
    if usage is not None:
        tokens_in, cached = str(usage.prompt_tokens), str(usage.prompt_tokens_details.cached_tokens)
    ttft = "-" if record.first_token_at is None else f"{(record.first_token_at - record.started) * 1e3:.1f}"
    return (
        f"{record.endpoint} {http.call_id} {record.status} {ended} model={record.model} stream={record.streamed:d} "
        f"in={tokens_in} out={record.num_tokens} cached={cached} ttft_ms={ttft} "
        f"ms={(now - record.started) * 1e3:.1f}"
    )


def _explanation(first: CompletionDelta) -> Headers:
    """Headers that say where a request went and why, if it asked for them."""
    if first.cost_ms is None:
        return ()
    return (
        (b"x-stator-instance", str(first.instance_id).encode("ascii", "replace")),
        (b"x-stator-overlap-blocks", b"%d" % (first.overlap_blocks or 0)),
        (b"x-stator-cost-ms", b"%.3f" % first.cost_ms),
        (b"x-stator-phases", ", ".join(f"{name}={ms:.3f}" for name, ms in (first.phases_ms or {}).items()).encode()),
    )


def _writer(encoder: StreamEncoder, pipe: Pipe) -> Write:
    """From the sink to the socket without a task in between."""

    def write(deltas: Sequence[CompletionDelta]) -> bool:
        if deltas[-1].ending is not None:
            # The stream's end follows, and goes out with these.
            return False
        events = encoder.encode(deltas)
        return not events or pipe.write_events(events)

    return write


async def _watch_disconnect(receive: Receive, stream: DeltaStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.client_gone()


def _unfinished() -> StatorError:
    logger.error("a Processor ended a stream without saying how it ended, or without a token")
    return internal_error()


def _finish(record: _Record, last: CompletionDelta, *, may_be_empty: bool = False) -> Usage:
    """The usage of a stream that ended well. Raises INTERNAL if the Processor did not say how it ended."""
    usage = _usage(last, may_be_empty=may_be_empty)
    assert last.ending is not None
    record.ending = last.ending
    record.usage = usage
    record.status = 200
    return usage


def _usage(last: CompletionDelta, *, may_be_empty: bool = False) -> Usage:
    """An ending without usage, or without a single token, is none: the client would get an empty 200."""
    if last.ending is None or last.usage is None or not (last.usage.completion_tokens or may_be_empty):
        raise _unfinished()
    return last.usage
