"""Streams of chat completions whose every chunk is timed, for tests that break something while they run."""

import asyncio
import json
import socket
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from yarl import URL

STORIES = ("fox", "moon", "king", "ship", "owl", "lamb", "crown", "bell")
SLOW_READ_BYTES = 4096
POISON = "☠☠☠☠"
LONG = "In the beginning God created the heaven and the earth. And the earth was without form, and void. " * 24

Body = dict[str, Any]


def story(number: int, *, max_tokens: int = 250, **more: Any) -> Body:
    """A short prompt with a long answer; every fourth is sampled with a seed and every fifth has a stop string."""
    text = f"Tell me story number {number} about a {STORIES[number % len(STORIES)]} and the 🌙."
    sampled: Body = {"temperature": 0.7, "seed": number} if number % 4 == 3 else {"temperature": 0}
    stop: Body = {"stop": ["\x00never\x00"]} if number % 5 == 4 else {}
    return _body(text, max_tokens=max_tokens, ignore_eos=True, **sampled, **stop, **more)


def stories(num: int, **more: Any) -> list[Body]:
    return [story(number, **more) for number in range(num)]


def long_prompts(num: int, salt: str, **more: Any) -> list[Body]:
    return [long_prompt(number, cache_salt=salt, **more) for number in range(num)]


def long_prompt(number: int, *, max_tokens: int = 24, **more: Any) -> Body:
    """A prompt of about 600 tokens that shares no block with another's."""
    text = f"Story number {number}. {LONG} Tell me what happened then."
    return _body(text, max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)


def poisonous() -> Body:
    """What the faulty graph's engines crash of."""
    return _body(f"Tell me about the {POISON}.", max_tokens=20, temperature=0)


def _body(text: str, **more: Any) -> Body:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": "tiny-llama", "messages": [{"role": "user", "content": text}], **options, **more}


def key_of(body: Body) -> str:
    """Of what decides on the text."""
    return json.dumps({name: value for name, value in body.items() if name != "cache_salt"}, sort_keys=True)


@dataclass(eq=False)
class Stream:
    """One request as its client saw it. Times are the loop's. chunk_times: of chunks with text."""

    body: Body
    sent: float
    status: int | None = None
    text: str = ""
    chunk_times: list[float] = field(default_factory=list[float])
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    errors: list[Any] = field(default_factory=list[Any])
    num_done: int = 0
    retry_after: str | None = None
    ended: float | None = None
    has_text: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def completed(self) -> bool:
        return self.status == 200 and not self.errors and self.num_done == 1 and self.finish_reason is not None

    @property
    def failed_cleanly(self) -> bool:
        """One error that a program can read: an HTTP status, or one event in the stream and no [DONE] behind it."""
        if self.status is None or len(self.errors) != 1 or not isinstance(self.errors[0], dict):
            return False
        return self.status >= 400 or not self.num_done

    @property
    def num_tokens(self) -> int:
        """Of the answer, as the usage says."""
        return self.usage["completion_tokens"] if self.usage else 0

    @property
    def num_cached(self) -> int:
        """Prompt tokens that were found in a cache."""
        details = (self.usage or {}).get("prompt_tokens_details") or {}
        return details.get("cached_tokens") or 0

    def gap_s(self, since: float) -> float:
        """The longest silence that a reader of this stream saw after `since`, or around it."""
        times = [self.sent, *self.chunk_times]
        return max((b - a for a, b in zip(times, times[1:], strict=False) if b >= since), default=0.0)


class Load:
    """Sends requests to one address and owns them until `close`."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/chat/completions"
        timeout = aiohttp.ClientTimeout(total=120)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        self._tasks: dict[Stream, asyncio.Task[None]] = {}

    def start(self, bodies: list[Body]) -> list[Stream]:
        loop = asyncio.get_running_loop()
        streams = [Stream(body, loop.time()) for body in bodies]
        for stream in streams:
            self._tasks[stream] = loop.create_task(self._run(stream))
        return streams

    def start_slow(self, body: Body, *, bytes_per_s: float) -> Stream:
        """A client that takes its answer so slowly, and whose system keeps little of it."""
        loop = asyncio.get_running_loop()
        stream = Stream(body, loop.time())
        self._tasks[stream] = loop.create_task(self._read_slowly(stream, bytes_per_s))
        return stream

    async def streaming(self, streams: list[Stream]) -> None:
        """Until each of them has text, or has ended."""
        async with asyncio.timeout(90):
            for stream in streams:
                has_text = asyncio.ensure_future(stream.has_text.wait())
                await asyncio.wait([has_text, self._tasks[stream]], return_when=asyncio.FIRST_COMPLETED)
                has_text.cancel()

    async def finish(self, streams: list[Stream]) -> list[Stream]:
        await asyncio.gather(*(self._tasks[stream] for stream in streams))
        return streams

    async def send(self, bodies: list[Body]) -> list[Stream]:
        return await self.finish(self.start(bodies))

    async def disconnect(self, streams: list[Stream]) -> None:
        """Close their connections, as a client that has gone does."""
        tasks = [self._tasks[stream] for stream in streams]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_open(self) -> int:
        return sum(not task.done() for task in self._tasks.values())

    async def close(self) -> None:
        await self.disconnect(list(self._tasks))
        await self._session.close()

    async def _run(self, stream: Stream) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with self._session.post(self._url, json=stream.body) as response:
                stream.status = response.status
                stream.retry_after = response.headers.get("retry-after")
                if response.status != 200:
                    stream.errors.append((await response.json())["error"])
                    return
                async for line in response.content:
                    if line.startswith(b"data: "):
                        self._take(stream, line[6:].strip(), loop.time())
        except (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError) as error:
            stream.errors.append(repr(error))
        finally:
            stream.ended = loop.time()

    async def _read_slowly(self, stream: Stream, bytes_per_s: float) -> None:
        loop = asyncio.get_running_loop()
        host, port = URL(self._url).host or "", URL(self._url).port or 80
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_READ_BYTES)
        connection.setblocking(False)
        body = json.dumps(stream.body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
        try:
            await loop.sock_connect(connection, (host, port))
            await loop.sock_sendall(connection, head.encode() + body)
            answer = b""
            while data := await loop.sock_recv(connection, SLOW_READ_BYTES // 4):
                answer += data
                turn = asyncio.Event()
                loop.call_later(len(data) / bytes_per_s, turn.set)
                await turn.wait()
        finally:
            connection.close()
            stream.ended = loop.time()
        status, _, rest = answer.partition(b"\r\n\r\n")
        stream.status = int(status.split()[1])
        for line in _unchunked(rest).split(b"\n"):
            if line.startswith(b"data: "):
                self._take(stream, line[6:].strip(), stream.ended)

    def _take(self, stream: Stream, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            stream.num_done += 1
            return
        event = json.loads(data)
        if "error" in event:
            stream.errors.append(event["error"])
            return
        if stream.num_done:
            stream.errors.append("data after [DONE]")
        stream.usage = event.get("usage") or stream.usage
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                if stream.finish_reason is not None:
                    stream.errors.append("text after the end")
                stream.text += text
                stream.chunk_times.append(now)
                stream.has_text.set()
            if choice["finish_reason"]:
                if stream.finish_reason is not None:
                    stream.errors.append("two endings")
                stream.finish_reason = choice["finish_reason"]


def _unchunked(data: bytes) -> bytes:
    """The body of a response with chunked transfer encoding."""
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        num = int(size, 16)
        body, data = body + data[:num], data[num + 2 :]
    return body
