import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from stator.core.job_queue import QueueLimits
from stator.testing.clock import run_virtual
from stator.testing.contracts.queue import QueueContract, QueueLossContract
from stator.testing.external_world import NatsWorld
from stator.testing.hub_world import HubWorld, LosableWorld, MemoryWorld, World, WorldLimits

SHORT = WorldLimits(
    lease_ttl_s=0.6,
    timeout_s=1.0,
    return_window_s=0.2,
    queue=QueueLimits(ack_wait_s=1.0, steal_after_s=0.3, max_waiting=8, max_dead_letters=4),
)

NATS = WorldLimits(
    lease_ttl_s=2.0,
    timeout_s=2.0,
    lease_end_s=2.0,
    queue=QueueLimits(ack_wait_s=3.0, steal_after_s=0.3, max_waiting=8, max_dead_letters=4),
)


async def in_memory(scenario: Callable[[World], Awaitable[None]]) -> None:
    world = MemoryWorld()
    try:
        await scenario(world)
    finally:
        await world.close()


async def on_server(scenario: Callable[[LosableWorld], Awaitable[None]], world: HubWorld | NatsWorld) -> None:
    await world.start()
    try:
        await scenario(world)
    finally:
        await world.close()
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert left == []


class TestMemory(QueueContract):
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        run_virtual(in_memory(scenario))


class TestHubInProcess(QueueContract, QueueLossContract):
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        run_virtual(on_server(scenario, HubWorld()))

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        run_virtual(on_server(scenario, HubWorld()))


class TestHubOverTcp(QueueContract, QueueLossContract):
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        asyncio.run(on_server(scenario, HubWorld(SHORT, tcp=True)))

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        asyncio.run(on_server(scenario, HubWorld(SHORT, tcp=True)))


@pytest.mark.servers
class TestNats(QueueContract, QueueLossContract):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        asyncio.run(on_server(scenario, NatsWorld(self.directory, NATS)))

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        asyncio.run(on_server(scenario, NatsWorld(self.directory, NATS)))
