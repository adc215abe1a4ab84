"""Decode and prefill workers in one process: the product's own engines, queue, discovery and request plane on
loopback TCP. Only the model step is replaced (testing.fake_runner), so that a wrong block changes the text."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from stator.core.disagg import DisaggPolicy
from stator.discovery.base import Discovery, Lease
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.engine import LocalEngine
from stator.errors import StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.engine import (
    EngineInfo,
    EngineRequest,
    PrefillDone,
    PrefillResult,
    PrefillTaken,
    SamplingParams,
    TokenDelta,
)
from stator.messages.instances import InstanceInfo
from stator.messages.reports import ReportRequest, WorkerReport
from stator.messages.tokens import pack
from stator.observability.reporting import Reporter
from stator.queue.base import JobQueue, QueueSize
from stator.queue.memory import MemoryQueue
from stator.runtime.context import CallContext
from stator.runtime.directory import InstanceDirectory, register_instance
from stator.testing.fake_runner import FakeRunner
from stator.testing.hub_world import Party
from stator.transport import (
    Endpoint,
    Identity,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    StreamHandle,
    Target,
    stream,
)
from stator.worker import DecodeWorker, PrefillWorker, WorkerHost

TOKEN = "a-token-for-tests-only-0123456789"
ALWAYS = DisaggPolicy(remote_prefill=True, conditional_disagg=False)


@dataclass
class Node:
    """One worker process's worth of objects."""

    instance_id: InstanceId
    runner: FakeRunner
    engine: LocalEngine
    info: EngineInfo
    client: RequestPlaneClient
    server: RequestPlaneServer
    lease: Lease
    worker: DecodeWorker | PrefillWorker

    async def die(self) -> None:
        """As kill -9 does it: sockets close, nobody says goodbye; discovery learns from the lease."""
        self.lease.stop_renewal()  # type: ignore[attr-defined]
        await self.server.close()
        await self.client.close()
        if isinstance(self.worker, PrefillWorker):
            await self.worker._tasks.close()

    async def close(self) -> None:
        await self.worker.close()
        await self.engine.stop()
        await self.server.close()
        await self.client.close()
        await self.lease.revoke()


