"""A client that reads nothing, from the HTTP application to the engine's blocks, on a virtual clock."""

import asyncio
from collections.abc import Sequence
from random import Random

import msgspec

from stator.core.routing import RouterMode
from stator.engines.sim.args import SimEngineArgs
from stator.frontend.app import FrontendApp
from stator.frontend.health import HealthReport
from stator.frontend.settings import FrontendSettings
from stator.frontend.stream import DeltaStream
from stator.messages.openai import ModelCard
from stator.observability.metrics import Metrics
from stator.runtime.context import loop_time
from stator.testing.clock import run_virtual
from stator.testing.overload import MAX_MODEL_LEN, engine_args
from stator.testing.routing_world import MODEL, RoutingWorld, eventually, routing_world, sim_engines
from stator.transport.settings import TransportSettings
from unit.frontend.frontend_fakes import AsgiClient, text_body

NUM_TOKENS = 1900
SLOW_AFTER_S = 10.0
SETTINGS = FrontendSettings(max_buffered_deltas=64, slow_reader_timeout_s=SLOW_AFTER_S)


def args() -> SimEngineArgs:
    return msgspec.structs.replace(engine_args(8), num_gpu_blocks_override=8 * MAX_MODEL_LEN // 64)


def frontend(world: RoutingWorld, settings: FrontendSettings = SETTINGS) -> FrontendApp:
    return FrontendApp(
        client=world.client,
        targets=world.targets,
        models=lambda: [ModelCard(MODEL, 1, MAX_MODEL_LEN)],
        health=lambda: HealthReport(True, [], {}),
        metrics=Metrics(),
        settings=settings,
        rng=Random(1),
        wall=lambda: 1.0,
    )


class Reader:
    """One streamed request. texts_at: when each part of its answer came."""

    def __init__(self, app: FrontendApp, seed: int, max_tokens: int = NUM_TOKENS) -> None:
        self.client = AsgiClient(app)
        prompt = Random(seed).choices(range(10, 4000), k=64)
        body = text_body(model=MODEL, prompt=prompt, max_tokens=max_tokens, stream=True, ignore_eos=True, temperature=0)
        self.begun = loop_time()
        self.task = asyncio.get_running_loop().create_task(self._run(body))
        self.ended = 0.0

    async def _run(self, body: bytes) -> None:
        await self.client.request("POST", "/v1/completions", body)
        self.ended = loop_time()

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


def streams(app: FrontendApp) -> list[DeltaStream]:
    return list(app.generation._streams)  # pyright: ignore[reportPrivateUsage]


def num_buffered(stream: DeltaStream) -> int:
    return len(stream._pending)  # pyright: ignore[reportPrivateUsage]


async def with_readers(num_well: int, num_slow: int) -> tuple[list[float], Sequence[Reader], int]:
    """(seconds of those that read, those that do not, most deltas that one stream held in the Frontend)."""
    most = 0
    async with routing_world(RouterMode.KV, 1, sim_engines(args()), in_process=True) as world:
        app = frontend(world)
        slow = [Reader(app, 100 + n) for n in range(num_slow)]
        for reader in slow:
            await reader.client.sent.wait()
            reader.client.gate.clear()
        well = [Reader(app, n, max_tokens=200) for n in range(num_well)]

        async def watch() -> None:
            nonlocal most
            while True:
                most = max([most, *map(num_buffered, streams(app))])
                await asyncio.sleep(0.01)

        watcher = asyncio.get_running_loop().create_task(watch())
        await asyncio.gather(*(reader.task for reader in well))
        if slow:
            engine = world.workers[0].engine
            await eventually(lambda: engine.load().num_running == 0, 60.0)
            assert SLOW_AFTER_S < loop_time() - slow[0].begun < 2 * SLOW_AFTER_S
            assert engine.load().num_blocks_used == 0
            assert engine.load().generation_tokens_total < num_slow * NUM_TOKENS, "it was stopped, it did not finish"
            assert world.stats().num_bookings == 0
        watcher.cancel()
        for reader in slow:
            reader.client.gate.set()
        await asyncio.gather(*(reader.task for reader in slow))
        assert app.generation.num_open == 0
    return [reader.seconds for reader in well], slow, most


def test_a_client_that_reads_nothing_is_ended_and_its_blocks_are_free() -> None:
    _, [slow], most = run_virtual(with_readers(0, 1))
    assert most <= SETTINGS.max_buffered_deltas + TransportSettings().window_items
    body = slow.client.answer.body
    assert b"slow_reader" in body
    assert body.count(b'"error"') == 1
    assert b"[DONE]" not in body


def test_clients_that_read_nothing_delay_no_other() -> None:
    """They take places in the batch until they are ended, as any request does, and nothing else: with as many that
    read in their place the others take as long."""
    with_slow, _, _ = run_virtual(with_readers(3, 4))

    async def all_read() -> list[float]:
        async with routing_world(RouterMode.KV, 1, sim_engines(args()), in_process=True) as world:
            app = frontend(world)
            before = [Reader(app, 100 + n) for n in range(4)]
            for reader in before:
                await reader.client.sent.wait()
            well = [Reader(app, n, max_tokens=200) for n in range(3)]
            await asyncio.gather(*(reader.task for reader in well))
            for reader in before:
                reader.client.leave()
            await asyncio.gather(*(reader.task for reader in before))
        return [reader.seconds for reader in well]

    assert with_slow == run_virtual(all_read())
