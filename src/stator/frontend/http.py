"""One HTTP request and its answer over ASGI: body, ids, headers, OpenAI's error body."""

import asyncio
import logging
import math
import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from stator.core.public_errors import TOLD, told
from stator.errors import Ending, ErrorCode, StatorError
from stator.frontend.bodies import Bodies
from stator.messages.openai import ErrorBody, ErrorResponse

logger = logging.getLogger(__name__)

Scope = Mapping[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]
T = TypeVar("T")

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
DEFAULT_RETRY_AFTER_S = 1.0
_EVENT_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
DISCARD_FACTOR = 4
"""A body that is too large is read on for so many times the bound, so that its sender gets to read why."""

MAX_LENGTH_DIGITS = 18
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_CLOSES = frozenset({ErrorCode.BODY_TOO_LARGE, ErrorCode.REQUEST_TIMEOUT})

encode_json = msgspec.json.Encoder().encode

Failure = Callable[[StatorError], bytes]
"""The events with which a stream that has begun tells its failure."""


PIPE = "stator.pipe"
"""The ASGI extension under which a server offers a Pipe."""


class Pipe(Protocol):
    """The connection behind a request, for what ASGI makes dear: all of it is called from the event loop, and acts
    on the request that is being answered. Optional; without it the same goes over `receive` and `send`."""

    def whole_body(self) -> bytes | None:
        """The body if all of it is here and nothing of it was received; it is then taken."""
        ...

    def write_whole(self, status: int, headers: Headers, body: bytes) -> bool:
        """Send a whole answer at once; headers include content-length. False, with nothing done, if that would have to
        wait or an answer has begun."""
        ...

    def begin_events(self, headers: Headers, events: bytes) -> bool:
        """Send the head (status 200) and the first part of a streamed answer at once. False as for write_whole."""
        ...

    def write_events(self, events: bytes) -> bool:
        """Send a part of a streamed answer that has begun. False, with nothing done, if that would have to wait."""
        ...

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        """Called once if the client leaves before its answer is complete; at once if it has left."""
        ...


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


def fresh_id(rng: random.Random) -> str:
    return f"{rng.getrandbits(96):024x}"


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """How an API tells a failure: its HTTP status, and its body, given the request's id. id_header: one more that has
    the request's id, in all answers."""

    status: Callable[[StatorError], int]
    body: Callable[[StatorError, str], bytes]
    id_header: bytes | None = None


def error_json(error: StatorError) -> bytes:
    body = ErrorBody(message=error.message, type=error.info.openai_type, param=error.param, code=error.code.value)
    return encode_json(ErrorResponse(body))


def error_event(error: StatorError) -> bytes:
    return b"data: " + error_json(error) + b"\n\n"


OPENAI_ERRORS = ErrorForm(lambda error: error.info.status, lambda error, request_id: error_json(error))


def retry_after_s(error: StatorError) -> int | None:
    """Whole seconds, at least one; None when a retry is not known to help."""
    seconds = error.retry_after_s
    if seconds is None and error.info.ending is Ending.REJECTED:
        seconds = DEFAULT_RETRY_AFTER_S
    return None if seconds is None else max(1, math.ceil(seconds))


def internal_error() -> StatorError:
    return StatorError(ErrorCode.INTERNAL, TOLD[ErrorCode.INTERNAL])


