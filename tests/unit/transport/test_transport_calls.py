"""The conveniences: one answer, async for, endpoints as async functions."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from stator.errors import ErrorCode, StatorError
from stator.runtime.context import CallContext
from stator.testing.contracts.transport_world import Carrier, World, context, turns, world
from stator.transport import CallTasks, RequestPlaneServer, Target, call, stream
from stator.transport.calls import Function

Body = Callable[[World, RequestPlaneServer], Awaitable[None]]


def serving(function: Function, body: Body, *, carrier: Carrier = Carrier.TCP, **settings: Any) -> None:
    """Run body with a server whose one endpoint, `run`, is the function."""

    async def main() -> None:
        tasks = CallTasks("test")
        endpoint = tasks.endpoint("run", Any, function)
        async with world(carrier, **settings) as made:
            server = await made.serve({"run": endpoint.handler})
            await body(made, server)
            await server.close()
            await tasks.close()

    asyncio.run(main())


async def count(request: Any, _: CallContext) -> AsyncIterator[int]:
    for number in range(request):
        yield number


def test_one_answer() -> None:
    async def double(request: Any, context: CallContext) -> Any:
        return {"twice": 2 * request, "id": context.request_id}

    async def body(made: World, server: RequestPlaneServer) -> None:
        answer = await call(made.client(), Target(server.addresses, "run"), 21, context=context())
        assert answer == {"twice": 42, "id": "request-1"}

    serving(double, body)
    serving(double, body, carrier=Carrier.INPROCESS)


def test_a_single_answer_is_exactly_one_item() -> None:
    async def body(made: World, server: RequestPlaneServer) -> None:
        client = made.client()
        target = Target(server.addresses, "run")
        assert await call(client, target, 1, context=context()) == 0
        for wrong, word in ((0, "none"), (2, "several"), (500, "several")):
            with pytest.raises(StatorError, match=word) as caught:
                await call(client, target, wrong, context=context())
            assert caught.value.code is ErrorCode.PROTOCOL

    serving(count, body)


def test_a_stream_is_lists_in_order() -> None:
    async def body(made: World, server: RequestPlaneServer) -> None:
        found: list[int] = []
        async for items in stream(made.client(), Target(server.addresses, "run"), 2000, context=context()):
            assert items
            found += items
        assert found == list(range(2000))

    serving(count, body)
    serving(count, body, carrier=Carrier.INPROCESS)


def test_errors_of_functions_arrive(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: Any, _: CallContext) -> AsyncIterator[int]:
        yield 1
        if request == "known":
            raise StatorError(ErrorCode.OVERLOADED, "full", retry_after_s=3.0)
        raise KeyError("a secret")

    async def body(made: World, server: RequestPlaneServer) -> None:
        client = made.client()
        for request, code in (("known", ErrorCode.OVERLOADED), ("unknown", ErrorCode.INTERNAL)):
            found: list[int] = []
            with pytest.raises(StatorError) as caught:
                async for items in stream(client, Target(server.addresses, "run"), request, context=context()):
                    found += items
            assert caught.value.code is code and found == [1]
            assert "secret" not in caught.value.message

    with caplog.at_level(logging.ERROR):
        serving(fail, body)
    assert "request-1" in caplog.text and "a secret" in caplog.text


def test_leaving_early_cancels_the_function() -> None:
    cancelled = asyncio.Event()

    async def endless(_: Any, __: CallContext) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            cancelled.set()

    async def body(made: World, server: RequestPlaneServer) -> None:
        opened = stream(made.client(), Target(server.addresses, "run"), None, context=context())
        async with contextlib.aclosing(opened) as items:
            async for _ in items:
                break
        async with asyncio.timeout(5):
            await cancelled.wait()

    serving(endless, body)


def test_cancelling_the_caller_cancels_the_function() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(_: Any, __: CallContext) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def body(made: World, server: RequestPlaneServer) -> None:
        async with asyncio.timeout(5):
            caller = asyncio.ensure_future(
                call(made.client(), Target(server.addresses, "run"), None, context=context())
            )
            await started.wait()
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            await cancelled.wait()

    serving(wait, body)


def test_a_deadline_cancels_the_function() -> None:
    cancelled = asyncio.Event()

    async def wait(_: Any, __: CallContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def body(made: World, server: RequestPlaneServer) -> None:
        with pytest.raises(StatorError) as caught:
            await call(made.client(), Target(server.addresses, "run"), None, context=context(0.3))
        assert caught.value.code is ErrorCode.DEADLINE
        async with asyncio.timeout(5):
            await cancelled.wait()

    serving(wait, body)


def test_a_slow_reader_slows_the_function_down() -> None:
    num_made = 0

    async def endless(_: Any, __: CallContext) -> AsyncIterator[int]:
        nonlocal num_made
        while True:
            num_made += 1
            yield num_made

    async def body(made: World, server: RequestPlaneServer) -> None:
        client = made.client()
        opened = stream(client, Target(server.addresses, "run"), None, context=context())
        found: list[int] = []
        async with contextlib.aclosing(opened) as lists:
            async for items in lists:
                found += items
                before, num_still = -1, 0
                while num_still < 10:
                    await made.barrier(client, server)
                    num_still = num_still + 1 if num_made == before else 0
                    before = num_made
                assert num_made - len(found) <= 256 + 2 * 16, "the function ran ahead of its reader"
                if len(found) > 1000:
                    break
        assert found == list(range(1, len(found) + 1))

    serving(endless, body, window_items=16)


def test_a_closed_owner_ends_its_calls() -> None:
    async def wait(_: Any, __: CallContext) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        tasks = CallTasks("test")
        async with world(Carrier.UNIX) as made:
            server = await made.serve({"run": tasks.endpoint("run", Any, wait).handler})
            client = made.client()
            target = Target(server.addresses, "run")
            waiting = asyncio.ensure_future(call(client, target, None, context=context()))
            await made.barrier(client, server)
            await turns(2)
            await tasks.close()
            for awaited, code in (
                (waiting, ErrorCode.INSTANCE_LOST),
                (call(client, target, None, context=context()), ErrorCode.DRAINING),
            ):
                with pytest.raises(StatorError) as caught:
                    await awaited
                assert caught.value.code is code

    asyncio.run(main())


def test_requests_of_the_declared_type() -> None:
    async def main() -> None:
        tasks = CallTasks("test")
        async with world(Carrier.TCP) as made:
            server = await made.serve({})
            server.register(tasks.endpoint("count", int, count))
            with pytest.raises(ValueError, match="already registered"):
                server.register(tasks.endpoint("count", int, count))
            target = Target(server.addresses, "count")
            with pytest.raises(StatorError, match="Expected `int`") as caught:
                await call(made.client(), replace(target), "many", context=context())
            assert caught.value.code is ErrorCode.PROTOCOL
            await tasks.close()

    asyncio.run(main())
