"""Routers that come and go: who waits for one, and what becomes of the bookings of running requests."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from stator.discovery.memory import MemoryDiscovery
from stator.errors import Ending, ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import FinishReason, TokenDelta
from stator.messages.instances import InstanceInfo
from stator.messages.openai import CompletionRequest
from stator.processor.booking import (
    MAX_REBOOKINGS,
    REBOOK_AT_ONCE,
    REBOOK_EVERY_S,
    Bookings,
    RouterWait,
)
from stator.runtime.context import loop_time
from stator.runtime.directory import InstanceDirectory, register_instance
from stator.testing.clock import run_virtual
from stator.transport.base import Target

from .harness import Harness, answer_with, harness

LOST = StatorError(ErrorCode.INSTANCE_LOST, "the connection was lost")
TARGET = Target(("inproc://router",), "route")


def completion(**fields: Any) -> CompletionRequest:
    values: dict[str, Any] = {"max_tokens": 50, **fields}
    return CompletionRequest(model="tiny", prompt="In the beginning", **values)


def router(name: str) -> Target:
    return Target((f"inproc://{name}",), "route", InstanceId(name))


class Routers:
    """Finds those that are there, in turn."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self._turn = 0

    def __call__(self) -> Target:
        if not self.names:
            raise StatorError(ErrorCode.NO_INSTANCE, "no router")
        self._turn += 1
        return router(self.names[self._turn % len(self.names)])


class Booked:
    def __init__(self, log: list[tuple[float, str]]) -> None:
        self.closed = False
        self._log = log

    def book_again(self, router: Target) -> None:
        self._log.append((loop_time(), str(router.instance_id)))


class Waiter:
    def __init__(self, bookings: Bookings, since: float | None = None) -> None:
        self.asked_at: list[float] = []
        self.error: StatorError | None = None
        self.wait = bookings.wait(
            loop_time() if since is None else since, lambda: self.asked_at.append(loop_time()), self.give_up
        )

    def give_up(self, error: StatorError) -> None:
        self.error = error


def found(bookings: Bookings, times: int = 8) -> set[str]:
    return {str(bookings.find().instance_id) for _ in range(times)}


def run(scenario: Callable[[], Any]) -> None:
    run_virtual(scenario())


def test_a_router_that_was_lost_is_left_out_for_a_moment_and_longer_each_time() -> None:
    async def scenario() -> None:
        bookings = Bookings(Routers("a", "b"), Random(1))
        assert found(bookings) == {"a", "b"}
        waits: list[float] = []
        for _ in range(7):
            bookings.lost(router("a"))
            bookings.lost(router("a"))  # Two calls of one connection are one loss.
            assert found(bookings) == {"b"}
            began = loop_time()
            for _ in range(300):
                await asyncio.sleep(0.01)
                if found(bookings) == {"a", "b"}:
                    break
            waits.append(loop_time() - began)
        assert waits[0] <= 0.11
        assert 0.99 <= waits[-1] <= 2.01
        bookings.answered(router("a"))
        bookings.lost(router("a"))
        await asyncio.sleep(0.11)
        assert found(bookings) == {"a", "b"}, "one that answered begins anew"
        bookings.lost(router("a"))
        bookings.lost(router("b"))
        with pytest.raises(StatorError) as caught:
            bookings.find()
        assert caught.value.code is ErrorCode.NO_INSTANCE
        bookings.close()

    run(scenario)


def test_a_wait_ends_when_a_doubt_does_or_a_router_comes() -> None:
    async def scenario() -> None:
        discovery = MemoryDiscovery()
        directory = InstanceDirectory(discovery)
        await directory.start()
        routers = Routers("a")
        bookings = Bookings(routers, Random(1), directory)
        bookings.lost(router("a"))
        first = Waiter(bookings)
        await asyncio.sleep(0.2)
        assert len(first.asked_at) == 1
        assert 0.05 <= first.asked_at[0] <= 0.1
        assert bookings.num_waiting == 0

        routers.names = []
        second, third = Waiter(bookings), Waiter(bookings)
        assert isinstance(third.wait, RouterWait)
        await asyncio.sleep(20.0)
        assert second.asked_at == [], "nobody polls"
        third.wait.cancel()
        routers.names = ["c"]
        info = InstanceInfo(InstanceId("c"), "Router", "router", (), ("route",), "h", 1)
        await register_instance(discovery, await discovery.grant_lease(), info)
        came_at = loop_time()
        await asyncio.sleep(0.1)
        assert second.asked_at == [pytest.approx(came_at)]
        assert (third.asked_at, third.error) == ([], None)
        bookings.close()
        await directory.close()
        await discovery.close()

    run(scenario)


def test_a_wait_is_bounded_over_all_its_parts() -> None:
    async def scenario() -> None:
        bookings = Bookings(Routers(), Random(1), wait_s=5.0)
        waiter = Waiter(bookings, since=loop_time() - 2.0)
        await asyncio.sleep(2.9)
        assert waiter.error is None
        await asyncio.sleep(0.2)
        assert waiter.error is not None
        assert waiter.error.code is ErrorCode.NO_INSTANCE
        assert waiter.error.retry_after_s
        assert isinstance(Waiter(bookings, since=loop_time() - 5.0).wait, StatorError)
        bookings.close()

    run(scenario)