class Result:
    """A sink that collects one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.deltas: list[TokenDelta] = []
        self.error: StatorError | None = None
        self.first = asyncio.Event()
        self.ended = asyncio.Event()
        self.handle: StreamHandle | None = None

    def items(self, items: Sequence[Any], /) -> None:
        assert not self.ended.is_set()
        self.deltas.extend(items)
        self.token_ids.extend(token for delta in items for token in delta.token_ids)
        self.first.set()

    def end(self, error: StatorError | None = None, /) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()

    async def wait(self) -> "Result":
        async with asyncio.timeout(20):
            await self.ended.wait()
        return self


class _Prefilled:
    """A sink of one prefill."""

    def __init__(self) -> None:
        self.done: asyncio.Future[PrefillResult] = asyncio.get_running_loop().create_future()

    def items(self, items: Sequence[Any], /) -> None:
        self.done.set_result(items[0])

    def end(self, error: StatorError | None = None, /) -> None:
        if error is not None:
            self.done.set_exception(error)


@dataclass
class Deployment:
    lease_ttl_s: float
    args: dict[str, Any]
    store: MemoryKeyStore = field(default_factory=MemoryKeyStore)
    nodes: list[Node] = field(default_factory=list)
    party: Party | None = None
    make_engine: Callable[[dict[str, Any], FakeRunner], LocalEngine] | None = None

    def __post_init__(self) -> None:
        self.discovery: Discovery = MemoryDiscovery(self.store) if self.party is None else self.party.discovery
        self.queue: JobQueue = MemoryQueue(self.store) if self.party is None else self.party.queue
        self.directory = InstanceDirectory(self.discovery)
        self.client = RequestPlaneClient(Identity(token=TOKEN))

    async def add(
        self,
        name: str,
        role: str,
        make: Callable[[LocalEngine, EngineInfo, WorkerHost, Lease], DecodeWorker | PrefillWorker],
        **args: Any,
    ) -> Node:
        identity = Identity(instance_id=InstanceId(name), role=role, token=TOKEN)
        client, server = RequestPlaneClient(identity), RequestPlaneServer(identity, Listen())
        await server.start()
        values = {"model": "m", "block_size": 4, "max_num_batched_tokens": 64, "max_num_seqs": 16, **self.args, **args}
        runner = FakeRunner(block_size=values["block_size"], num_blocks=values.pop("num_blocks", 256))
        if self.make_engine is not None:
            engine = self.make_engine(values, runner)
        else:
            engine = LocalEngine(LocalEngineArgs(**values), runner_factory=lambda _: runner, rng=Random(1))
        dead: list[str] = []
        host = WorkerHost(instance_id=identity.instance_id, client=client, server=server, on_dead=dead.append)
        info = await engine.start(host)
        lease = await self.discovery.grant_lease(self.lease_ttl_s)
        worker = make(engine, info, host, lease)
        if isinstance(worker, DecodeWorker):
            server.register(Endpoint("generate", EngineRequest, worker.generate))
            server.register(Endpoint("prefill_done", PrefillDone, worker.prefill_done))
            server.register(Endpoint("prefill_taken", PrefillTaken, worker.prefill_taken))
        await worker.start()
        reporter = Reporter(worker.report, min_interval_s=0.01)
        server.register(Endpoint("report", ReportRequest, reporter.report))
        instance = InstanceInfo(
            identity.instance_id, role, role, server.addresses, ("generate", "report"), "h", 1, model="m", engine=info
        )
        await register_instance(self.discovery, lease, instance)
        node = Node(identity.instance_id, runner, engine, info, client, server, lease, worker)
        self.nodes.append(node)
        return node

    async def add_decode(self, policy: DisaggPolicy = ALWAYS, timeout_s: float = 10.0, **args: Any) -> Node:
        return await self.add(
            f"decode-{len(self.nodes)}",
            "decode",
            lambda engine, info, host, _: DecodeWorker(
                engine=engine,
                info=info,
                host=host,
                policy=policy,
                queue=self.queue,
                directory=self.directory,
                remote_prefill_timeout_s=timeout_s,
            ),
            **args,
        )

    async def add_prefill(self, **args: Any) -> Node:
        node = await self.add(
            f"prefill-{len(self.nodes)}",
            "prefill",
            lambda engine, info, host, lease: PrefillWorker(
                engine=engine, info=info, host=host, queue=self.queue, lease=lease, rng=Random(1)
            ),
            **args,
        )
        await self.directory.wait_for(lambda d: d.get(node.instance_id) is not None, 5)
        return node

    async def announce(self, name: str, engine: EngineInfo) -> Lease:
        """A prefill instance in discovery that takes no jobs: the test takes them. It leaves with its lease."""
        lease = await self.discovery.grant_lease(self.lease_ttl_s)
        info = InstanceInfo(InstanceId(name), "prefill", "prefill", (), (), "h", 1, model="m", engine=engine)
        await register_instance(self.discovery, lease, info)
        await self.directory.wait_for(lambda d: d.get(info.instance_id) == info, 5)
        return lease

    def generate(
        self, node: Node, prompt: Sequence[int], max_tokens: int = 8, lora_name: str | None = None, **sampling: Any
    ) -> Result:
        result = Result()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **sampling)
        request_id = RequestId(f"r{id(result)}")
        request = EngineRequest(request_id=request_id, prompt_ids=pack(prompt), sampling=params, lora_name=lora_name)
        target = Target(node.server.addresses, "generate", node.instance_id)
        result.handle = self.client.open(target, request, result, context=CallContext(request_id), item_type=TokenDelta)
        return result

    async def hold(self, node: Node, request: EngineRequest) -> PrefillResult:
        """Have the node's engine prefill, past its worker; the blocks wait to be fetched."""
        result = _Prefilled()
        node.engine.prefill(request, result)
        return await asyncio.wait_for(result.done, 5)

    async def text(self, prompt: Sequence[int], max_tokens: int = 8) -> list[int]:
        """What an engine of its own makes of it."""
        node = await self.add_decode(DisaggPolicy())
        result = await self.generate(node, prompt, max_tokens).wait()
        assert result.error is None
        return result.token_ids

    async def queue_size(self, predicate: Callable[[QueueSize], bool], timeout_s: float = 5.0) -> None:
        """Follow the queue until its size satisfies the predicate."""
        async with asyncio.timeout(timeout_s), aclosing(self.queue.watch_size()) as sizes:
            async for size in sizes:
                if isinstance(size, QueueSize) and predicate(size):
                    return

    async def reported(self, node: Node, predicate: Callable[[WorkerReport], bool], timeout_s: float = 5.0) -> None:
        """Follow the node's reports until one satisfies the predicate."""
        target = Target(node.server.addresses, "report", node.instance_id)
        context = CallContext(RequestId("report"))
        reports = stream(self.client, target, ReportRequest(0.02), context=context, item_type=WorkerReport)
        async with asyncio.timeout(timeout_s), aclosing(reports):
            async for items in reports:
                if predicate(items[-1]):
                    return

    async def blocks_settle(self, node: Node) -> None:
        """Every block is free of requests and holds soon."""
        await self.reported(node, lambda report: report.load.num_blocks_used == 0)


@asynccontextmanager
async def deployed(
    lease_ttl_s: float = 10.0,
    party: Party | None = None,
    make_engine: Callable[[dict[str, Any], FakeRunner], LocalEngine] | None = None,
    **args: Any,
) -> AsyncIterator[Deployment]:
    """party: of the control plane to use, which stays open; without one, memory. make_engine: by default local ones."""
    deployment = Deployment(lease_ttl_s, args, party=party, make_engine=make_engine)
    await deployment.directory.start()
    try:
        yield deployment
    finally:
        for node in deployment.nodes:
            await node.close()
        await deployment.client.close()
        await deployment.directory.close()
        if party is None:
            await deployment.queue.close()
            await deployment.discovery.close()


def run(scene: Callable[[], Any], timeout_s: float = 30) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await scene()

    asyncio.run(bounded())
