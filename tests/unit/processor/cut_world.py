"""A Processor in front of real engines, on a carrier that cuts streams where the test says."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from stator.core.disagg import DisaggPolicy
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.engines.local.engine import LocalEngine
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import EngineRequest, TokenDelta
from stator.messages.processor import RouteDecision, RouteRequest
from stator.processor.processor import Processor, ProcessorSettings
from stator.processor.tokenizer import ModelTokenizer
from stator.processor.validation import SamplingDefaults
from stator.queue.memory import MemoryQueue
from stator.runtime.context import CallContext
from stator.runtime.directory import InstanceDirectory
from stator.testing.engine_bench import BenchEngine, running_engines
from stator.transport.base import Call, Endpoint, Sink, StreamHandle, Target
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen
from stator.worker import DecodeWorker, WorkerHost

from .harness import Collected, Harness

CODES = (ErrorCode.INSTANCE_LOST, ErrorCode.DRAINING, ErrorCode.ENGINE_DEAD, ErrorCode.STALE_INSTANCE)


class _CutSink:
    """Lets `left` tokens of an attempt through, then ends it. A delta is never split: an engine makes one a step."""

    def __init__(self, sink: Sink, left: int, code: ErrorCode) -> None:
        self.handle: StreamHandle | None = None
        self._sink = sink
        self._left = left
        self._code = code
        self._cut = False

    def items(self, items: Sequence[TokenDelta], /) -> None:
        if self._cut:
            return
        passed: list[TokenDelta] = []
        for delta in items:
            if self._left < len(delta.token_ids):
                break
            self._left -= len(delta.token_ids)
            passed.append(delta)
        if passed:
            self._sink.items(passed)
        if len(passed) < len(items):
            self._cut = True
            self._sink.end(StatorError(self._code, "cut by the test"))
            if self.handle is not None:
                self.handle.cancel()

    def end(self, error: StatorError | None = None, /) -> None:
        if not self._cut:
            self._sink.end(error)


class CuttingClient:
    """cuts: for each attempt in turn, after how many tokens it is cut; further ones are left alone."""

    def __init__(self, inner: RequestPlaneClient) -> None:
        self._inner = inner
        self.cuts: list[int] = []
        self.num_attempts = 0

    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        if target.endpoint != "generate":
            return self._inner.open(target, request, sink, context=context, item_type=item_type)
        self.num_attempts += 1
        if not self.cuts:
            return self._inner.open(target, request, sink, context=context, item_type=item_type)
        code = CODES[self.num_attempts % len(CODES)]
        cut = _CutSink(sink, self.cuts.pop(0), code)
        cut.handle = self._inner.open(target, request, cut, context=context, item_type=item_type)
        return cut.handle

    async def close(self) -> None:
        await self._inner.close()


class _EndlessRouter:
    """Each attempt of a request gets an instance that it was not at; the engines behind them take turns."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def route(self, call: Call) -> None:
        request: RouteRequest = call.request
        name = next(name for name in self._names if name not in request.exclude)
        call.items([RouteDecision(InstanceId(name), (f"inproc://{name}",))])


class SameSeed(Random):
    """What the Processor draws is the same for every request, so that two runs can be compared."""

    def getrandbits(self, k: int, /) -> int:
        return 7


@dataclass
class CutWorld:
    client: CuttingClient
    processor: Processor
    tokenizer: ModelTokenizer
    engines: list[BenchEngine]
    plain: RequestPlaneClient

    def open(self, endpoint: str, request: Any, **options: Any) -> Collected:
        return Harness.open(self, endpoint, request, **options)  # type: ignore[arg-type]

    async def run(self, request: Any, cuts: Sequence[int] = (), *, endpoint: str = "completions") -> "Outcome":
        self.client.cuts, before = list(cuts), self.client.num_attempts
        got = await self.open(endpoint, request).done()
        assert got.error is None, got.error
        last = got.deltas[-1]
        assert last.usage is not None and [d.ending for d in got.deltas[:-1]] == [None] * (len(got.deltas) - 1)
        assert sum(delta.num_tokens for delta in got.deltas) == last.usage.completion_tokens
        return Outcome(got.text, str(last.ending), msgspec.to_builtins(last.usage), self.client.num_attempts - before)


@dataclass(frozen=True)
class Outcome:
    text: str
    ending: str
    usage: dict[str, Any]
    num_attempts: int

    def same_as(self, other: "Outcome") -> bool:
        return (self.text, self.ending, self.usage) == (other.text, other.ending, other.usage)


@asynccontextmanager
async def cut_world(
    tokenizer: ModelTokenizer, make_engine: Callable[[], LocalEngine], *, num_names: int = 40, **options: Any
) -> AsyncIterator[CutWorld]:
    network = InProcessNetwork()
    store = MemoryKeyStore()
    discovery = MemoryDiscovery(store)
    queue, directory = MemoryQueue(store), InstanceDirectory(discovery)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(discovery.close)
        stack.push_async_callback(queue.close)
        engines = await stack.enter_async_context(running_engines(make_engine(), make_engine()))
        names = [f"w{number}" for number in range(num_names)]
        router = _EndlessRouter(names)

        async def serve(name: str, *endpoints: Endpoint) -> RequestPlaneServer:
            identity = Identity(instance_id=InstanceId(name))
            server = RequestPlaneServer(identity, Listen(host=None, inproc_name=name), network=network)
            for endpoint in endpoints:
                server.register(endpoint)
            await server.start()
            stack.push_async_callback(server.close)
            return server

        await serve("router", Endpoint("route", RouteRequest, router.route))
        client = RequestPlaneClient(Identity(), network=network)
        stack.push_async_callback(client.close)
        for number, name in enumerate(names):
            server, engine = await serve(name), engines[number % 2]
            host = WorkerHost(instance_id=InstanceId(name), client=client, server=server, on_dead=lambda _: None)
            worker = DecodeWorker(
                engine=engine.engine,
                info=engine.info,
                host=host,
                policy=DisaggPolicy(),
                queue=queue,
                directory=directory,
            )
            server.register(Endpoint("generate", EngineRequest, worker.generate))
        cutting = CuttingClient(client)
        processor = Processor(
            model_names=("tiny",),
            tokenizer=tokenizer,
            block_size=engines[0].info.block_size,
            max_model_len=engines[0].info.max_model_len,
            client=cutting,
            router=Target(("inproc://router",), "route"),
            rng=SameSeed(),
            settings=ProcessorSettings(migration_limit=num_names, **options),
            defaults=SamplingDefaults(),
        )
        await serve("processor", *processor.endpoints())
        stack.push_async_callback(processor.close)
        yield CutWorld(cutting, processor, tokenizer, engines, client)
