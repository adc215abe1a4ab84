"""The load client of hot_path.py: many HTTP connections in one process, bytes in and bytes out, nothing decoded.

Jobs come as lines of JSON on standard input and are answered by a line with what was seen.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import uvloop
from prompts import PROMPTS

HOST = "127.0.0.1"
NUM_PROMPTS = 4096


@dataclass(frozen=True)
class Job:
    """connections send one request after the other until seconds have passed (0: each sends one).

    hold: with streams, only open them all, say "open" when each has its first token, and read them to their end.
    fields: more of each request's body.
    """

    port: int
    model: str
    prompts: str
    prompt_length: int
    stream: bool
    max_tokens: int
    connections: int
    seconds: float
    hold: bool = False
    seed: int = 0
    fields: dict[str, object] = field(default_factory=dict[str, object])

    def request(self, prompt: str) -> bytes:
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "stream": self.stream,
                "max_tokens": self.max_tokens,
                **self.fields,
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}:{self.port}\r\naccept: */*\r\n"
            f"user-agent: hot-path\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Seen:
    def __init__(self) -> None:
        self.requests = 0
        self.reads = 0
        self.events = 0
        self.bytes = 0
        self.first_s: list[float] = []
        self.total_s: list[float] = []
        self.gaps_s: list[float] = []


class Connection(asyncio.Protocol):
    def __init__(self, job: Job, seen: Seen, stop_at: float, requests: Iterator[bytes]) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        self.first: asyncio.Future[None] = loop.create_future()
        self._job = job
        self._seen = seen
        self._stop_at = stop_at
        self._requests = requests
        # The last chunk; or the end of a body with a length, which is far smaller than a segment.
        self._closing = (b"\r\n0\r\n\r\n",) if job.stream else (b"}", b"\r\n0\r\n\r\n")
        self._tail = b""
        self._sent_at = self._last_at = 0.0
        self._started = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._tail = b""
        self._started = False
        request = next(self._requests)
        self._sent_at = time.perf_counter()
        self._transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        seen = self._seen
        seen.reads += 1
        seen.bytes += len(data)
        if not self._started:
            self._started = True
            if not data.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(data.decode(errors="replace"))
            seen.first_s.append(now - self._sent_at)
            if not self.first.done():
                self.first.set_result(None)
        elif len(seen.gaps_s) < 200_000:
            seen.gaps_s.append(now - self._last_at)
        self._last_at = now
        seen.events += data.count(b'{"content":"')
        self._tail = data[-64:] if len(data) >= 64 else (self._tail + data)[-64:]
        if self._tail.endswith(self._closing):
            seen.requests += 1
            seen.total_s.append(now - self._sent_at)
            if now < self._stop_at:
                self._send()
            else:
                self._transport.close()
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError(f"the server closed the connection: {self._tail!r}"))


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


async def run_job(job: Job) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    seen = Seen()
    made: list[Connection] = []
    # Made before the clock starts; more than the frontend's or a worker's cache of prompts holds.
    prompts = PROMPTS[job.prompts](Random(job.seed), job.prompt_length)
    requests = itertools.cycle([job.request(next(prompts)) for _ in range(max(NUM_PROMPTS, job.connections))])
    started = time.perf_counter()
    stop_at = started + job.seconds
    for _ in range(job.connections):
        connection = Connection(job, seen, stop_at, requests)
        made.append(connection)
        await loop.create_connection(lambda connection=connection: connection, HOST, job.port)
    if job.hold:
        await asyncio.gather(*(each.first for each in made))
        print("open", flush=True)
    await asyncio.gather(*(each.done for each in made))
    return {
        "requests": seen.requests,
        "tokens": seen.requests * job.max_tokens,
        "events": seen.events,
        "reads": seen.reads,
        "wall_s": time.perf_counter() - started,
        "first_p50_ms": quantile(seen.first_s, 0.5) * 1e3,
        "first_p99_ms": quantile(seen.first_s, 0.99) * 1e3,
        "total_p50_ms": quantile(seen.total_s, 0.5) * 1e3,
        "gap_p99_ms": quantile(seen.gaps_s, 0.99) * 1e3,
    }


def main() -> None:
    for line in sys.stdin:
        result = uvloop.run(run_job(Job(**json.loads(line))))
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
