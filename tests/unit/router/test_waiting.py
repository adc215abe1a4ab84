"""Requests that wait at the Router, from the client's side: one simulated worker, few places, on a virtual clock."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from stator.core.admission import QueueLimits
from stator.core.routing import RouterMode
from stator.core.worker_load import seqs_let_in
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.processor import RouteDecision, RouteRequest
from stator.runtime.context import CallContext, loop_time
from stator.testing.clock import run_virtual
from stator.testing.overload import VOCABULARY, engine_args
from stator.testing.routing_world import MODEL, Answer, RoutingWorld, eventually, routing_world, sim_engines
from stator.transport.base import StreamHandle, Target

PLACES = 2
LET_IN = seqs_let_in(PLACES)
LONG = 400
"""Output tokens: about ten seconds."""


def prompt(num_tokens: int = 64, seed: int = 1) -> list[int]:
    return Random(seed).choices(VOCABULARY, k=num_tokens)


def run(
    scene: Callable[[RoutingWorld], Awaitable[None]],
    limits: QueueLimits | None = None,
    mode: RouterMode = RouterMode.KV,
    num_workers: int = 1,
) -> None:
    async def main() -> None:
        engines = sim_engines(engine_args(PLACES))
        async with routing_world(mode, num_workers, engines, limits=limits, in_process=True) as world:
            await scene(world)

    run_virtual(main())


class Clients:
    """Each a task that asks once."""

    def __init__(self, world: RoutingWorld) -> None:
        self.world = world
        self.group: list[asyncio.Task[Answer]] = []

    def ask(self, max_tokens: int = LONG, *, deadline_s: float = 300.0, priority: int = 0) -> "asyncio.Task[Answer]":
        seed = len(self.group)
        asked = self.world.ask(prompt(seed=seed), max_tokens, deadline_s=deadline_s, priority=priority)
        task = asyncio.get_running_loop().create_task(asked)
        self.group.append(task)
        return task

    async def fill(self, num_waiting: int = 0) -> None:
        """As many as are let in, and so many more that wait."""
        for _ in range(LET_IN + num_waiting):
            self.ask()
        await eventually(lambda: self.world.stats().num_waiting == num_waiting and self.num_booked == LET_IN)

    async def leave(self) -> None:
        for task in self.group:
            task.cancel()
        await asyncio.gather(*self.group, return_exceptions=True)

    @property
    def num_booked(self) -> int:
        return self.world.stats().num_bookings


async def code(task: "asyncio.Task[Answer]") -> ErrorCode:
    with pytest.raises(StatorError) as caught:
        await task
    return caught.value.code


@pytest.mark.parametrize("mode", RouterMode)
def test_all_are_answered_in_order_and_the_engine_has_never_more_than_let_in(mode: RouterMode) -> None:
    async def scene(world: RoutingWorld) -> None:
        clients, most = Clients(world), 0
        for _ in range(12):
            clients.ask(20)

        async def watch() -> None:
            nonlocal most
            while True:
                load = world.workers[0].load
                most = max(most, load.num_running + load.num_waiting)
                await asyncio.sleep(0.01)

        watcher = asyncio.get_running_loop().create_task(watch())
        answers = await asyncio.gather(*clients.group)
        watcher.cancel()
        ends = [answer.seconds for answer in answers]
        assert ends == sorted(ends)
        assert most == LET_IN
        stats = world.stats()
        assert (stats.num_waiting, stats.num_waiting_tokens, stats.num_bookings) == (0, 0, 0)
        assert sum(stats.wait_counts) == 12
        assert stats.wait_sum_s > 0
        assert not stats.refusals

    run(scene, mode=mode)


def test_a_client_that_leaves_leaves_the_line_at_once() -> None:
    async def scene(world: RoutingWorld) -> None:
        clients = Clients(world)
        await clients.fill(2)
        assert world.stats().num_waiting_tokens == 2 * 64
        begin = loop_time()
        clients.group[-1].cancel()
        await eventually(lambda: world.stats().num_waiting == 1)
        assert loop_time() - begin < 0.01
        clients.group[0].cancel()
        await eventually(lambda: world.stats().num_waiting == 0)
        assert loop_time() - begin < 0.05, "the place of one that leaves is given on at once"
        await clients.leave()
        await eventually(lambda: world.stats().num_bookings == 0 and world.workers[0].load.num_blocks_used == 0)

    run(scene)


def test_the_wait_ends_with_the_deadline() -> None:
    async def scene(world: RoutingWorld) -> None:
        clients = Clients(world)
        await clients.fill()
        begin = loop_time()
        assert await code(clients.ask(deadline_s=1.0)) is ErrorCode.DEADLINE
        assert loop_time() - begin == pytest.approx(1.0, abs=0.01)
        assert world.stats().num_waiting == 0
        await clients.leave()

    run(scene)


def test_a_wait_longer_than_allowed_is_refused_with_the_time_to_come_back() -> None:
    async def scene(world: RoutingWorld) -> None:
        clients = Clients(world)
        await clients.fill()
        begin = loop_time()
        with pytest.raises(StatorError) as caught:
            await clients.ask()
        assert caught.value.code is ErrorCode.OVERLOADED
        assert caught.value.info.status == 429
        assert caught.value.retry_after_s is not None and caught.value.retry_after_s >= 1.0
        assert "2 s" in caught.value.message
        assert 2.0 <= loop_time() - begin <= 2.5
        assert world.stats().refusals == {"queue_wait": 1}
        await clients.leave()

    run(scene, QueueLimits(max_wait_ms=2000))


def test_a_full_line_refuses_at_once() -> None:
    async def scene(world: RoutingWorld) -> None:
        clients = Clients(world)
        await clients.fill(2)
        begin = loop_time()
        assert await code(clients.ask()) is ErrorCode.OVERLOADED
        assert loop_time() == begin
        assert world.stats().refusals == {"queue_full": 1}
        await clients.leave()

    run(scene, QueueLimits(max_requests=2))


def test_priority_goes_before_arrival() -> None:
    async def scene(world: RoutingWorld) -> None:
        clients = Clients(world)
        await clients.fill()
        later, sooner = clients.ask(1, priority=1), clients.ask(1, priority=-1)
        await eventually(lambda: world.stats().num_waiting == 2)
        clients.group[0].cancel()
        await sooner
        assert not later.done()
        await clients.leave()

    run(scene)


class _Decision:
    def __init__(self) -> None:
        self.decisions: list[RouteDecision] = []
        self.error: StatorError | None = None

    def items(self, items: Sequence[Any], /) -> None:
        self.decisions += items

    def end(self, error: StatorError | None = None, /) -> None:
        self.error = error


def route(world: RoutingWorld, request: RouteRequest) -> tuple[_Decision, StreamHandle]:
    sink = _Decision()
    target = Target(world.servers[0].addresses, "route")
    context = CallContext(RequestId("r"), loop_time() + 100)
    return sink, world.client.open(target, request, sink, context=context, item_type=RouteDecision)


def test_a_request_that_an_instance_had_already_goes_before_new_ones_and_past_the_bound() -> None:
    async def scene(world: RoutingWorld) -> None:
        request = RouteRequest(MODEL, 64, 16)
        running = [route(world, request) for _ in range(LET_IN)]
        new, _ = route(world, request)
        resumed, _ = route(world, msgspec.structs.replace(request, resumed=True))
        refused, _ = route(world, request)
        await eventually(lambda: refused.error is not None)
        assert world.stats().num_waiting == 2
        running[0][1].cancel()
        await eventually(lambda: bool(resumed.decisions))
        assert not new.decisions
        running[1][1].cancel()
        await eventually(lambda: bool(new.decisions))

    run(scene, QueueLimits(max_requests=1))


def test_what_can_never_fit_is_refused_and_does_not_wait() -> None:
    async def scene(world: RoutingWorld) -> None:
        info = world.workers[0].instance.engine
        assert info is not None
        size = info.num_blocks * info.block_size
        fits, _ = route(world, RouteRequest(MODEL, size - 15, 16))
        too_large, _ = route(world, RouteRequest(MODEL, size - 14, 16))
        await eventually(lambda: too_large.error is not None)
        assert too_large.error is not None and too_large.error.code is ErrorCode.INVALID_REQUEST
        assert str(size) in too_large.error.message
        assert fits.decisions, "an idle instance takes what it can hold at all"

    run(scene)


def test_those_that_wait_are_told_when_the_last_instance_leaves() -> None:
    async def scene(world: RoutingWorld) -> None:
        request = RouteRequest(MODEL, 64, 16)
        for _ in range(LET_IN):
            route(world, request)
        waiting, _ = route(world, request)
        await eventually(lambda: world.stats().num_waiting == 1)
        await world.workers[0].lease.revoke()
        await eventually(lambda: waiting.error is not None)
        assert waiting.error is not None and waiting.error.code is ErrorCode.NO_INSTANCE
        assert world.stats().num_waiting == 0

    run(scene)


def test_a_new_instance_takes_those_that_wait() -> None:
    async def scene(world: RoutingWorld) -> None:
        clients = Clients(world)
        await clients.fill(2)
        await world.add_worker(InstanceId("new"), sim_engines(engine_args(PLACES))())
        await eventually(lambda: world.stats().num_waiting == 0)
        await clients.leave()

    run(scene)
