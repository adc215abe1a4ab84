import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from stator.testing.clock import run_virtual
from stator.testing.contracts.discovery import DiscoveryContract, DiscoveryLossContract
from stator.testing.external_world import EtcdWorld
from stator.testing.hub_world import HubWorld, LosableWorld, MemoryWorld, World, WorldLimits

SHORT = WorldLimits(lease_ttl_s=0.6, timeout_s=1.0, return_window_s=0.2)

ETCD = WorldLimits(lease_ttl_s=2.0, timeout_s=1.5, return_window_s=0.2, revisions_outlive_the_state=False)


async def in_memory(scenario: Callable[[World], Awaitable[None]]) -> None:
    world = MemoryWorld()
    try:
        await scenario(world)
    finally:
        await world.close()


async def on_server(scenario: Callable[[LosableWorld], Awaitable[None]], world: HubWorld | EtcdWorld) -> None:
    await world.start()
    try:
        await scenario(world)
    finally:
        await world.close()
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert left == []


class TestMemory(DiscoveryContract):
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        run_virtual(in_memory(scenario))


class TestHubInProcess(DiscoveryContract, DiscoveryLossContract):
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        run_virtual(on_server(scenario, HubWorld()))

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        run_virtual(on_server(scenario, HubWorld()))


class TestHubOverTcp(DiscoveryContract, DiscoveryLossContract):
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        asyncio.run(on_server(scenario, HubWorld(SHORT, tcp=True)))

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        asyncio.run(on_server(scenario, HubWorld(SHORT, tcp=True)))


@pytest.mark.servers
class TestEtcd(DiscoveryContract, DiscoveryLossContract):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        asyncio.run(on_server(scenario, EtcdWorld(self.directory, ETCD)))

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        asyncio.run(on_server(scenario, EtcdWorld(self.directory, ETCD)))
