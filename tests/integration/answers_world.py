"""The product's own Frontend, Processor and engines in one process, with a model that computes. The router hands out
the workers in turn; a worker may be told to die in the midst of its answers."""

import itertools
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import msgspec

from stator.config.models import resolve_model
from stator.engines.base import Engine
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.engine import LocalEngine
from stator.engines.local.load import numpy_runner
from stator.errors import ErrorCode, StatorError
from stator.frontend.app import FrontendApp
from stator.frontend.health import HealthReport, ModelHealth
from stator.ids import InstanceId, RequestId
from stator.messages.embeddings import EmbedRequest
from stator.messages.engine import EngineRequest, TokenDelta
from stator.messages.openai import ModelCard
from stator.messages.processor import RouteRequest
from stator.observability.metrics import Metrics
from stator.processor import ModelTokenizer, Processor
from stator.testing.engine_bench import BenchEngine, running_engines
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
from unit.frontend.frontend_fakes import Answer, AsgiClient
from unit.processor.harness import FakeRouter

MODEL = "stator:tiny-llama"
BLOCK = 16
NUM_BLOCKS = 256
MAX_MODEL_LEN = 512


def local_engine() -> Engine:
    args = LocalEngineArgs(model=MODEL, block_size=BLOCK, num_gpu_blocks_override=NUM_BLOCKS, max_num_batched_tokens=64)
    return LocalEngine(args, runner_factory=numpy_runner, rng=Random(1))


class Worker:
    """dies_after: pushes of a request that its callers still get; then its streams end as those of a lost instance."""

    def __init__(self, bench: BenchEngine) -> None:
        self.bench = bench
        self.dies_after: int | None = None
        self.requests: list[EngineRequest] = []
        self.embedded: list[EmbedRequest] = []
        self.headers: list[Mapping[str, str]] = []
        self._numbers = itertools.count()

    def generate(self, call: Call) -> None:
        request: EngineRequest = call.request
        self.requests.append(request)
        self.headers.append(call.context.headers)
        request_id = RequestId(f"{request.request_id}/{next(self._numbers)}")
        call.on_cancel(lambda: self.bench.engine.abort(request_id))
        sink = _Passed(self, call, request_id)
        self.bench.engine.generate(msgspec.structs.replace(request, request_id=request_id), sink)

    def embed(self, call: Call) -> None:
        request: EmbedRequest = call.request
        self.embedded.append(request)
        request_id = RequestId(f"{request.request_id}/{next(self._numbers)}")
        call.on_cancel(lambda: self.bench.engine.abort(request_id))
        if self.dies_after == 0:
            call.end(StatorError(ErrorCode.INSTANCE_LOST, "the instance was lost"))
            return
        self.bench.engine.embed(msgspec.structs.replace(request, request_id=request_id), call)


class _Passed:
    def __init__(self, worker: Worker, call: Call, request_id: RequestId) -> None:
        self._worker, self._call, self._request_id = worker, call, request_id
        self._left = worker.dies_after
        self._over = False

    def items(self, items: Sequence[TokenDelta], /) -> None:
        if self._over:
            return
        if self._left == 0:
            self._over = True
            self._call.end(StatorError(ErrorCode.INSTANCE_LOST, "the instance was lost"))
            self._worker.bench.engine.abort(self._request_id)
            return
        if self._left is not None:
            self._left -= 1
        self._call.items(items)

    def end(self, error: StatorError | None = None, /) -> None:
        if not self._over and not self._call.cancelled:
            self._call.end(error)


class World:
    def __init__(
        self, app: FrontendApp, processor: Processor, tokenizer: ModelTokenizer, workers: list[Worker]
    ) -> None:
        self.app = app
        self.processor = processor
        self.tokenizer = tokenizer
        self.workers = workers

    def client(self) -> AsgiClient:
        return AsgiClient(self.app)

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        answer = await self.client().request("POST", path, json.dumps({"model": MODEL, **body}).encode())
        assert answer.status < 500, answer.body
        return answer

    async def chat(self, text: str = "Tell me of the sea", **fields: Any) -> Any:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "ignore_eos": True, **fields}
        return await self._answer("/v1/chat/completions", body)

    async def complete(self, prompt: Any = "In the beginning was the", **fields: Any) -> Any:
        body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, **fields}
        return await self._answer("/v1/completions", body)

    async def _answer(self, path: str, body: dict[str, Any]) -> Any:
        """The body, or the events of a stream without [DONE]."""
        answer = await self.post(path, body)
        assert answer.status == 200, answer.body
        if not body.get("stream"):
            return answer.json
        *events, done = answer.events
        assert done == "[DONE]"
        return events


@asynccontextmanager
async def world(*engines: Engine) -> AsyncIterator[World]:
    network = InProcessNetwork()
    async with AsyncExitStack() as stack:
        benches = await stack.enter_async_context(running_engines(*(engines or (local_engine(),))))
        workers = [Worker(bench) for bench in benches]
        names = [f"w{index}" for index in range(len(workers))]
        router = FakeRouter(names)
        client = RequestPlaneClient(Identity(), network=network)
        stack.push_async_callback(client.close)

        async def serve(name: str, *endpoints: Endpoint) -> None:
            server = RequestPlaneServer(
                Identity(instance_id=InstanceId(name)), Listen(host=None, inproc_name=name), network=network
            )
            for endpoint in endpoints:
                server.register(endpoint)
            await server.start()
            stack.push_async_callback(server.close)

        await serve("router", Endpoint("route", RouteRequest, router.route))
        for name, worker in zip(names, workers, strict=True):
            await serve(
                name,
                Endpoint("generate", EngineRequest, worker.generate),
                Endpoint("embed", EmbedRequest, worker.embed),
            )
        tokenizer = ModelTokenizer.load(resolve_model(MODEL))
        processor = Processor(
            model_names=(MODEL,),
            tokenizer=tokenizer,
            block_size=BLOCK,
            max_model_len=MAX_MODEL_LEN,
            client=client,
            router=Target(("inproc://router",), "route"),
            rng=Random(1),
        )
        stack.push_async_callback(processor.close)
        await serve("processor", *processor.endpoints())
        app = FrontendApp(
            client=client,
            targets=lambda endpoint: [Target(("inproc://processor",), endpoint)],
            models=lambda: [ModelCard(MODEL, 1, MAX_MODEL_LEN)],
            health=lambda: HealthReport(True, [], {MODEL: ModelHealth(1, 1)}),
            metrics=Metrics(),
            rng=Random(1),
            wall=lambda: 1,
        )
        yield World(app, processor, tokenizer, workers)
