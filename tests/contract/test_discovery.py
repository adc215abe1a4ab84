import asyncio
from collections.abc import Awaitable, Callable

from stator.testing.clock import run_virtual
from stator.testing.contracts.discovery import DiscoveryContract, DiscoveryLossContract
from stator.testing.hub_world import HubWorld, LosableWorld, MemoryWorld, World, WorldLimits

SHORT = WorldLimits(lease_ttl_s=0.6, timeout_s=1.0)


async def in_memory(scenario: Callable[[World], Awaitable[None]]) -> None:
    world = MemoryWorld()
    try:
        await scenario(world)
    finally:
        await world.close()


async def on_hub(scenario: Callable[[LosableWorld], Awaitable[None]], world: HubWorld) -> None:
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
        run_virtual(on_hub(scenario, HubWorld()))

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        run_virtual(on_hub(scenario, HubWorld()))


class TestHubOverTcp(DiscoveryContract, DiscoveryLossContract):
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        asyncio.run(on_hub(scenario, HubWorld(SHORT, tcp=True)))

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        asyncio.run(on_hub(scenario, HubWorld(SHORT, tcp=True)))
