"""CPU microseconds of the Frontend per request and per streamed token.

A fake Processor answers in the same process over the in-process carrier; clients are bytes on loopback sockets, read
by a protocol that only counts, in a process of their own so that their time is not measured.

    python benchmarks/frontend.py [--quick]
"""

import argparse
import asyncio
import json
import logging
import random
import resource
import sys
from asyncio.subprocess import PIPE, Process

import uvloop

from stator.errors import Ending
from stator.frontend.app import FrontendApp
from stator.frontend.health import HealthReport
from stator.frontend.server import FrontendServer
from stator.messages.openai import ChatCompletionRequest, ModelCard, PromptTokensDetails, Usage
from stator.messages.processor import CompletionDelta
from stator.observability.metrics import Metrics
from stator.transport import (
    Call,
    Endpoint,
    Identity,
    InProcessNetwork,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    Target,
)

HOST = "127.0.0.1"
MODEL = "tiny"


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class FakeProcessor:
    """Answers with `max_tokens` tokens. All streams advance together, as an engine's step advances its batch."""

    def __init__(self) -> None:
        self._running: dict[Call, int] = {}
        self._stepping = False

    def handle(self, call: Call) -> None:
        self._running[call] = call.request.max_tokens
        if not self._stepping:
            self._stepping = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        for call, left in list(self._running.items()):
            if left > 1:
                call.items([CompletionDelta(" token", 1)])
                self._running[call] = left - 1
            else:
                usage = Usage(10, call.request.max_tokens, 10 + call.request.max_tokens, PromptTokensDetails(0))
                call.items([CompletionDelta(" end", 1, Ending.LENGTH, usage)])
                call.end()
                del self._running[call]
        self._stepping = bool(self._running)
        if self._stepping:
            asyncio.get_running_loop().call_later(0.002, self._step)


class CountingClient(asyncio.Protocol):
    """Sends its request num_requests times, one after the other, on one connection."""

    def __init__(self, request: bytes, closing: bytes, num_requests: int) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._request = request
        self._closing = closing
        self._left = num_requests
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._tail = (self._tail + data)[-64:]
        if not self._tail.endswith(self._closing):
            return
        self._tail = b""
        self._left -= 1
        if self._left:
            self._transport.write(self._request)
        else:
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server closed the connection"))


async def load(port: int, *, stream: bool, tokens: int, connections: int, requests: int) -> None:
    body = json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "hello"}],
            "stream": stream,
            "max_tokens": tokens,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    closing = b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b'"object":"chat.completion"}'
    clients: list[CountingClient] = []

    def client() -> CountingClient:
        clients.append(CountingClient(head.encode() + body, closing, requests))
        return clients[-1]

    for _ in range(connections):
        await asyncio.get_running_loop().create_connection(client, HOST, port)
    await asyncio.gather(*(each.done for each in clients))


def client_process(port: int) -> None:
    """Jobs come as lines of JSON; each is answered with a line when it is done."""
    for line in sys.stdin:
        asyncio.run(load(port, **json.loads(line)))
        print("done", flush=True)


async def measure(child: Process, **job: object) -> float:
    """CPU seconds of this process while the client process does a job."""
    assert child.stdin is not None and child.stdout is not None
    before = cpu_s()
    child.stdin.write(json.dumps(job).encode() + b"\n")
    if not await child.stdout.readline():
        raise RuntimeError("the client process failed")
    return cpu_s() - before


async def bench(quick: bool) -> None:
    network = InProcessNetwork()
    processor = RequestPlaneServer(Identity(), Listen(host=None, inproc_name="processor"), network=network)
    processor.register(Endpoint("chat", ChatCompletionRequest, FakeProcessor().handle))
    await processor.start()
    client = RequestPlaneClient(Identity(), network=network)
    app = FrontendApp(
        client=client,
        targets=lambda endpoint: [Target(processor.addresses, endpoint)],
        models=lambda: [ModelCard(MODEL, 0)],
        health=lambda: HealthReport(True, [], {}),
        metrics=Metrics(),
        rng=random.Random(0),
    )
    server = FrontendServer(app, host=HOST, port=0)
    await server.start()
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--client", str(server.port), stdin=PIPE, stdout=PIPE
    )
    requests, tokens, connections = (20, 200, 16) if quick else (100, 1000, 64)
    try:
        await measure(child, stream=False, tokens=1, connections=connections, requests=5)
        whole = await measure(child, stream=False, tokens=1, connections=connections, requests=requests)
        num = connections * requests
        print(f"request, not streamed, 1 token   {whole / num * 1e6:8.1f} us CPU  ({num} requests)")
        streamed = await measure(child, stream=True, tokens=tokens, connections=connections, requests=1)
        num = connections * tokens
        print(f"streamed token, {connections:3d} streams      {streamed / num * 1e6:8.1f} us CPU  ({num} tokens)")
        print("(the fake Processor, the in-process carrier and the socket writes are included)")
    finally:
        assert child.stdin is not None
        child.stdin.close()
        await child.wait()
        await server.stop()
        await client.close()
        await processor.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a second or two, to see that it runs")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("stator.frontend.access").setLevel(logging.WARNING)
    if options.client is not None:
        client_process(options.client)
    else:
        uvloop.run(bench(options.quick))


if __name__ == "__main__":
    main()
