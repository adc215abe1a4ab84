"""A deployment in one process, for what routing does to caches: decode workers with engines, a Router and a
Processor, all the product's own and connected over loopback TCP, or in process, where a virtual clock may drive all of
it; discovery in memory."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from stator.core.admission import QueueLimits
from stator.core.disagg import DisaggPolicy
from stator.core.routing import RouterMode
from stator.discovery.base import Lease
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.engines.base import Engine
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.engine import LocalEngine, RunnerFactory
from stator.engines.sim.args import SimEngineArgs
from stator.engines.sim.engine import SimEngine
from stator.errors import StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.engine import EngineLoad, EngineRequest
from stator.messages.instances import InstanceInfo
from stator.messages.kv_events import KV_EVENTS_ENDPOINT, KvSubscribe
from stator.messages.lora import LoraAdapter
from stator.messages.openai import CompletionRequest, Usage
from stator.messages.processor import CompletionDelta, RouteRequest
from stator.messages.reports import ReportRequest, RouterStats
from stator.messages.routing import DecisionsRequest, RouteObservations
from stator.observability.reporting import Reporter
from stator.processor import ModelTokenizer, Processor
from stator.queue.memory import MemoryQueue
from stator.router import Router
from stator.runtime.context import CallContext, loop_time
from stator.runtime.directory import InstanceDirectory, register_instance
from stator.transport import (
    Endpoint,
    Identity,
    InProcessNetwork,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    Target,
)
from stator.worker import DecodeWorker, KvPublisher, WorkerAdapters, WorkerHost

EngineFactory = Callable[[], Engine]


def local_engines(args: LocalEngineArgs, runner_factory: RunnerFactory) -> EngineFactory:
    return lambda: LocalEngine(args, runner_factory=runner_factory, rng=Random(1))


def sim_engines(args: SimEngineArgs) -> EngineFactory:
    return lambda: SimEngine(args, rng=Random(1))


TOKEN = "a-token-for-tests-only-0123456789"
MODEL = "tiny-llama"
READY_S = 30.0


@dataclass
class Answer:
    """ttft_s, seconds: from the request to its first token, and to its end. cached: tokens the engine had cached."""

    ttft_s: float
    seconds: float
    instance: InstanceId
    usage: Usage
    first: CompletionDelta
    text: str = ""

    @property
    def cached(self) -> int:
        return self.usage.prompt_tokens_details.cached_tokens


class _Sink:
    def __init__(self) -> None:
        self.deltas: list[CompletionDelta] = []
        self.first_at: float | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def items(self, items: Sequence[Any], /) -> None:
        if self.first_at is None:
            self.first_at = loop_time()
        self.deltas += items

    def end(self, error: StatorError | None = None, /) -> None:
        if self.done.done():
            return
        if error is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


@dataclass
class Worker:
    engine: Engine
    publisher: KvPublisher
    requests: DecodeWorker
    reporter: Reporter
    server: RequestPlaneServer
    client: RequestPlaneClient
    lease: Lease
    instance: InstanceInfo
    adapters: WorkerAdapters

    @property
    def load(self) -> EngineLoad:
        return self.engine.load()

    async def close(self) -> None:
        self.reporter.close()
        await self.publisher.close()
        await self.adapters.close()
        await self.requests.close()
        await self.engine.stop()
        await self.server.close()
        await self.client.close()
        await self.lease.revoke()


@dataclass
class RoutingWorld:
    """mode: of the Router; limits: of the requests that wait there. in_process: connect without sockets. adapters: the
    Processor follows discovery, and so knows the workers' LoRA adapters. Build with `routing_world`."""

    mode: RouterMode
    rng: Random
    limits: QueueLimits | None = None
    in_process: bool = False
    adapters: bool = False
    store: MemoryKeyStore = field(default_factory=MemoryKeyStore)
    workers: list[Worker] = field(default_factory=list[Worker])

    def __post_init__(self) -> None:
        self.discovery = MemoryDiscovery(self.store)
        self.queue = MemoryQueue(self.store)
        self.directory = InstanceDirectory(self.discovery)
        self.network = InProcessNetwork()
        self.client = RequestPlaneClient(Identity(token=TOKEN), network=self.network)
        self.servers: list[RequestPlaneServer] = []
        self.num_requests = 0

    async def start(self, num_workers: int, make_engine: EngineFactory) -> None:
        await self.directory.start()
        for number in range(num_workers):
            await self.add_worker(f"worker-{number}", make_engine())
        await self.directory.wait_for(lambda d: len(d.instances(role="decode")) == num_workers, READY_S)
        self.router = Router(
            client=self.client,
            directory=self.directory,
            mode=self.mode,
            min_workers=num_workers,
            rng=self.rng,
            limits=self.limits,
        )
        route = await self._serve(
            "router",
            Endpoint("route", RouteRequest, self.router.route),
            Endpoint("observe", RouteObservations, self.router.observe),
            Endpoint("decisions", DecisionsRequest, self.router.decisions),
        )
        info = self.workers[0].instance.engine
        assert info is not None
        model_dir = Path(str(files("stator") / "models" / MODEL))
        self.processor = Processor(
            model_names=[MODEL],
            tokenizer=ModelTokenizer.load(model_dir),
            block_size=info.block_size,
            max_model_len=info.max_model_len,
            client=self.client,
            router=Target(route, "route"),
            rng=self.rng,
            directory=self.directory if self.adapters else None,
        )
        self.processor_addresses = await self._serve(
            "processor", *self.processor.endpoints(), Endpoint("decisions", DecisionsRequest, self.router.decisions)
        )
        await self.settled()

    async def settled(self) -> None:
        """The router's view of every worker is whole."""
        index = self.router.index
        if index is not None:
            await eventually(lambda: all(index.trusted(w.instance.instance_id) for w in self.workers))

    async def add_worker(self, name: str, engine: Engine) -> None:
        identity = Identity(instance_id=InstanceId(name), role="decode", token=TOKEN)
        client, server = RequestPlaneClient(identity, network=self.network), self._server(identity)
        await server.start()
        host = WorkerHost(instance_id=identity.instance_id, client=client, server=server, on_dead=lambda _: None)
        info = await engine.start(host)
        lease = await self.discovery.grant_lease(60.0)
        endpoints = ("generate", "report", KV_EVENTS_ENDPOINT)
        instance = InstanceInfo(
            identity.instance_id, "Worker", "decode", server.addresses, endpoints, "h", 1, model=MODEL, engine=info
        )

        async def show(adapters: tuple[LoraAdapter, ...]) -> None:
            shown = msgspec.structs.replace(instance, adapters=adapters)
            await register_instance(self.discovery, lease, shown)
            await self.directory.wait_for(lambda d: d.get(shown.instance_id) == shown, READY_S)

        adapters = WorkerAdapters(
            engine=engine, info=info, instance_id=identity.instance_id, directory=self.directory, show=show, settle_s=0
        )
        requests = DecodeWorker(
            engine=engine,
            info=info,
            host=host,
            policy=DisaggPolicy(),
            queue=self.queue,
            directory=self.directory,
            adapters=adapters,
        )
        await requests.start()
        publisher, reporter = KvPublisher(engine), Reporter(requests.report)
        server.register(Endpoint("generate", EngineRequest, requests.generate))
        server.register(Endpoint("report", ReportRequest, reporter.report))
        server.register(Endpoint(KV_EVENTS_ENDPOINT, KvSubscribe, publisher.kv_events))
        await register_instance(self.discovery, lease, msgspec.structs.replace(instance, adapters=adapters.shown))
        self.workers.append(Worker(engine, publisher, requests, reporter, server, client, lease, instance, adapters))

    async def _serve(self, name: str, *endpoints: Endpoint) -> tuple[str, ...]:
        server = self._server(Identity(instance_id=InstanceId(name), token=TOKEN))
        for endpoint in endpoints:
            server.register(endpoint)
        await server.start()
        self.servers.append(server)
        return server.addresses

    def _server(self, identity: Identity) -> RequestPlaneServer:
        listen = Listen(host=None, inproc_name=identity.instance_id) if self.in_process else Listen()
        return RequestPlaneServer(identity, listen, network=self.network)

    def targets(self, endpoint: str) -> list[Target]:
        return [Target(self.processor_addresses, endpoint)]

    async def ask(
        self,
        prompt: Sequence[int],
        max_tokens: int = 4,
        headers: dict[str, str] | None = None,
        *,
        deadline_s: float = 300.0,
        priority: int = 0,
        model: str = MODEL,
    ) -> Answer:
        """One completion, start to end. Raises the StatorError that it ended with."""
        sink, begin = _Sink(), loop_time()
        self.num_requests += 1
        context = CallContext(RequestId(f"r{self.num_requests}"), begin + deadline_s, headers or {})
        request = CompletionRequest(
            model=model,
            prompt=list(prompt),
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            priority=priority or None,
        )
        target = self.targets("completions")[0]
        handle = self.client.open(target, request, sink, context=context, item_type=CompletionDelta)
        try:
            await sink.done
        finally:
            handle.cancel()
        first, last = sink.deltas[0], sink.deltas[-1]
        assert sink.first_at is not None and first.instance_id is not None and last.usage is not None
        text = "".join(delta.text for delta in sink.deltas)
        return Answer(sink.first_at - begin, loop_time() - begin, first.instance_id, last.usage, first, text)

    def stats(self) -> RouterStats:
        stats = self.router.report().router
        assert stats is not None
        return stats

    async def close(self) -> None:
        if hasattr(self, "processor"):
            await self.processor.close()
        if hasattr(self, "router"):
            self.router.close()
        for server in self.servers:
            await server.close()
        for worker in self.workers:
            await worker.close()
        await self.client.close()
        await self.directory.close()
        await self.queue.close()
        await self.discovery.close()


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Looks every few milliseconds. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        while not condition():
            turn = asyncio.Event()
            loop.call_later(0.005, turn.set)
            await turn.wait()


