"""HTTP clients of the simulated frontend: they read slowly, leave early, and hold the server to HTTP and to SSE."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httptools
import msgspec

CONNECT_RETRY_S = 0.25
CONNECT_FOR_S = 20.0

_DATA = b"data: "
_DONE = b"[DONE]"


@dataclass(slots=True)
class Manners:
    """How a client behaves. leave_after_s, leave_after_events: hangs up then, counted from when its request was sent.
    pause_every: reads nothing for pause_s after each so many pieces that it read; 0: never."""

    leave_after_s: float | None = None
    leave_after_events: int | None = None
    pause_every: int = 0
    pause_s: float = 0.0


@dataclass(slots=True)
class Answer:
    """What one client got. complete: the answer ended as HTTP and SSE say it must. error: the code of an error body or
    event. problems: what no server may do, whatever happened to it."""

    started_at: float = 0.0
    ended_at: float | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: str | None = None
    message: str = ""
    done: bool = False
    complete: bool = False
    left: bool = False
    lost: str | None = None
    num_events: int = 0
    problems: list[str] = field(default_factory=list[str])


class _Connection(asyncio.Protocol):
    """One request on one connection."""

    def __init__(self, answer: Answer, manners: Manners, request: bytes) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answer = answer
        self._manners = manners
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._num_pieces = 0
        self._is_events = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._answer.complete:
            self._answer.problems.append(f"{len(data)} bytes after the end of the answer")
            return
        self._parser.feed_data(data)
        self._num_pieces += 1
        manners = self._manners
        if manners.pause_every and self._num_pieces % manners.pause_every == 0 and self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(manners.pause_s, self._transport.resume_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        answer = self._answer
        if not answer.complete and not answer.left:
            answer.lost = str(exc or "the server closed the connection")
        if not self.closed.done():
            self.closed.set_result(None)

    def leave(self) -> None:
        if not self._answer.complete and self._transport is not None and not self._transport.is_closing():
            self._answer.left = True
            self._transport.abort()

    # httptools.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self._is_events = self._answer.headers.get("content-type", "").startswith("text/event-stream")

    def on_body(self, body: bytes) -> None:
        self._body += body
        while self._is_events and (end := self._body.find(b"\n\n")) >= 0:
            event = bytes(self._body[:end])
            del self._body[: end + 2]
            self._event(event)

    def on_message_complete(self) -> None:
        answer = self._answer
        answer.complete = True
        if not self._is_events:
            self._whole(bytes(self._body))
        elif self._body:
            answer.problems.append(f"the stream ends inside an event: {bytes(self._body[:80])!r}")
        elif answer.done == (answer.error is not None):
            answer.problems.append("a stream must end with [DONE] or with an error, and not with both")
        if self._transport is not None:
            self._transport.close()

    def _event(self, event: bytes) -> None:
        answer = self._answer
        answer.num_events += 1
        if answer.done or answer.error is not None:
            answer.problems.append(f"an event after the last: {event[:80]!r}")
        elif not event.startswith(_DATA):
            answer.problems.append(f"not an event: {event[:80]!r}")
        elif event[len(_DATA) :] == _DONE:
            answer.done = True
        else:
            self._chunk(msgspec.json.decode(event[len(_DATA) :]))
        if answer.num_events == self._manners.leave_after_events:
            self.leave()

    def _chunk(self, chunk: Any) -> None:
        answer = self._answer
        if "error" in chunk:
            answer.error, answer.message = str(chunk["error"]["code"]), str(chunk["error"]["message"])
            return
        if chunk.get("usage") is not None:
            answer.usage = chunk["usage"]
        for choice in chunk["choices"]:
            text = str(choice["delta"].get("content", "") if "delta" in choice else choice["text"])
            if text and answer.finish_reason is not None:
                answer.problems.append(f"text after the finish reason: {text[:40]!r}")
            answer.text += text
            if choice["finish_reason"] is not None:
                if answer.finish_reason is not None:
                    answer.problems.append("two finish reasons")
                answer.finish_reason = str(choice["finish_reason"])

    def _whole(self, body: bytes) -> None:
        answer = self._answer
        found = msgspec.json.decode(body) if body else {}
        if "error" in found:
            answer.error, answer.message = str(found["error"]["code"]), str(found["error"]["message"])
            return
        choice = found["choices"][0]
        answer.text = str(choice["message"]["content"] if "message" in choice else choice["text"])
        answer.finish_reason = str(choice["finish_reason"])
        answer.usage = found["usage"]
        answer.done = True


async def ask(
    address: tuple[str, int], path: str, body: bytes, headers: dict[str, str], manners: Manners, answer: Answer
) -> None:
    """Fill `answer`. A frontend that does not accept connections is tried again for a while, as clients do."""
    loop = asyncio.get_running_loop()
    answer.started_at = loop.time()
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nhost: sim\r\ncontent-length: {len(body)}\r\n{lines}\r\n"
    try:
        while True:
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(answer, manners, head.encode() + body), *address
                )
                break
            except OSError as error:
                if loop.time() - answer.started_at > CONNECT_FOR_S:
                    answer.lost = f"could not connect: {error}"
                    return
                await asyncio.sleep(CONNECT_RETRY_S)
        leaving = None
        if manners.leave_after_s is not None:
            leaving = loop.call_later(manners.leave_after_s, connection.leave)
        await connection.closed
        if leaving is not None:
            leaving.cancel()
    finally:
        answer.ended_at = loop.time()
