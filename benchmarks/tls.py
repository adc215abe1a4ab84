"""What mutual TLS between nodes costs: CPU time of the request plane with it and without, in turn, over loopback TCP.

    python benchmarks/tls.py [--quick] [--pairs N] [--only LOADS] [--json FILE]

Two servers are up the whole time, each a process of its own, one with TLS and one without; this process is the client
of both. A pair is one run of a load on each, and which comes first alternates. Reported is the CPU time (user and
system) of client and server together and apart, medians [min..max] over the pairs, and the ratio within pairs, since
what slows the machine down slows both.

stream-1 and stream-64: a token a step to each of so many streams; a step leaves as one frame, which is a record of TLS,
and is waited for until it is written, not received. call: one at a time, a prompt of 128 tokens out and a short answer
back. connect: dial, shake hands, one call, close. kv: blocks of 1 MiB as a decode engine fetches them from a prefill
engine; neither touches a GPU.
"""

import argparse
import asyncio
import secrets
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from transport import CONTEXT, Count, Steps

from stator.config.authority import issue, make_authority
from stator.config.node_tls import DIR, node_tls
from stator.engines.transfer.fetcher import BlockFetcher
from stator.engines.transfer.server import BlockServer
from stator.ids import InstanceId, RequestId, TransferId
from stator.messages.engine import TokenDelta
from stator.transport import (
    Call,
    CallTasks,
    Endpoint,
    Identity,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    Target,
    call,
)

HOST = "127.0.0.1"
WAYS = ("plain", "tls")
SIDES = ("both", "server", "client")
PROMPT = bytes(range(256)) * 2
"""128 tokens of four bytes."""
BLOCK_BYTES = 1024 * 1024
NUM_BLOCKS = 16
"""Of a held prefill, fetched again and again."""


# The server's process.


