"""Decode workers that cost almost nothing, for hot_path.py: several instances in one process.

Each step of an instance pushes one token into each of its calls, so that a step leaves in one frame. Steps follow
each other as told by a line of JSON on standard input: {"period_ms": 10}, or 0 for as fast as the reader takes them.
"""

import argparse
import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import uvloop

from stator.core.hashing import block_hashes
from stator.discovery.hub_client import HubDiscovery
from stator.engines.base import KvListener
from stator.ids import BlockHash, InstanceId
from stator.messages.engine import (
    BlocksRemoved,
    BlocksStored,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    KvEvent,
    TokenDelta,
)
from stator.messages.instances import InstanceInfo
from stator.messages.kv_events import KvSubscribe
from stator.messages.reports import ReportRequest, WorkerReport
from stator.observability.reporting import Reporter
from stator.runtime.directory import register_instance
from stator.transport import Call, Endpoint, Identity, Listen, RequestPlaneClient, RequestPlaneServer
from stator.worker.kv_events import KvPublisher

FIRST_ID, LAST_ID = 300, 800
"""Ordinary tokens of the bundled model."""


NUM_BLOCKS = 2048


class FakeCache:
    """The prefix cache's events of an engine that forgets its oldest prompts; implements worker.kv_events.WatchesKv."""

    def __init__(self, model: str, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        self._held: set[BlockHash] = set()
        self._prompts: deque[list[BlockHash]] = deque()
        self._listeners: list[KvListener] = []

    def watch_kv(self, listener: KvListener) -> Callable[[], None]:
        listener([BlocksStored([*hashes]) for hashes in self._prompts])
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def add(self, request: EngineRequest) -> None:
        hashes = block_hashes(request.prompt_ids, self._block_size, model=self._model)
        new = [each for each in hashes if each not in self._held]
        if not new:
            return
        num_known = len(hashes) - len(new)
        events: list[KvEvent] = [BlocksStored([*new], hashes[num_known - 1] if num_known else None)]
        self._held.update(new)
        self._prompts.append(new)
        while len(self._held) > NUM_BLOCKS:
            old = self._prompts.popleft()
            self._held.difference_update(old)
            events.append(BlocksRemoved([*old]))
        for listener in self._listeners:
            listener(events)


class FakeEngine:
    def __init__(self, rng: Random, cache: FakeCache) -> None:
        self.cache = cache
        self.period_s = 0.01
        self._left: dict[Call, int] = {}
        self._timer: asyncio.Handle | None = None
        self._rng = rng
        self._token = FIRST_ID

    def report(self) -> WorkerReport:
        return WorkerReport(EngineLoad(num_running=len(self._left)))

    def generate(self, call: Call) -> None:
        request: EngineRequest = call.request
        call.on_cancel(lambda: self._left.pop(call, None))
        self.cache.add(request)
        if request.sampling.max_tokens == 1:
            call.items([TokenDelta([FIRST_ID], FinishReason.LENGTH, 0)])
            call.end()
            return
        self._left[call] = request.sampling.max_tokens - 1
        call.items([TokenDelta([FIRST_ID], None, 0)])
        if self._timer is None:
            # Instances step out of phase with each other, as engines do.
            self._later(self.period_s * (1 + self._rng.random()))

    def _later(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay_s, self._step) if delay_s else loop.call_soon(self._step)

    def _step(self) -> None:
        self._token = FIRST_ID if self._token >= LAST_ID else self._token + 1
        item = (TokenDelta([self._token]),)
        ended: list[Call] = []
        for call, left in self._left.items():
            if left > 1:
                call.items(item)
                self._left[call] = left - 1
            else:
                call.items((TokenDelta([self._token], FinishReason.LENGTH),))
                ended.append(call)
        for call in ended:
            del self._left[call]
            call.end()
        self._timer = None
        if self._left:
            self._later(self.period_s)


async def start_instance(
    options: argparse.Namespace, discovery: HubDiscovery, lease: Any, index: int
) -> tuple[FakeEngine, Callable[[], Any]]:
    name = f"VllmWorker-{index:012x}"
    identity = Identity(options.namespace, InstanceId(name), "decode", os.environ["STATOR_TOKEN"])
    server = RequestPlaneServer(identity, Listen())
    engine = FakeEngine(Random(index), FakeCache(options.model, options.block_size))
    publisher = KvPublisher(engine.cache)
    reporter = Reporter(engine.report)
    server.register(Endpoint("generate", EngineRequest, engine.generate))
    server.register(Endpoint("report", ReportRequest, reporter.report))
    server.register(Endpoint("kv_events", KvSubscribe, publisher.kv_events))
    await server.start()
    info = EngineInfo("fake", "0", options.model, options.block_size, 100_000, 4096, 8192, 4096)
    instance = InstanceInfo(
        identity.instance_id,
        "VllmWorker",
        "decode",
        server.addresses,
        ("generate", "report", "kv_events"),
        "127.0.0.1",
        os.getpid(),
        model=options.model,
        engine=info,
    )
    await register_instance(discovery, lease, instance)

    async def close() -> None:
        reporter.close()
        await publisher.close()
        await server.close()

    return engine, close


async def run(options: argparse.Namespace) -> None:
    identity = Identity(options.namespace, InstanceId("workers"), "decode", os.environ["STATOR_TOKEN"])
    client = RequestPlaneClient(identity)
    discovery = HubDiscovery(client, (options.hub,), namespace=options.namespace)
    lease = await discovery.grant_lease()
    started = [await start_instance(options, discovery, lease, index) for index in range(options.instances)]
    print("ready", flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        period_s = json.loads(line)["period_ms"] / 1000
        for engine, _ in started:
            engine.period_s = period_s
        print("ok", flush=True)
    for _, close in started:
        await close()
    await lease.revoke()
    await discovery.close()
    await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hub", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--instances", type=int, default=4)
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