def test_a_thousand_bookings_come_back_at_a_bounded_rate() -> None:
    async def scenario() -> None:
        log: list[tuple[float, str]] = []
        bookings = Bookings(Routers("new"), Random(1))
        everybody = [Booked(log) for _ in range(1_000)]
        for booked in everybody:
            bookings.rebook(booked)
        for booked in everybody[:100]:
            booked.closed = True  # Their requests end before it is their turn.
        began = loop_time()
        await asyncio.sleep(5.0)
        assert len(log) == 900
        at = sorted({when for when, _ in log})
        assert len(at) == 900 / REBOOK_AT_ONCE
        gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
        assert min(gaps) >= REBOOK_EVERY_S / 2
        assert at[-1] - began <= 900 / REBOOK_AT_ONCE * REBOOK_EVERY_S * 1.5
        assert bookings.num_unbooked == 0
        bookings.close()

    run(scenario)


def test_bookings_wait_for_a_router_without_polling() -> None:
    async def scenario() -> None:
        log: list[tuple[float, str]] = []
        num_finds = 0
        routers = Routers()

        def find() -> Target:
            nonlocal num_finds
            num_finds += 1
            return routers()

        discovery = MemoryDiscovery()
        directory = InstanceDirectory(discovery)
        await directory.start()
        bookings = Bookings(find, Random(1), directory)
        bookings.rebook(Booked(log))
        await asyncio.sleep(60.0)
        assert (log, num_finds) == ([], 1)
        routers.names = ["new"]
        info = InstanceInfo(InstanceId("new"), "Router", "router", (), ("route",), "h", 1)
        await register_instance(discovery, await discovery.grant_lease(), info)
        await asyncio.sleep(0.2)
        assert [name for _, name in log] == ["new"]
        bookings.close()
        await directory.close()
        await discovery.close()

    run(scenario)


# With requests


async def begin(case: Harness, *, num_tokens: int = 3, **fields: Any) -> tuple[Any, Any]:
    """(the client's side, the engine's call) of a stream with that many tokens so far."""
    got = case.open("completions", completion(**fields))
    call = await case.workers["w1"].call()
    if num_tokens:
        call.items([TokenDelta(list(range(5, 5 + num_tokens)), None, 0)])
        await got.until(lambda: bool(got.deltas))
    return got, call


async def finish(got: Any, call: Any) -> None:
    call.items([TokenDelta([7], FinishReason.LENGTH)])
    call.end()
    await got.done()
    assert (got.error, got.deltas[-1].ending) == (None, Ending.LENGTH)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_running_request_is_booked_again_where_it_runs(num_tokens: int) -> None:
    async def scenario() -> None:
        async with harness() as case:
            got, call = await begin(case, num_tokens=num_tokens)
            first = case.router.requests[0]
            assert (first.booked_on, first.begun) == (None, False)
            case.router.num_bookings = 0
            case.router.calls[0].end(LOST)
            await asyncio.sleep(1.0)
            (_, again) = case.router.requests
            assert again.booked_on == "w1"
            assert again.begun
            assert again.started == (num_tokens > 0)
            assert again.num_prompt_tokens == first.num_prompt_tokens + num_tokens
            assert again.max_tokens == first.max_tokens - num_tokens
            assert case.router.num_bookings == 1
            assert len(case.workers["w1"].calls) == 1, "the stream went on"
            await finish(got, call)
            await case.router.until_no_booking()

    run(scenario)


def test_a_booking_that_no_router_keeps_is_given_up_and_the_request_is_not() -> None:
    async def scenario() -> None:
        async with harness() as case:
            got, call = await begin(case)
            case.router.failures = [LOST] * 100
            case.router.calls[0].end(LOST)
            await asyncio.sleep(120.0)
            assert len(case.router.requests) == 1 + MAX_REBOOKINGS
            await finish(got, call)

    run(scenario)


def test_a_request_that_ends_before_it_is_booked_again_leaves_nothing() -> None:
    async def scenario() -> None:
        async with harness() as case:
            got, call = await begin(case)
            case.router.calls[0].end(LOST)
            await finish(got, call)
            await asyncio.sleep(5.0)
            assert len(case.router.requests) == 1

    run(scenario)


def test_requests_wait_for_a_router_and_are_then_served() -> None:
    async def scenario() -> None:
        there: list[Target] = []

        def find() -> Target:
            if not there:
                raise StatorError(ErrorCode.NO_INSTANCE, "no router is registered")
            return there[0]

        async with harness(router=find) as case:
            case.workers["w1"].script = answer_with([5])
            waiting = [case.open("completions", completion()) for _ in range(20)]
            hurried = case.open("completions", completion(), seconds=1.0)
            leaving = case.open("completions", completion())
            await asyncio.sleep(5.0)
            assert not any(got.ended for got in waiting)
            assert hurried.error is not None
            assert hurried.error.code is ErrorCode.DEADLINE
            assert leaving.handle is not None
            leaving.handle.cancel()
            there.append(TARGET)
            for got in waiting:
                assert (await got.done()).error is None
            assert len(case.router.requests) == 20
            await case.processor.drain()

    run(scenario)


def test_a_router_that_dies_with_a_request_in_hand_costs_no_migration() -> None:
    async def scenario() -> None:
        async with harness(migration_limit=0) as case:
            case.router.failures = [LOST] * 6
            case.workers["w1"].script = answer_with([5])
            got = await case.open("completions", completion()).done()
            assert got.error is None
            assert len(case.router.requests) == 7

    run(scenario)