async def serve(identity: Identity) -> None:
    """Until standard input ends. Its address is printed."""
    server = RequestPlaneServer(identity, Listen(host=HOST))
    owner = CallTasks("benchmark")
    tasks: set[asyncio.Task[None]] = set()
    transfer_id = TransferId("held")
    block = secrets.token_bytes(BLOCK_BYTES)

    async def cpu(_: Any, __: Any) -> float:
        return time.process_time()

    async def export(block_ids: Sequence[int], num_bytes: int) -> list[bytes]:
        return [block] * min(len(block_ids), num_bytes // BLOCK_BYTES)

    def answer(call: Call) -> None:
        call.items([len(call.request)])
        call.end()

    blocks = BlockServer(blocks_of=lambda _: range(NUM_BLOCKS), free=lambda _: None, export=export, hold_s=24 * 3600.0)
    blocks.register(server)
    blocks.hold(transfer_id)
    server.register(owner.endpoint("cpu", Any, cpu))
    server.register(Endpoint("answer", bytes, answer))
    server.register(Endpoint("tokens", tuple[int, int], Steps(tasks)))
    await server.start()
    print(server.addresses[0], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await blocks.close()
    await server.close()
    await owner.close()


# The client's.


@dataclass(frozen=True, slots=True)
class Held:
    transfer_id: TransferId
    instance_id: InstanceId
    addresses: tuple[str, ...]


class Peer:
    """One server, and the client that stays connected to it."""

    def __init__(self, identity: Identity, address: str) -> None:
        self.identity = identity
        self.addresses = (address,)
        self.client = RequestPlaneClient(identity)

    async def cpu_s(self) -> float:
        return await call(self.client, Target(self.addresses, "cpu"), None, context=CONTEXT, item_type=float)


Work = Callable[[], Awaitable[None]]


async def stream(peer: Peer, num_streams: int, num_steps: int) -> Work:
    async def work() -> None:
        sink = Count(num_streams)
        target = Target(peer.addresses, "tokens")
        for _ in range(num_streams):
            peer.client.open(target, (num_streams, num_steps), sink, context=CONTEXT, item_type=TokenDelta)
        await sink.done
        assert sink.num_tokens == num_streams * num_steps

    return work


async def ask(client: RequestPlaneClient, peer: Peer) -> None:
    answer = await call(client, Target(peer.addresses, "answer"), PROMPT, context=CONTEXT, item_type=int)
    assert answer == len(PROMPT)


async def calls(peer: Peer, num_calls: int) -> Work:
    async def work() -> None:
        for _ in range(num_calls):
            await ask(peer.client, peer)

    return work


async def connect(peer: Peer, num_connections: int) -> Work:
    # Reading the certificate's files is a process's start, not a connection's.
    clients = [RequestPlaneClient(peer.identity) for _ in range(num_connections)]

    async def work() -> None:
        for client in clients:
            await ask(client, peer)
            await client.close()

    return work


async def fetch(peer: Peer, num_blocks: int) -> Work:
    num_bytes = 0

    async def take(blocks: list[tuple[int, bytes]]) -> None:
        nonlocal num_bytes
        num_bytes += sum(len(content) for _, content in blocks)

    fetcher = BlockFetcher(peer.client, take, timeout_s=60.0)
    held = Held(TransferId("held"), InstanceId(""), peer.addresses)

    async def work() -> None:
        for _ in range(num_blocks // NUM_BLOCKS):
            await fetcher.fetch(held, RequestId("fetch"), range(NUM_BLOCKS), list(range(NUM_BLOCKS)))
        assert num_bytes == num_blocks * BLOCK_BYTES

    await fetcher.fetch(held, RequestId("warm"), range(1), [0])
    num_bytes = 0
    return work


@dataclass(frozen=True, slots=True)
class Load:
    """num: units of a run; quick_num: of one with --quick. prepare: what is not measured, and gives what is."""

    unit: str
    num: int
    quick_num: int
    prepare: Callable[[Peer, int], Awaitable[Work]]


LOADS = {
    "stream-1": Load("us per token", 20_000, 500, lambda peer, num: stream(peer, 1, num)),
    "stream-64": Load("us per token", 64 * 4000, 64 * 50, lambda peer, num: stream(peer, 64, num // 64)),
    "call": Load("us per call", 2000, 50, calls),
    "connect": Load("us per connection", 150, 5, connect),
    "kv": Load("us per MiB", 32 * NUM_BLOCKS, NUM_BLOCKS, fetch),
}

Costs = dict[str, dict[str, dict[str, list[float]]]]
"""By load, way and side: microseconds per unit, one for each pair."""


async def run_load(load: Load, peer: Peer, num: int) -> dict[str, float]:
    """Microseconds per unit by side."""
    work = await load.prepare(peer, num)
    server = await peer.cpu_s()
    client = time.process_time()
    await work()
    client = time.process_time() - client
    server = await peer.cpu_s() - server
    return {side: 1e6 * cost / num for side, cost in zip(SIDES, (client + server, server, client), strict=True)}


async def bench(peers: dict[str, Peer], names: Sequence[str], options: argparse.Namespace) -> Costs:
    costs: Costs = {name: {way: {side: [] for side in SIDES} for way in WAYS} for name in names}
    num_pairs = 2 if options.quick else options.pairs
    for pair in range(-1, num_pairs):
        for name in names:
            load = LOADS[name]
            num = load.quick_num if options.quick or pair < 0 else load.num
            for way in WAYS if pair % 2 == 0 else reversed(WAYS):
                seen = await run_load(load, peers[way], num)
                if pair >= 0:
                    for side, cost in seen.items():
                        costs[name][way][side].append(cost)
    for peer in peers.values():
        await peer.client.close()
    return costs


# Both together.


@contextmanager
def servers(directory: Path) -> Iterator[dict[str, str]]:
    """Their addresses by way; each is a process of its own, and both start at the same time."""
    with ExitStack() as stack:
        started: dict[str, subprocess.Popen[str]] = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--serve", str(directory), "--way", way]
            server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            # Leaving it closes standard input, which ends the process.
            started[way] = stack.enter_context(server)
        yield {way: server.stdout.readline().strip() for way, server in started.items() if server.stdout is not None}


def identity(directory: Path, way: str) -> Identity:
    tls = node_tls({DIR: str(directory / "node")}) if way == "tls" else None
    return Identity(token=(directory / "token").read_text(), tls=tls)


def show(costs: Costs) -> None:
    for name, by_way in costs.items():
        for side in SIDES:
            plain, tls = (by_way[way][side] for way in WAYS)
            ratios = [ours / theirs for ours, theirs in zip(tls, plain, strict=True)]
            added = statistics.median(ours - theirs for ours, theirs in zip(tls, plain, strict=True))
            print(
                f"{name:10} {LOADS[name].unit:18} {side:7} plain {spread(plain, 1)}  tls {spread(tls, 1)}  "
                f"added {added:7.1f}  ratio of pairs {spread(ratios, 2)} n={len(ratios)}"
            )


def spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:>7} [{low}..{high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small pairs, to see that it runs")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default="", help=f"some of the loads, with commas: {','.join(LOADS)}")
    parser.add_argument("--json", type=Path, help="also write every run here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        uvloop.run(serve(identity(options.serve, options.way)))
        return
    from hot_path import machine, spin_ms  # Half of what a server's process would need to start.

    names = options.only.split(",") if options.only else list(LOADS)
    print(f"{machine()}, {ssl.OPENSSL_VERSION}, spin_ms {spin_ms():.2f}")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "token").write_text(secrets.token_hex(16))
        make_authority(directory / "ca")
        issue(directory / "ca", [HOST], directory / "node")
        with servers(directory) as addresses:
            peers = {way: Peer(identity(directory, way), address) for way, address in addresses.items()}
            costs = uvloop.run(bench(peers, names, options))
    show(costs)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=1))


if __name__ == "__main__":
    main()
