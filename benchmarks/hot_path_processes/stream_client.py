"""Load for over_vllm.py: streamed chat requests over raw HTTP connections, and when each piece of text arrived.

The prompts are a JSON list in the file that is the only argument. Jobs come as lines of JSON on standard input and are
answered by a line with what was seen. Server-sent events are told apart, but not decoded.
"""

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop
from client import HOST, Job

TEXT, NO_TEXT, FULL_LENGTH = b'"content":"', b'"content":""', b'"finish_reason":"length"'


@dataclass
class Seen:
    """Times in seconds. gaps_s: between events with text of one stream. token_s: of each stream, per token after the
    first."""

    requests: int = 0
    text_events: int = 0
    ttft_s: list[float] = field(default_factory=list[float])
    gaps_s: list[float] = field(default_factory=list[float])
    token_s: list[float] = field(default_factory=list[float])


class Stream(asyncio.Protocol):
    """One connection, which sends a request after the other until `stop_at`."""

    def __init__(self, requests: Iterator[bytes], num_tokens: int, seen: Seen, stop_at: float) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._num_tokens = num_tokens
        self._seen = seen
        self._stop_at = stop_at

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._rest = b""
        self._arrivals: list[float] = []
        self._status_known = self._full_length = self._told_done = False
        request = next(self._requests)
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self._take(data, now)
        except Exception as error:
            self._transport.abort()
            if not self.done.done():
                self.done.set_exception(error)

    def _take(self, data: bytes, now: float) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        if not self._status_known:
            start = events[0] if events else self._rest
            if len(start) >= 12:
                self._status_known = True
                if not start.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(f"the server answered: {start.decode(errors='replace')}")
        for event in events:
            if TEXT in event and NO_TEXT not in event:
                self._arrivals.append(now)
            # The last text may come in the event that ends the stream.
            if FULL_LENGTH in event:
                self._full_length = True
            elif b"data: [DONE]" in event:
                self._told_done = True
        if self._told_done and self._rest.endswith(b"0\r\n\r\n"):
            self._complete(now)

    def _complete(self, now: float) -> None:
        arrivals, seen = self._arrivals, self._seen
        if not self._full_length or not arrivals:
            raise RuntimeError("a stream ended without text or before max_tokens; it must ignore the end of sequence")
        seen.requests += 1
        seen.text_events += len(arrivals)
        seen.ttft_s.append(arrivals[0] - self._sent_at)
        seen.gaps_s += (later - earlier for earlier, later in itertools.pairwise(arrivals))
        seen.token_s.append((arrivals[-1] - arrivals[0]) / (self._num_tokens - 1))
        if now < self._stop_at:
            self._send()
        else:
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server closed the connection in a stream"))


async def run_job(prompts: list[str], job: dict[str, Any]) -> dict[str, float]:
    """job: port, model, first (index of the first prompt), connections, seconds, max_tokens, fields (of each body).

    Each connection finishes the request that it has open when the time is over.
    """
    seen = Seen()
    max_tokens, seconds = job["max_tokens"], job["seconds"]
    template = Job(
        job["port"], job["model"], "", 0, True, max_tokens, job["connections"], seconds, fields=job["fields"]
    )
    ordered = itertools.cycle([*prompts[job["first"] :], *prompts[: job["first"]]])
    requests = (template.request(prompt) for prompt in ordered)
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    streams = [Stream(requests, max_tokens, seen, started + seconds) for _ in range(job["connections"])]
    for stream in streams:
        await loop.create_connection(lambda stream=stream: stream, HOST, job["port"])
    await asyncio.gather(*(each.done for each in streams))
    wall_s = time.perf_counter() - started
    tokens = seen.requests * max_tokens
    return {
        "requests": seen.requests,
        "tokens": tokens,
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s,
        "ttft_ms": statistics.median(seen.ttft_s) * 1e3,
        "itl_ms": statistics.median(seen.gaps_s) * 1e3,
        "token_ms": statistics.median(seen.token_s) * 1e3,
        "events_per_token": seen.text_events / tokens,
    }


def main() -> None:
    prompts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for line in sys.stdin:
        print(json.dumps(uvloop.run(run_job(prompts, json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