@asynccontextmanager
async def routing_world(
    mode: RouterMode,
    num_workers: int,
    make_engine: EngineFactory,
    *,
    seed: int = 1,
    limits: QueueLimits | None = None,
    in_process: bool = False,
    adapters: bool = False,
) -> AsyncGenerator[RoutingWorld]:
    world = RoutingWorld(mode, Random(seed), limits, in_process, adapters)
    try:
        await world.start(num_workers, make_engine)
        yield world
    finally:
        await world.close()


@dataclass
class Outcome:
    """What a workload came to. hit_rate: cached of all prompt tokens. computed_tokens: of prompts.

    request_skew, work_skew: most of any worker over the mean, of requests and of tokens computed.
    """

    num_requests: int
    hit_rate: float
    computed_tokens: int
    mean_ttft_s: float
    p90_ttft_s: float
    request_skew: float
    work_skew: float
    exact: int
    compared: int

    @property
    def exact_share(self) -> float:
        return self.exact / self.compared if self.compared else 1.0


def outcome(world: RoutingWorld, answers: Sequence[Answer]) -> Outcome:
    """compared: predictions that rested on workers' events alone; the others were made while blocks were computed."""
    prompt = sum(a.usage.prompt_tokens for a in answers)
    cached = sum(a.cached for a in answers)
    counts = [sum(a.instance == w.instance.instance_id for a in answers) for w in world.workers]
    computed = [w.load.prompt_tokens_computed_total for w in world.workers]
    ttfts = sorted(a.ttft_s for a in answers)
    predictions = world.stats().predictions
    return Outcome(
        num_requests=len(answers),
        hit_rate=cached / prompt,
        computed_tokens=sum(computed),
        mean_ttft_s=sum(ttfts) / len(ttfts),
        p90_ttft_s=ttfts[int(0.9 * len(ttfts))],
        request_skew=_skew(counts),
        work_skew=_skew(computed),
        exact=predictions.get("exact", {}).get("events", 0),
        compared=sum(by_basis.get("events", 0) for by_basis in predictions.values()),
    )


def _skew(values: Sequence[float]) -> float:
    return max(values) * len(values) / sum(values) if sum(values) else 1.0
