import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.openai import CompletionRequest
from stator.messages.processor import RouteDecision, RouteRequest
from stator.messages.routing import RouteObservation, RouteObservations
from stator.processor.feedback import RouteFeedback
from stator.transport.base import Call, Endpoint, Target
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

from .harness import TIMEOUT_S, Harness, answer_with, harness


class Observed:
    """Collects what arrives at `observe`."""

    def __init__(self) -> None:
        self.batches: list[list[RouteObservation]] = []
        self._changed = asyncio.Event()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("observe", RouteObservations, self.observe)

    def observe(self, call: Call) -> None:
        self.batches.append(call.request.observations)
        self._changed.set()
        call.end()

    async def until(self, count: int) -> list[RouteObservation]:
        async with asyncio.timeout(TIMEOUT_S):
            while sum(map(len, self.batches)) < count:
                self._changed.clear()
                await self._changed.wait()
        return [observation for batch in self.batches for observation in batch]


def test_observations_of_a_while_travel_together_and_urgent_ones_at_once() -> None:
    async def scene() -> None:
        network, observed = InProcessNetwork(), Observed()
        server = RequestPlaneServer(Identity(), Listen(host=None, inproc_name="router"), network=network)
        server.register(observed.endpoint)
        client = RequestPlaneClient(Identity(), network=network)
        await server.start()
        feedback, route = RouteFeedback(client), Target(("inproc://router",), "route")
        for booking in (1, 2, 3):
            feedback.add(route, RouteObservation(booking, 0))
        await observed.until(3)
        assert len(observed.batches) == 1
        feedback.add(route, RouteObservation(4, 0))
        feedback.add(route, RouteObservation(5, failed=True), at_once=True)
        assert [o.booking for o in await observed.until(5)] == [1, 2, 3, 4, 5]
        feedback.add(Target(("inproc://nobody",), "route"), RouteObservation(6, 0), at_once=True)
        feedback.add(route, RouteObservation(7, 0))
        feedback.close()
        await client.close()
        await server.close()

    asyncio.run(scene())


@asynccontextmanager
async def routed(workers: list[str] | None = None) -> AsyncIterator[tuple[Harness, Observed]]:
    """A Processor whose router numbers its decisions and takes observations."""
    names, numbers, observed = workers or ["w1"], iter(range(1, 100)), Observed()

    def route(call: Call) -> None:
        left = [name for name in names if name not in call.request.exclude]
        call.items([RouteDecision(InstanceId(left[0]), (f"inproc://{left[0]}",), 3, 12.5, next(numbers))])

    async with harness(names, router=Target(("inproc://numbering",), "route")) as h:
        server = h._server("numbering", [Endpoint("route", RouteRequest, route), observed.endpoint])
        await server.start()
        h.servers.append(server)
        yield h, observed


def ask(**fields: Any) -> CompletionRequest:
    return CompletionRequest(model="tiny", prompt=[5, 6, 7, 8, 9], max_tokens=3, **fields)


def test_the_router_hears_of_cached_tokens_and_of_the_length() -> None:
    async def scene() -> None:
        async with routed() as (h, observed):
            h.workers["w1"].script = answer_with([10, 11, 12], cached=4)
            assert (await h.open("completions", ask()).done()).error is None
            first, last = await observed.until(2)
            assert first == RouteObservation(1, num_cached_tokens=4, num_total_tokens=5)
            assert last == RouteObservation(1, num_output_tokens=3)

    asyncio.run(scene())


def test_a_failed_attempt_is_told_and_the_next_one_counts_for_itself() -> None:
    async def scene() -> None:
        async with routed(["w1", "w2"]) as (h, observed):
            h.workers["w1"].script = answer_with([], error=StatorError(ErrorCode.INSTANCE_LOST, "gone"))
            h.workers["w2"].script = answer_with([10, 11, 12], cached=0)
            assert (await h.open("completions", ask()).done()).error is None
            found = await observed.until(3)
            assert found[0] == RouteObservation(1, failed=True)
            assert found[1] == RouteObservation(2, num_cached_tokens=0, num_total_tokens=5)
            assert found[2] == RouteObservation(2, num_output_tokens=3)

    asyncio.run(scene())


def test_a_client_that_leaves_before_the_first_token_is_a_failed_booking() -> None:
    async def scene() -> None:
        async with routed() as (h, observed):
            collected = h.open("completions", ask())
            await h.workers["w1"].call()
            assert collected.handle is not None
            collected.handle.cancel()
            assert await observed.until(1) == [RouteObservation(1, failed=True)]

    asyncio.run(scene())
