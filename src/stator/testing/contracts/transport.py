"""The contract of the transport seam, as checks that run on every carrier.

Each check is an async function of a Carrier that builds its own world, asserts, and leaves nothing behind.
Those that only make sense across a socket are in
`transport_sockets`. See transport.base for the promises.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.testing.contracts.transport_world import Carrier, Held, Recorder, context, open_on, turns, world
from stator.transport.base import Call, Target

Check = Callable[[Carrier], Awaitable[None]]
CHECKS: list[Check] = []

MIB = 1024 * 1024


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


class Item(msgspec.Struct, frozen=True, array_like=True):
    ids: list[int]
    note: str | None = None


class Order(msgspec.Struct, frozen=True):
    count: int


@check
async def items_arrive_in_order_before_one_end(carrier: Carrier) -> None:
    def run(call: Call) -> None:
        for start in range(0, 999, 3):
            call.items([start, start + 1, start + 2])
        call.items([999])
        call.end()
        call.items([1000])
        call.end(StatorError(ErrorCode.INTERNAL, "a second end"))

    async with world(carrier) as made:
        server = await made.serve({"run": run})
        sink, _ = open_on(made.client(), server)
        assert await sink.ended() is None
        assert sink.received == list(range(1000))


@check
async def messages_are_typed_structs(carrier: Carrier) -> None:
    def run(call: Call) -> None:
        assert isinstance(call.request, Order)
        call.items([Item([n], "note") for n in range(call.request.count)])
        call.end()

    async with world(carrier) as made:
        server = await made.serve({"run": run}, request_type=Order)
        client = made.client()
        sink, _ = open_on(client, server, Order(3), item_type=Item)
        assert await sink.ended() is None
        assert sink.received == [Item([0], "note"), Item([1], "note"), Item([2], "note")]
        converted, _ = open_on(client, server, {"count": 1, "from_a_newer_version": True}, item_type=Item)
        assert await converted.ended() is None
        refused, _ = open_on(client, server, {"count": "many"})
        assert await refused.code() == ErrorCode.PROTOCOL
        assert "count" in (await refused.ended() or StatorError(ErrorCode.INTERNAL, "")).message


@check
async def the_context_travels(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        sink = Recorder()
        sent = context(60, "request-7", traceparent="00-1-2-3")
        target = Target(server.addresses, "run", InstanceId("server-1"))
        made.client().open(target, {"a": 1}, sink, context=sent)
        call = await held.called()
        assert call.request == {"a": 1}
        assert call.context.request_id == "request-7" and call.context.headers == {"traceparent": "00-1-2-3"}
        assert call.context.deadline is not None and sent.deadline is not None
        assert abs(call.context.deadline - sent.deadline) < 1.0
        call.end()
        assert await sink.ended() is None


@check
async def errors_arrive_as_they_were(carrier: Carrier) -> None:
    error = StatorError(ErrorCode.OVERLOADED, "full — wait", param="n", retry_after_s=2.5)

    def ends(call: Call) -> None:
        call.items([1, 2])
        call.end(error)

    def raises(call: Call) -> None:
        raise error

    def breaks(call: Call) -> None:
        raise ValueError("a secret of the server")

    async with world(carrier) as made:
        server = await made.serve({"ends": ends, "raises": raises, "breaks": breaks})
        client = made.client()
        for endpoint in ("ends", "raises"):
            sink, _ = open_on(client, server, endpoint=endpoint)
            found = await sink.ended()
            assert found is not None and found is not error
            assert (found.code, found.message, found.param, found.retry_after_s) == (
                ErrorCode.OVERLOADED,
                "full — wait",
                "n",
                2.5,
            )
            assert sink.received == ([1, 2] if endpoint == "ends" else [])
        sink, _ = open_on(client, server, endpoint="breaks")
        assert await sink.code() == ErrorCode.INTERNAL
        assert "secret" not in str(sink.ends[0])


@check
async def a_deadline_ends_both_sides(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        warm, handle = open_on(client, server)
        await held.called()
        handle.cancel()
        assert await warm.code() == ErrorCode.CANCELLED
        await held.cancelled()
        sink, _ = open_on(client, server, seconds=0.3)
        call = await held.called(2)
        assert await sink.code() == ErrorCode.DEADLINE
        await held.cancelled(2)
        assert call.cancelled
        late, _ = open_on(client, server, seconds=-1.0)
        assert await late.code() == ErrorCode.DEADLINE
        paused, handle = open_on(client, server, seconds=0.3)
        handle.pause()
        (await held.called(3)).items([1])
        assert await paused.code() == ErrorCode.DEADLINE
        await held.cancelled(3)
        await made.barrier(client, server)
        assert len(held.calls) == 3, "an expired call reached its handler"


@check
async def cancel_reaches_the_handler(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        sink, handle = open_on(client, server)
        call = await held.called()
        call.items([1])
        await sink.wait_for(lambda: sink.received == [1])
        call.items([2])
        handle.cancel()
        handle.cancel()
        assert not sink.ends, "the sink was called from inside cancel"
        assert await sink.code() == ErrorCode.CANCELLED
        await held.cancelled()
        assert call.cancelled and sink.received == [1]
        call.items([3])
        call.end()
        late: list[int] = []
        call.on_cancel(lambda: late.append(1))
        assert late == [1], "on_cancel runs at once after a cancel"
        try:
            await call.writable()
        except StatorError as error:
            assert error.code == ErrorCode.CANCELLED
        else:
            raise AssertionError("writable returned for a cancelled call")
        await made.barrier(client, server)
        assert sink.received == [1] and len(sink.ends) == 1


@check
async def cancel_before_the_call_arrives(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        sink, handle = open_on(client, server)
        handle.cancel()
        assert await sink.code() == ErrorCode.CANCELLED
        after, _ = open_on(client, server)
        (await held.called(len(held.calls) + 1)).end()
        assert await after.ended() is None
        assert held.num_cancelled == len(held.calls) - 1


@check
async def an_ended_call_is_not_cancelled(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        sink, handle = open_on(client, server)
        (await held.called()).end()
        assert await sink.ended() is None
        handle.cancel()
        await made.barrier(client, server)
        assert held.num_cancelled == 0 and len(sink.ends) == 1


@check
async def a_paused_stream_holds_up_only_itself(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier, window_items=8) as made:
        server = await made.serve({"run": held})
        client = made.client()
        slow, slow_handle = open_on(client, server)
        slow_call = await held.called(1)
        fast, _ = open_on(client, server)
        fast_call = await held.called(2)
        slow_handle.pause()
        for number in range(100):
            slow_call.items([number])
            fast_call.items([number])
        slow_call.end()
        fast_call.end()
        assert await fast.ended() is None and fast.received == list(range(100))
        assert not slow.received and not slow.ends
        waiting = asyncio.ensure_future(slow_call.writable())
        await made.barrier(client, server)
        assert not waiting.done(), "writable returned with items buffered"
        slow_handle.resume()
        assert not slow.received, "the sink was called from inside resume"
        assert await slow.ended() is None and slow.received == list(range(100))
        await asyncio.wait_for(waiting, 5)


@check
async def pausing_from_inside_the_sink(carrier: Carrier) -> None:
    class OneAtATime(Recorder):
        def items(self, items: Sequence[Any], /) -> None:
            super().items(items)
            handles[0].pause()
            asyncio.get_running_loop().call_soon(handles[0].resume)

    held = Held()
    async with world(carrier, window_items=4) as made:
        server = await made.serve({"run": held})
        sink = OneAtATime()
        handles = [open_on(made.client(), server, sink=sink)[1]]
        call = await held.called()
        for number in range(200):
            call.items([number])
            await call.writable()
        call.end()
        assert await sink.ended() is None and sink.received == list(range(200))


@check
async def a_reader_too_slow_ends(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier, window_items=8, max_buffered_items=32) as made:
        server = await made.serve({"run": held})
        client = made.client()
        sink, handle = open_on(client, server)
        call = await held.called()
        handle.pause()
        for number in range(1000):
            call.items([number])
            await turns(1)
        assert await sink.code() == ErrorCode.SLOW_READER
        await held.cancelled()
        assert call.cancelled and not sink.received
        other, _ = open_on(client, server)
        (await held.called(2)).end()
        assert await other.ended() is None


@check
async def many_streams_at_once(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        opened = [open_on(client, server, number) for number in range(200)]
        await held.called(200)
        for step in range(20):
            for call in held.calls:
                call.items([(call.request, step)])
            await turns(1)
        for call in held.calls:
            call.end()
        for number, (sink, _) in enumerate(opened):
            assert await sink.ended() is None
            assert [tuple(item) for item in sink.received] == [(number, step) for step in range(20)]


@check
async def large_requests_and_too_large_ones(carrier: Carrier) -> None:
    def run(call: Call) -> None:
        call.items([len(call.request)])
        call.end()

    async with world(carrier, max_frame_bytes=9 * MIB) as made:
        server = await made.serve({"run": run})
        client = made.client()
        large, _ = open_on(client, server, b"x" * (8 * MIB))
        too_large, _ = open_on(client, server, b"x" * (9 * MIB))
        small, _ = open_on(client, server, b"x")
        assert await large.ended() is None and large.received == [8 * MIB]
        assert await too_large.code() == ErrorCode.BODY_TOO_LARGE
        assert await small.ended() is None and small.received == [1]
        nonsense, _ = open_on(client, server, object())
        assert await nonsense.code() == ErrorCode.INTERNAL


@check
async def another_instance_is_refused(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held}, instance="old")
        client = made.client()
        sink, _ = open_on(client, server, instance="old")
        (await held.called()).end()
        assert await sink.ended() is None
        server.instance_id = InstanceId("new")
        for _ in range(2):
            stale, _ = open_on(client, server, instance="old")
            assert await stale.code() == ErrorCode.STALE_INSTANCE
        fresh, _ = open_on(client, server, instance="new")
        (await held.called(2)).end()
        assert await fresh.ended() is None


@check
async def refusals_name_their_reason(carrier: Carrier) -> None:
    async with world(carrier) as made:
        server = await made.serve({"run": Held()})
        client = made.client()
        unknown, _ = open_on(client, server, endpoint="walk")
        assert await unknown.code() == ErrorCode.NOT_FOUND and "run" in str(unknown.ends[0])
        nowhere, _ = open_on(client, made.unused_address())
        assert await nowhere.code() == ErrorCode.INSTANCE_LOST
        nonsense, _ = open_on(client, "carrier-pigeon://coop")
        assert await nonsense.code() == ErrorCode.PROTOCOL
        stranger, _ = open_on(made.client(namespace="other"), server)
        assert await stranger.code() == ErrorCode.UNAUTHORIZED and "--namespace" in str(stranger.ends[0])


@check
async def guests_of_a_server_are_served_and_strangers_are_not(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held}, guests=["guest"])
        for namespace in ("guest", made.identity.namespace):
            welcome, _ = open_on(made.client(namespace=namespace), server)
            (await held.called(len(held.calls) + 1)).end()
            assert await welcome.ended() is None
        stranger, _ = open_on(made.client(namespace="other"), server)
        assert await stranger.code() == ErrorCode.UNAUTHORIZED


@check
async def streams_are_bounded(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held}, max_streams=4)
        client = made.client()
        opened = [open_on(client, server)[0] for _ in range(5)]
        assert await opened[4].code() == ErrorCode.OVERLOADED
        (await held.called(1)).end()
        assert await opened[0].ended() is None
        again, _ = open_on(client, server)
        (await held.called(5)).end()
        assert await again.ended() is None


@check
async def a_sink_that_raises_is_cancelled(carrier: Carrier) -> None:
    class Faulty(Recorder):
        def items(self, items: Sequence[Any], /) -> None:
            super().items(items)
            raise ValueError("in items")

        def end(self, error: StatorError | None = None, /) -> None:
            super().end(error)
            raise ValueError("in end")

    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        faulty, _ = open_on(client, server, sink=Faulty())
        call = await held.called(1)
        other, _ = open_on(client, server)
        await held.called(2)
        call.items([1])
        assert await faulty.code() == ErrorCode.CANCELLED
        await held.cancelled()
        held.calls[1].items([2])
        held.calls[1].end()
        assert await other.ended() is None and other.received == [2]


@check
async def closing_the_server(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        finished, _ = open_on(client, server)
        await held.called(1)
        open_still, _ = open_on(client, server)
        await held.called(2)
        held.calls[0].items([1, 2, 3])
        held.calls[0].end()
        await server.close()
        assert await finished.ended() is None and finished.received == [1, 2, 3]
        assert await open_still.code() == ErrorCode.INSTANCE_LOST
        await held.cancelled()


@check
async def closing_the_client(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        sink, _ = open_on(client, server)
        await held.called()
        paused, handle = open_on(client, server)
        handle.pause()
        (await held.called(2)).items([1])
        held.calls[1].end()
        await made.barrier(client, server)
        connecting, _ = open_on(client, made.unused_address())
        await client.close()
        assert [len(each.ends) for each in (sink, paused, connecting)] == [1, 1, 1]
        assert await sink.code() == await paused.code() == ErrorCode.CANCELLED
        await held.cancelled()
        late, _ = open_on(client, server)
        assert await late.code() == ErrorCode.CANCELLED


@check
async def backpressure_is_felt_by_the_handler(carrier: Carrier) -> None:
    sent: list[int] = []
    held = Held()

    async def produce(call: Call) -> None:
        for number in range(100):
            sent.append(number)
            call.items([number])
            await call.writable()
        call.end()

    async with world(carrier, window_items=8) as made:
        server = await made.serve({"run": held})
        client = made.client()
        sink, handle = open_on(client, server)
        call = await held.called()
        handle.pause()
        async with asyncio.TaskGroup() as group:
            group.create_task(produce(call))
            await made.barrier(client, server)
            assert len(sent) <= 8 + 1, "more than a window left for a paused reader"
            handle.resume()
        assert await sink.ended() is None and sink.received == list(range(100))
