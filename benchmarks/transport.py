"""CPU time of the request plane per streamed token, sender and receiver apart.

A server process pushes one token to each stream per step, as an engine does; this process receives them. Every step
leaves in one frame. Reported is process CPU time, system time included, divided by tokens.

    python benchmarks/transport.py [--quick]
"""

import argparse
import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from stator.errors import StatorError
from stator.ids import RequestId
from stator.messages.engine import TokenDelta
from stator.runtime.context import CallContext
from stator.transport import (
    Call,
    CallTasks,
    Endpoint,
    Identity,
    InProcessNetwork,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    Target,
    call,
)

CONTEXT = CallContext(RequestId("benchmark"))


class Usage(msgspec.Struct, frozen=True):
    cpu_s: float
    data_frames: int


class Steps:
    """Holds calls until there are as many as asked for, then steps all of them together."""

    def __init__(self, tasks: set[asyncio.Task[None]]) -> None:
        self._calls: list[Call] = []
        self._tasks = tasks

    def __call__(self, call: Call) -> None:
        self._calls.append(call)
        num_streams, num_steps = call.request
        if len(self._calls) == num_streams:
            calls, self._calls = self._calls, []
            self._tasks.add(asyncio.get_running_loop().create_task(self._step(calls, num_steps)))

    async def _step(self, calls: list[Call], num_steps: int) -> None:
        for step in range(num_steps):
            for each in calls:
                each.items([TokenDelta([1000 + step])])
            await calls[-1].writable()
        for each in calls:
            each.end()


class Count:
    """A sink that counts tokens, and says when the last of several streams has ended."""

    def __init__(self, num_streams: int) -> None:
        self.num_tokens = 0
        self._left = num_streams
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def items(self, items: Sequence[TokenDelta], /) -> None:
        for item in items:
            self.num_tokens += len(item.token_ids)

    def end(self, error: StatorError | None = None, /) -> None:
        self._left -= 1
        if error is not None and not self.done.done():
            self.done.set_exception(error)
        elif self._left == 0 and not self.done.done():
            self.done.set_result(None)


async def make_server(identity: Identity, listen: Listen, network: InProcessNetwork | None = None) -> Any:
    server = RequestPlaneServer(identity, listen, network=network)
    owner = CallTasks("benchmark")
    tasks: set[asyncio.Task[None]] = set()

    async def usage(_: Any, __: CallContext) -> Usage:
        return Usage(time.process_time(), server.stats.data_frames_sent)

    server.register(Endpoint("tokens", tuple[int, int], Steps(tasks)))
    server.register(owner.endpoint("usage", Any, usage))
    await server.start()
    return server, owner


async def serve(token: str) -> None:
    server, owner = await make_server(Identity(token=token), Listen())
    print(server.addresses[0], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close()
    await owner.close()


async def measure(client: RequestPlaneClient, addresses: tuple[str, ...], num_streams: int, num_steps: int) -> str:
    asked = Target(addresses, "usage")
    before: Usage = await call(client, asked, None, context=CONTEXT, item_type=Usage)
    cpu = time.process_time()
    wall = time.perf_counter()
    sink = Count(num_streams)
    for _ in range(num_streams):
        client.open(Target(addresses, "tokens"), (num_streams, num_steps), sink, context=CONTEXT, item_type=TokenDelta)
    await sink.done
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    after: Usage = await call(client, asked, None, context=CONTEXT, item_type=Usage)
    assert sink.num_tokens == num_streams * num_steps
    micro = 1e6 / sink.num_tokens
    frames = after.data_frames - before.data_frames
    return (
        f"{num_streams:>8} {num_steps:>7} {(after.cpu_s - before.cpu_s) * micro:>14.2f} {cpu * micro:>16.2f} "
        f"{sink.num_tokens / frames if frames else float('nan'):>13.1f} {sink.num_tokens / wall:>12.0f}"
    )


async def over_tcp(address: str, token: str, shapes: Sequence[tuple[int, int]]) -> list[str]:
    client = RequestPlaneClient(Identity(token=token))
    lines = [await measure(client, (address,), *shape) for shape in shapes]
    await client.close()
    return lines


async def in_process(shapes: Sequence[tuple[int, int]]) -> list[str]:
    """Sender and receiver share the process, so both columns show the same time: that of the whole way."""
    network = InProcessNetwork()
    server, owner = await make_server(Identity(), Listen(host=None, inproc_name="here"), network)
    client = RequestPlaneClient(Identity(), network=network)
    lines = [await measure(client, server.addresses, *shape) for shape in shapes]
    await client.close()
    await server.close()
    await owner.close()
    return lines


def report(name: str, use_uvloop: bool, shapes: Sequence[tuple[int, int]]) -> None:
    run = uvloop.run if use_uvloop else asyncio.run
    if name == "in process":
        lines = run(in_process(shapes))
    else:
        with tempfile.TemporaryDirectory() as folder:
            token_file = Path(folder) / "token"
            token_file.write_text(secrets.token_hex(16))
            command = [sys.executable, __file__, "--serve", str(token_file), *(["--uvloop"] if use_uvloop else [])]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdin is not None and server.stdout is not None
                address = server.stdout.readline().strip()
                lines = run(over_tcp(address, token_file.read_text(), shapes))
                server.stdin.close()
    for line in lines:
        print(f"{name:>10} {'uvloop' if use_uvloop else 'asyncio':>8} {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--uvloop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        (uvloop.run if options.uvloop else asyncio.run)(serve(options.serve.read_text()))
        return
    steps = 300 if options.quick else 3000
    shapes = [(1, steps), (64, steps), (256, steps // 2)]
    print(
        f"{'carrier':>10} {'loop':>8} {'streams':>8} {'steps':>7} {'sender µs/tok':>14} {'receiver µs/tok':>16} "
        f"{'tokens/frame':>13} {'tokens/s':>12}"
    )
    for name, use_uvloop in (("tcp", False), ("tcp", True), ("in process", True)):
        report(name, use_uvloop, shapes)


if __name__ == "__main__":
    main()
