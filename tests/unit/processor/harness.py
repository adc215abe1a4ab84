"""A Processor on the real in-process carrier, with a router and workers that follow a script."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

from stator.errors import StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.engine import EngineRequest, FinishReason, TokenDelta
from stator.messages.processor import CompletionDelta, RouteDecision, RouteRequest
from stator.processor.processor import Processor, ProcessorSettings
from stator.processor.tokenizer import ModelTokenizer
from stator.processor.validation import SamplingDefaults
from stator.runtime.context import CallContext, loop_time
from stator.transport.base import Call, Endpoint, StreamHandle, Target
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

from . import tokenizers_for_tests as fixtures

TIMEOUT_S = 10.0


class Collected:
    """What a client got. `changed` is notified at every item and at the end."""

    def __init__(self) -> None:
        self.deltas: list[CompletionDelta] = []
        self.error: StatorError | None = None
        self.ended = False
        self._event = asyncio.Event()
        self.handle: StreamHandle | None = None

    def items(self, items: Any, /) -> None:
        assert not self.ended
        self.deltas += items
        self._event.set()

    def end(self, error: StatorError | None = None, /) -> None:
        assert not self.ended
        self.ended, self.error = True, error
        self._event.set()

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._event.clear()
                await self._event.wait()

    async def done(self) -> "Collected":
        await self.until(lambda: self.ended)
        return self


class FakeRouter:
    """Hands out the instances in turn, without the excluded ones; `failures` come first. falls_back: if only excluded
    ones are left they are used, as the product's router does. answers: False leaves every call waiting."""

    def __init__(self, instances: list[str]) -> None:
        self.instances = instances
        self.requests: list[RouteRequest] = []
        self.failures: list[StatorError] = []
        self.no_instance: StatorError | None = None
        self.falls_back = False
        self.answers = True
        self.calls: list[Call] = []
        self.num_bookings = 0
        self._released_event = asyncio.Event()
        self._asked = asyncio.Event()

    def route(self, call: Call) -> None:
        request: RouteRequest = call.request
        self.requests.append(request)
        self.calls.append(call)
        self._asked.set()
        if not self.answers:
            self.num_bookings += 1
            call.on_cancel(self._released)
            return
        if self.failures:
            call.end(self.failures.pop(0))
            return
        if request.booked_on is not None:
            self.num_bookings += 1
            call.on_cancel(self._released)
            call.items([RouteDecision(request.booked_on, (), booking=len(self.requests))])
            return
        left = [name for name in self.instances if name not in request.exclude]
        if not left and self.falls_back:
            left = self.instances
        if not left:
            assert self.no_instance is not None
            call.end(self.no_instance)
            return
        self.num_bookings += 1
        call.on_cancel(self._released)
        call.items([RouteDecision(InstanceId(left[0]), (f"inproc://{left[0]}",))])

    def _released(self) -> None:
        self.num_bookings -= 1
        self._released_event.set()

    async def until_asked(self) -> None:
        await asyncio.wait_for(self._asked.wait(), TIMEOUT_S)

    async def until_no_booking(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while self.num_bookings:
                self._released_event.clear()
                await self._released_event.wait()


class FakeWorker:
    """Collects calls; the test answers them by hand or through `script`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.num_cancelled = 0
        self.script: Callable[[Call], None] | None = None
        self._event = asyncio.Event()

    def generate(self, call: Call) -> None:
        call.on_cancel(self._cancelled)
        self.calls.append(call)
        self._event.set()
        if self.script is not None:
            self.script(call)

    def _cancelled(self) -> None:
        self.num_cancelled += 1
        self._event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._event.clear()
                await self._event.wait()

    async def call(self, index: int = 0) -> Call:
        await self.until(lambda: len(self.calls) > index)
        return self.calls[index]


def answer_with(
    token_ids: list[int],
    *,
    cached: int = 0,
    finish: FinishReason | None = FinishReason.LENGTH,
    error: StatorError | None = None,
    size: int = 1,
) -> Callable[[Call], None]:
    """A worker's script: these ids, `size` a delta, then the finish reason or the error."""

    def script(call: Call) -> None:
        pieces = [token_ids[at : at + size] for at in range(0, len(token_ids), size)]
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1 and error is None
            call.items([TokenDelta(piece, finish if last else None, cached if index == 0 else None)])
        call.end(error)

    return script


class Harness:
    def __init__(self, tokenizer: ModelTokenizer, workers: list[str], **options: Any) -> None:
        self.network = InProcessNetwork()
        self.tokenizer = tokenizer
        self.router = FakeRouter(workers)
        self.workers = {name: FakeWorker() for name in workers}
        self.client = RequestPlaneClient(Identity(), network=self.network)
        self.servers = [
            self._server("router", [Endpoint("route", RouteRequest, self.router.route)]),
            *(
                self._server(name, [Endpoint("generate", EngineRequest, worker.generate)])
                for name, worker in self.workers.items()
            ),
        ]
        self.processor = Processor(
            model_names=("tiny", "alias"),
            tokenizer=tokenizer,
            block_size=4,
            max_model_len=options.pop("max_model_len", 256),
            client=self.client,
            router=options.pop("router", Target(("inproc://router",), "route")),
            rng=Random(1),
            directory=options.pop("directory", None),
            settings=ProcessorSettings(**options),
            defaults=SamplingDefaults(),
        )
        self.servers.append(self._server("processor", self.processor.endpoints()))

    def _server(self, name: str, endpoints: list[Endpoint]) -> RequestPlaneServer:
        server = RequestPlaneServer(
            Identity(instance_id=InstanceId(name)), Listen(host=None, inproc_name=name), network=self.network
        )
        for endpoint in endpoints:
            server.register(endpoint)
        return server

    def open(self, endpoint: str, request: Any, *, seconds: float | None = None) -> Collected:
        collected = Collected()
        deadline = None if seconds is None else loop_time() + seconds
        collected.handle = self.client.open(
            Target(("inproc://processor",), endpoint),
            request,
            collected,
            context=CallContext(RequestId("r1"), deadline),
            item_type=CompletionDelta,
        )
        return collected


@asynccontextmanager
async def harness(
    workers: list[str] | None = None, *, template: str = fixtures.CHATML, model_dir: Path | None = None, **options: Any
) -> AsyncIterator[Harness]:
    """model_dir: an empty directory for the model's files, which processes of their own can load then."""
    special_tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    if model_dir is None:
        tokenizer = ModelTokenizer(
            fixtures.byte_level(), special_tokens=special_tokens, chat_template=(template, "test")
        )
    else:
        fixtures.byte_level().save(str(model_dir / "tokenizer.json"))
        (model_dir / "tokenizer_config.json").write_text(json.dumps({**special_tokens, "chat_template": template}))
        tokenizer = ModelTokenizer.load(model_dir)
    made = Harness(tokenizer, workers or ["w1"], **options)
    for server in made.servers:
        await server.start()
    try:
        yield made
    finally:
        await made.processor.close()
        await made.client.close()
        for server in reversed(made.servers):
            await server.close()
