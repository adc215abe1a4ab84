"""Engines joined by an in-process request plane, and sinks that check what a stream may do."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stator.engines.base import Engine
from stator.errors import StatorError
from stator.ids import InstanceId
from stator.messages.engine import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineInfo,
    EngineRequest,
    FinishReason,
    KvEvent,
    PrefillResult,
    TokenDelta,
)
from stator.runtime.context import CallContext
from stator.transport import (
    Endpoint,
    Identity,
    InProcessNetwork,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    Sink,
    StreamHandle,
    Target,
    TransportClient,
)

WAIT_S = 60.0
"""An engine may compile kernels meanwhile, on a machine that does other things too."""


class RecordingSink:
    """Keeps everything; fails on what no stream may do: items after the end, or two ends."""

    def __init__(self, on_items: Callable[[], None] | None = None) -> None:
        self.received: list[Any] = []
        self.error: StatorError | None = None
        self.ended = asyncio.Event()
        self.started = asyncio.Event()
        self._on_items = on_items

    def items(self, items: Sequence[Any], /) -> None:
        assert not self.ended.is_set(), "items after the end"
        self.received.extend(items)
        self.started.set()
        if self._on_items is not None:
            self._on_items()

    def end(self, error: StatorError | None = None, /) -> None:
        assert not self.ended.is_set(), "two ends"
        self.error = error
        self.ended.set()

    async def wait(self) -> "RecordingSink":
        """Until the end; raises the stream's error."""
        await asyncio.wait_for(self.ended.wait(), WAIT_S)
        if self.error is not None:
            raise self.error
        return self

    async def wait_error(self) -> StatorError:
        await asyncio.wait_for(self.ended.wait(), WAIT_S)
        assert self.error is not None, "the stream ended without an error"
        return self.error

    @property
    def deltas(self) -> list[TokenDelta]:
        return self.received

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.deltas[-1].finish_reason

    @property
    def num_cached(self) -> int:
        """On the first delta, and only there."""
        assert [delta.num_cached_tokens for delta in self.deltas[1:]] == [None] * (len(self.deltas) - 1)
        assert (num_cached := self.deltas[0].num_cached_tokens) is not None
        return num_cached

    @property
    def num_transferred(self) -> int:
        return self.deltas[0].num_transferred_tokens

    @property
    def prefill_result(self) -> PrefillResult:
        (result,) = self.received
        assert isinstance(result, PrefillResult)
        return result


class KvMirror:
    """What a router knows from an engine's events; fails on events that make no sense in their order."""

    def __init__(self) -> None:
        self.hashes: set[int] = set()
        self.num_removed = 0

    def __call__(self, events: Sequence[KvEvent], /) -> None:
        for event in events:
            if isinstance(event, BlocksStored):
                assert event.parent_hash is None or event.parent_hash in self.hashes, "stored without its parent"
                assert not self.hashes.intersection(event.block_hashes), "stored twice"
                self.hashes.update(event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                assert self.hashes.issuperset(event.block_hashes), "removed what was not stored"
                self.hashes.difference_update(event.block_hashes)
                self.num_removed += len(event.block_hashes)
            else:
                assert isinstance(event, BlocksCleared)
                self.hashes.clear()


class _WatchingSink:
    """Passes a stream on, and tells when its first items have come."""

    def __init__(self, sink: Sink, on_items: Callable[[], None]) -> None:
        self._sink = sink
        self._on_items = on_items

    def items(self, items: Sequence[Any], /) -> None:
        self._sink.items(items)
        self._on_items()

    def end(self, error: StatorError | None = None, /) -> None:
        self._sink.end(error)


class BenchClient:
    """A TransportClient. on_items(endpoint): called when items of a stream have arrived, to act in its midst."""

    def __init__(self, client: RequestPlaneClient) -> None:
        self._client = client
        self.on_items: Callable[[str], None] | None = None

    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        on_items = self.on_items
        if on_items is not None:
            sink = _WatchingSink(sink, lambda: on_items(target.endpoint))
        return self._client.open(target, request, sink, context=context, item_type=item_type)

    async def close(self) -> None:
        await self._client.close()


class BenchHost:
    """An EngineHost. network None: over TCP. dead: why the engine said that it is, once it did."""

    def __init__(self, name: str, network: InProcessNetwork | None) -> None:
        self.instance_id = InstanceId(name)
        self.network = network
        self.identity = identity = Identity(instance_id=self.instance_id, token="bench")
        listen = Listen() if network is None else Listen(host=None, inproc_name=name)
        self.server = RequestPlaneServer(identity, listen, network=network)
        self.watched_client = BenchClient(RequestPlaneClient(identity, network=network))
        self.client: TransportClient = self.watched_client
        self.dead: list[str] = []

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.server.addresses

    def register(self, endpoint: Endpoint) -> None:
        self.server.register(endpoint)

    def on_dead(self, reason: str) -> None:
        self.dead.append(reason)


@dataclass(frozen=True, slots=True)
class BenchEngine:
    """A started engine with its host."""

    engine: Engine
    host: BenchHost
    info: EngineInfo

    def generate(self, request: EngineRequest) -> RecordingSink:
        sink = RecordingSink()
        self.engine.generate(request, sink)
        return sink

    async def text(self, request: EngineRequest) -> list[int]:
        return (await self.generate(request).wait()).token_ids

    async def prefill(self, request: EngineRequest) -> PrefillResult:
        sink = RecordingSink()
        self.engine.prefill(request, sink)
        return (await sink.wait()).prefill_result

    async def until_idle(self) -> None:
        """Until no sequence and no transfer uses a block."""
        await until(lambda: self.engine.load().num_blocks_used == 0)
        load = self.engine.load()
        assert (load.num_running, load.num_waiting, load.num_blocks_held) == (0, 0, 0)


async def until(condition: Callable[[], bool]) -> None:
    """Until something becomes true of which no event tells; looks often."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.0005)


@contextlib.asynccontextmanager
async def running_engines(*engines: Engine, tcp: bool = False) -> AsyncGenerator[list[BenchEngine]]:
    """Start engines that reach each other, in process or over TCP; stop them at the end."""
    network = None if tcp else InProcessNetwork()
    async with contextlib.AsyncExitStack() as stack:
        started: list[BenchEngine] = []
        for index, engine in enumerate(engines):
            host = BenchHost(f"engine-{index}", network)
            await host.server.start()
            stack.push_async_callback(host.server.close)
            stack.push_async_callback(host.client.close)
            stack.push_async_callback(engine.stop)
            started.append(BenchEngine(engine, host, await engine.start(host)))
        yield started
