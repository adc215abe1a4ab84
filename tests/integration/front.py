"""A Router and a Processor in front of a Deployment, on loopback TCP like the rest of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from deployment import TOKEN, Deployment, Node, deployed

from stator.core.routing import RouterMode
from stator.errors import StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.openai import CompletionRequest
from stator.messages.processor import CompletionDelta, RouteRequest
from stator.messages.routing import RouteObservations
from stator.processor import ModelTokenizer, Processor, ProcessorSettings
from stator.router.router import Router
from stator.runtime.context import CallContext, loop_time
from stator.transport import Endpoint, Identity, Listen, RequestPlaneClient, RequestPlaneServer, StreamHandle, Target
from stator.worker import DecodeWorker, PrefillWorker
from unit.processor import tokenizers_for_tests

MAX_MODEL_LEN = 512
PROMPT_IDS = 380
"""Token ids of prompts are below this."""


class Answered:
    """A client's stream."""

    def __init__(self) -> None:
        self.deltas: list[CompletionDelta] = []
        self.error: StatorError | None = None
        self.first = asyncio.Event()
        self.ended = asyncio.Event()
        self.handle: StreamHandle | None = None

    def items(self, items: Any, /) -> None:
        assert not self.ended.is_set()
        self.deltas += items
        self.first.set()

    def end(self, error: StatorError | None = None, /) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()

    def cancel(self) -> None:
        assert self.handle is not None
        self.handle.cancel()

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    async def wait(self) -> "Answered":
        async with asyncio.timeout(20):
            await self.ended.wait()
        return self


class Front:
    """d: the workers behind it. Requests are completions of token ids, greedy."""

    def __init__(self, d: Deployment, migration_wait_s: float) -> None:
        self.d = d
        self.router = Router(
            client=d.client, directory=d.directory, mode=RouterMode.LEAST_LOADED, min_workers=1, rng=Random(1)
        )
        identity = Identity(instance_id=InstanceId("front"), token=TOKEN)
        self.server = RequestPlaneServer(identity, Listen())
        self.client = RequestPlaneClient(identity)
        self._migration_wait_s = migration_wait_s
        self._num_requests = 0

    async def start(self) -> None:
        self.server.register(Endpoint("route", RouteRequest, self.router.route))
        self.server.register(Endpoint("observe", RouteObservations, self.router.observe))
        await self.server.start()
        self.processor = Processor(
            model_names=["m"],
            tokenizer=ModelTokenizer(tokenizers_for_tests.byte_level(), special_tokens={"eos_token": "<|im_end|>"}),
            block_size=4,
            max_model_len=MAX_MODEL_LEN,
            client=self.client,
            router=Target(self.server.addresses, "route"),
            rng=Random(1),
            directory=self.d.directory,
            settings=ProcessorSettings(migration_wait_s=self._migration_wait_s),
        )
        for endpoint in self.processor.endpoints():
            self.server.register(endpoint)

    async def close(self) -> None:
        await self.processor.close()
        self.router.close()
        await self.client.close()
        await self.server.close()

    def ask(self, prompt: list[int], max_tokens: int = 8, **fields: Any) -> Answered:
        self._num_requests += 1
        answered = Answered()
        values: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}
        request = CompletionRequest(model="m", prompt=prompt, **values)
        context = CallContext(RequestId(f"request-{self._num_requests}"))
        target = Target(self.server.addresses, "completions")
        answered.handle = self.d.client.open(target, request, answered, context=context, item_type=CompletionDelta)
        return answered

    async def left_over(self) -> list[str]:
        """What is still held for any request, anywhere."""
        size = await self.d.queue.size()
        found = {
            "requests at the Processor": self.processor.num_open,
            "attempts at the Processor": self.processor._instances.num_open,
            "bookings": self.router.report().router.num_bookings,  # type: ignore[union-attr]
            "jobs waiting": size.waiting,
            "jobs in flight": size.in_flight,
        }
        for node in self.d.nodes:
            load, name = node.engine.load(), node.instance_id
            found[f"blocks of {name}"] = load.num_blocks_used
            found[f"blocks held by {name}"] = load.num_blocks_held
            found[f"sequences of {name}"] = load.num_running + load.num_waiting
            worker = node.worker
            if isinstance(worker, DecodeWorker):
                found[f"requests of {name}"] = worker._num_open + len(worker._pending) + len(worker._in_engine)
            else:
                assert isinstance(worker, PrefillWorker)
                found[f"jobs of {name}"] = len(worker._in_hand)
        return [f"{count} {what}" for what, count in found.items() if count]

    async def all_free(self, within_s: float = 1.0) -> float:
        """Wait until nothing is held; returns how long it took. Fails with what is left."""
        begin = loop_time()
        while left := await self.left_over():
            assert loop_time() - begin < within_s, f"after {within_s} s there are still {left}"
            await asyncio.sleep(0.005)
        return loop_time() - begin


@asynccontextmanager
async def fronted(
    lease_ttl_s: float = 10.0, migration_wait_s: float = 30.0, **args: Any
) -> AsyncIterator[tuple[Deployment, Front]]:
    async with deployed(lease_ttl_s, **args) as d:
        front = Front(d, migration_wait_s)
        await front.start()
        try:
            yield d, front
        finally:
            await front.close()


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Until something becomes true of which no event tells; looks often."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def seen(d: Deployment, *nodes: Node) -> None:
    """Until discovery shows the nodes."""
    await d.directory.wait_for(lambda known: all(known.get(node.instance_id) for node in nodes), 5)
