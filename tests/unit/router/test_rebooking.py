"""A router that has just started, and requests that another router placed."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from stator.core.routing import RouterMode
from stator.discovery.memory import MemoryDiscovery
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.engine import EngineInfo
from stator.messages.instances import InstanceInfo
from stator.messages.processor import RouteDecision, RouteRequest
from stator.router.router import Router
from stator.runtime.context import CallContext
from stator.runtime.directory import InstanceDirectory, register_instance
from stator.testing.clock import run_virtual
from stator.transport.base import Endpoint, StreamHandle, Target
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

ENGINE = EngineInfo("fake", "1", "m", 16, 1024, 8, 512, 2048)


class Asked:
    """One `route` call."""

    def __init__(self) -> None:
        self.decisions: list[RouteDecision] = []
        self.error: StatorError | None = None
        self.handle: StreamHandle | None = None

    def items(self, items: Sequence[Any], /) -> None:
        self.decisions += items

    def end(self, error: StatorError | None = None, /) -> None:
        self.error = error


@dataclass
class World:
    router: Router
    client: RequestPlaneClient

    def ask(self, request: RouteRequest) -> Asked:
        asked = Asked()
        target = Target(("inproc://router",), "route")
        context = CallContext(RequestId("r"))
        asked.handle = self.client.open(target, request, asked, context=context, item_type=RouteDecision)
        return asked


@asynccontextmanager
async def one_worker(mode: RouterMode, min_workers: int) -> AsyncGenerator[World]:
    network = InProcessNetwork()
    client = RequestPlaneClient(Identity(), network=network)
    server = RequestPlaneServer(Identity(), Listen(host=None, inproc_name="router"), network=network)
    discovery = MemoryDiscovery()
    directory = InstanceDirectory(discovery)
    await directory.start()
    info = InstanceInfo(InstanceId("w1"), "W", "decode", ("inproc://w1",), (), "h", 1, model="m", engine=ENGINE)
    await register_instance(discovery, await discovery.grant_lease(), info)
    await directory.wait_for(lambda d: bool(d.instances()), 5.0)
    router = Router(client=client, directory=directory, mode=mode, min_workers=min_workers, rng=Random(1))
    server.register(Endpoint("route", RouteRequest, router.route))
    await server.start()
    yield World(router, client)
    router.close()
    await client.close()
    await server.close()
    await directory.close()
    await discovery.close()


def num_bookings(world: World) -> int:
    stats = world.router.report().router
    assert stats is not None
    return stats.num_bookings


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_bookings_of_another_router_are_taken_over_and_end_with_their_calls() -> None:
    async def main() -> None:
        async with one_worker(RouterMode.KV, 1) as world:
            running = RouteRequest("m", 100, 50, begun=True, booked_on=InstanceId("w1"), started=True)
            # More than the worker would be given, and one on an instance that this router has not heard of.
            asked = [world.ask(running) for _ in range(20)]
            asked.append(world.ask(RouteRequest("m", 100, 50, begun=True, booked_on=InstanceId("unheard-of"))))
            await turns()
            assert [a.decisions[0].instance_id for a in asked] == ["w1"] * 20 + ["unheard-of"]
            assert len({a.decisions[0].booking for a in asked}) == 21
            assert num_bookings(world) == 21
            # What is new waits until there is room, as if this router had placed them all.
            new = world.ask(RouteRequest("m", 100, 50, begun=True))
            await turns()
            assert (new.decisions, new.error) == ([], None)
            for a in asked:
                assert a.handle is not None
                a.handle.cancel()
            await turns()
            assert [d.instance_id for d in new.decisions] == ["w1"]
            assert num_bookings(world) == 1

    run_virtual(main())


def test_min_workers_is_for_the_first_start_only() -> None:
    async def main() -> None:
        for begun in (
            RouteRequest("m", 10, 5, begun=True),
            RouteRequest("m", 10, 5, booked_on=InstanceId("w1"), begun=True),
        ):
            async with one_worker(RouterMode.ROUND_ROBIN, 2) as world:
                first = world.ask(RouteRequest("m", 10, 5))
                await turns()
                assert first.error is not None
                assert first.error.code is ErrorCode.NO_INSTANCE
                world.ask(begun)
                await turns()
                later = world.ask(RouteRequest("m", 10, 5))
                await turns()
                assert len(later.decisions) == 1

    run_virtual(main())