class HttpExchange:
    """request_id: what the client sent as x-request-id, or ours; every answer carries it.

    call_id: unique in the deployment, because a client may send one x-request-id many times; it begins with it.
    errors: how failures are told before an answer has begun; may be set. bodies: what those of all exchanges may take
    together. To be closed at the end of the request.
    """

    __slots__ = (
        "_bodies",
        "_failure",
        "_held",
        "_send",
        "_started",
        "call_id",
        "errors",
        "headers",
        "method",
        "path",
        "pipe",
        "query",
        "receive",
        "request_id",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, rng: random.Random, bodies: Bodies | None = None
    ) -> None:
        self._bodies = bodies
        self._held = 0
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.receive = receive
        self.pipe: Pipe | None = scope.get("extensions", {}).get(PIPE)
        self._send = send
        self._started = False
        self._failure: Failure | None = None
        self.errors = OPENAI_ERRORS
        given = self.headers.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            self.request_id = given.decode("ascii")
            self.call_id = f"{self.request_id}-{rng.getrandbits(32):08x}"
        else:
            self.request_id = self.call_id = fresh_id(rng)

    async def respond(self, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()) -> None:
        length = (b"content-length", b"%d" % len(body))
        if self.pipe is not None and self.pipe.write_whole(
            status, (*self._identity(content_type), length, *headers), body
        ):
            self._started = True
            return
        await self._start(status, content_type, length, *headers)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def start_events(self, events: bytes, headers: Headers = (), failure: Failure = error_event) -> None:
        """Begin a stream of server-sent events with the first of them. Proxies are told not to collect it."""
        self._failure = failure
        extra = (*_EVENT_HEADERS, *headers)
        if self.pipe is not None and self.pipe.begin_events((*self._identity(EVENT_STREAM), *extra), events):
            self._started = True
            return
        await self._start(200, EVENT_STREAM, *extra)
        await self.send_events(events)

    async def send_events(self, events: bytes) -> None:
        """Waits while the client does not read."""
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def finish_events(self, events: bytes) -> None:
        await self._send({"type": "http.response.body", "body": events, "more_body": False})

    async def fail(self, error: StatorError, headers: Headers = ()) -> None:
        """Answer with the error, as clients may see it; in a stream that has begun, as its last event."""
        public = told(error)
        if public is not error:
            logger.warning("request %s failed: %s: %s", self.call_id, error.code.value, error.message)
            error = public
        if self._failure is not None and self._started:
            await self.finish_events(self._failure(error))
            return
        extra = list(headers)
        seconds = retry_after_s(error)
        if seconds is not None:
            extra.append((b"retry-after", str(seconds).encode("ascii")))
        if error.code is ErrorCode.POISON_REQUEST:
            # Clients that repeat every 5xx by themselves would have it crash more engines; some of them heed this.
            extra.append((b"x-should-retry", b"false"))
        if error.code in _CLOSES:
            extra.append((b"connection", b"close"))
        await self.respond(self.errors.status(error), self.errors.body(error, self.request_id), headers=extra)

    async def _start(self, status: int, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        self._started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*self._identity(content_type), *headers],
            }
        )

    def _identity(self, content_type: bytes) -> tuple[tuple[bytes, bytes], ...]:
        request_id = self.request_id.encode("ascii")
        told = (b"content-type", content_type), (b"x-request-id", request_id)
        id_header = self.errors.id_header
        return told if id_header is None else (*told, (id_header, request_id))

    async def read_body(self, max_bytes: int, timeout_s: float) -> bytes:
        """Raises StatorError(BODY_TOO_LARGE or REQUEST_TIMEOUT), or ClientGone."""
        if self._declared_bytes() > max_bytes and b"expect" in self.headers:
            # The client waits for leave to send. Reading would grant it.
            raise _too_large(max_bytes)
        if self.pipe is not None and (whole := self.pipe.whole_body()) is not None:
            if len(whole) > max_bytes:
                raise _too_large(max_bytes)
            self._hold(len(whole))
            return whole
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                if self._bodies is not None:
                    self._bodies.arrives(deadline, asyncio.get_running_loop().time())
                body = await self._collect(max_bytes)
        except TimeoutError:
            raise StatorError(
                ErrorCode.REQUEST_TIMEOUT,
                f"The request body did not arrive within {timeout_s:g} seconds, or before too many others.",
            ) from None
        finally:
            if self._bodies is not None:
                self._bodies.arrived(deadline)
        if body is None:
            raise _too_large(max_bytes)
        return body

    def _hold(self, num_bytes: int) -> None:
        if self._bodies is None:
            return
        held = self._bodies.hold(num_bytes, self._held)
        if held is None:
            raise StatorError(
                ErrorCode.OVERLOADED,
                "This server has as many bytes of requests open as it may; try later, or send a smaller request.",
                retry_after_s=1.0,
            )
        self._held = held

    def close(self) -> None:
        """Let others have the room of this request's body. Idempotent."""
        if self._bodies is not None and self._held:
            self._bodies.release(self._held)
            self._held = 0

    def _declared_bytes(self) -> int:
        declared = self.headers.get(b"content-length", b"0")
        return int(declared) if declared.isdigit() and len(declared) <= MAX_LENGTH_DIGITS else 0

    async def _collect(self, max_bytes: int) -> bytes | None:
        """The body, or None when it is larger than max_bytes. What was sent decides, not what was declared."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            size += len(part)
            if size <= max_bytes:
                self._hold(size)
                parts.append(part)
            else:
                parts.clear()
                self.close()
            more: bool = message.get("more_body", False)
            if not more or size > max_bytes * DISCARD_FACTOR:
                return b"".join(parts) if size <= max_bytes else None


async def unless_gone(http: HttpExchange, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. When the client leaves before, the work is cancelled; raises ClientGone."""
    task = asyncio.get_running_loop().create_task(work)
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    watcher: asyncio.Task[None] | None = None
    if http.pipe is not None:
        http.pipe.on_leave(leave)
    else:
        watcher = asyncio.get_running_loop().create_task(_watch(http.receive, leave))
    try:
        return await task
    except asyncio.CancelledError:
        if gone and task.cancelled():
            raise ClientGone from None
        raise
    finally:
        if http.pipe is not None:
            http.pipe.on_leave(None)
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)


async def _watch(receive: Receive, leave: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


def _too_large(max_bytes: int) -> StatorError:
    return StatorError(ErrorCode.BODY_TOO_LARGE, f"The request body is larger than the limit of {max_bytes} bytes.")
