"""The part of the transport contract that only makes sense across a socket: batching, proofs, loss, silence."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stator.errors import ConfigError, ErrorCode
from stator.ids import InstanceId
from stator.testing.contracts.transport import Check, Item
from stator.testing.contracts.transport_world import Carrier, Held, Recorder, open_on, turns, world
from stator.transport.base import Call, Lane

SOCKET_CHECKS: list[Check] = []

MIB = 1024 * 1024
QUICK_HEARTBEAT: dict[str, Any] = {"ping_interval_s": 0.05, "heartbeat_timeout_s": 0.3}


def socket_check(function: Check) -> Check:
    SOCKET_CHECKS.append(function)
    return function


@socket_check
async def one_frame_and_one_write_per_loop_iteration(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        opened = [open_on(client, server)[0] for _ in range(64)]
        await held.called(64)
        before = replace(server.stats)
        for step in range(10):
            for call in held.calls:
                call.items([step])
            if step == 9:
                for call in held.calls:
                    call.end()
            await turns(1)
        for sink in opened:
            assert await sink.ended() is None and sink.received == list(range(10))
        assert server.stats.data_frames_sent - before.data_frames_sent == 10
        assert server.stats.writes - before.writes == 10


@socket_check
async def requests_of_one_iteration_share_a_write(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        await made.barrier(client, server)
        writes = client.stats.writes
        opened = [open_on(client, server)[0] for _ in range(50)]
        await held.called(50)
        assert client.stats.writes - writes == 1
        for call in held.calls:
            call.end()
        for sink in opened:
            assert await sink.ended() is None


@socket_check
async def lanes_have_their_own_connections(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        opened = [open_on(client, server, lane=lane)[0] for lane in (Lane.CALLS, Lane.BULK, Lane.CALLS, Lane.BULK)]
        await held.called(4)
        for call in held.calls:
            call.end()
        for sink in opened:
            assert await sink.ended() is None
        assert client.stats.connections == 2


@socket_check
async def only_holders_of_the_token_are_served(carrier: Carrier) -> None:
    async with world(carrier) as made:
        held = Held()
        server = await made.serve({"run": held})
        for token in ("another token", None):
            sink, _ = open_on(made.client(token=token), server)
            assert await sink.code() == ErrorCode.UNAUTHORIZED
            message = str(sink.ends[0])
            assert "STATOR_TOKEN" in message and "--token-file" in message
        assert not held.calls


@socket_check
async def a_lost_connection_ends_its_streams(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        async with made.relay(server) as relay:
            sink, _ = open_on(client, relay.address)
            await held.called(1)
            direct, _ = open_on(client, server)
            await held.called(2)
            relay.cut()
            assert await sink.code() == ErrorCode.INSTANCE_LOST
            await held.cancelled()
            again, _ = open_on(client, relay.address)
            (await held.called(3)).end()
            assert await again.ended() is None
            held.calls[1].end()
            assert await direct.ended() is None


@socket_check
async def a_silent_peer_is_lost_on_both_sides(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier, **QUICK_HEARTBEAT) as made:
        server = await made.serve({"run": held})
        client = made.client()
        async with made.relay(server) as relay:
            sink, _ = open_on(client, relay.address)
            await held.called()
            relay.freeze()
            assert await sink.code() == ErrorCode.INSTANCE_LOST
            await held.cancelled()
            relay.cut()


@socket_check
async def an_idle_stream_is_kept_alive(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier, ping_interval_s=0.02, heartbeat_timeout_s=0.1) as made:
        server = await made.serve({"run": held})
        client = made.client()
        sink, _ = open_on(client, server)
        call = await held.called()
        # Another stream's deadline measures several heartbeat bounds, without a sleep.
        clock, _ = open_on(client, server, seconds=0.4)
        assert await clock.code() == ErrorCode.DEADLINE
        call.items([1])
        call.end()
        assert await sink.ended() is None and sink.received == [1]


@socket_check
async def a_peer_that_reads_nothing_is_dropped(carrier: Carrier) -> None:
    """Its streams end at a bound of bytes; those of other connections go on."""
    held = Held()
    bounds = {"write_high_water_bytes": 64 * 1024, "max_write_buffer_bytes": MIB}
    async with world(carrier, **bounds) as made:
        server = await made.serve({"run": held})
        stuck, well = made.client(), made.client()
        async with made.relay(server) as relay:
            sink, _ = open_on(stuck, relay.address)
            call = await held.called(1)
            other, _ = open_on(well, server)
            other_call = await held.called(2)
            relay.freeze()
            chunk = b"x" * 65536
            num_sent = 0
            while not call.cancelled and num_sent < 1000:
                call.items([chunk])
                other_call.items([num_sent])
                num_sent += 1
                await turns(1)
            await held.cancelled()
            assert not other_call.cancelled
            other_call.end()
            assert await other.ended() is None and len(other.received) == num_sent
            relay.cut()
            assert await sink.code() == ErrorCode.INSTANCE_LOST


@socket_check
async def a_peer_that_reads_nothing_is_lost_in_time(carrier: Carrier) -> None:
    """Even if it still speaks and stays below every bound of bytes."""
    held = Held()
    async with world(carrier, **QUICK_HEARTBEAT, write_high_water_bytes=65536) as made:
        server = await made.serve({"run": held})
        async with made.relay(server) as relay:
            sink, _ = open_on(made.client(), relay.address)
            call = await held.called()
            relay.freeze_downstream()
            call.items([b"x" * (8 * MIB)])
            await held.cancelled()
            relay.cut()
            assert await sink.code() == ErrorCode.INSTANCE_LOST


@socket_check
async def an_item_that_cannot_travel_ends_only_its_stream(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier, max_frame_bytes=MIB) as made:
        server = await made.serve({"run": held})
        client = made.client()
        opened: list[Recorder] = [open_on(client, server)[0] for _ in range(5)]
        await held.called(5)
        poison: Sequence[Any] = [1, b"x" * (2 * MIB), object(), 1 << 80, "\ud800"]
        for call, item in zip(held.calls, poison, strict=True):
            call.items([item])
        held.calls[2].end()
        assert await opened[1].code() == ErrorCode.PROTOCOL
        for number in (2, 3, 4):
            assert await opened[number].code() == ErrorCode.INTERNAL
        held.calls[0].end()
        assert await opened[0].ended() is None and opened[0].received == [1]
        assert held.num_cancelled == 3


@socket_check
async def a_batch_past_the_limit_is_cut_up(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier, max_frame_bytes=MIB) as made:
        server = await made.serve({"run": held})
        client = made.client()
        opened = [open_on(client, server)[0] for _ in range(4)]
        await held.called(4)
        chunks = [bytes([number]) * 700_000 for number in range(4)]
        for call in held.calls:
            call.items(chunks)
            call.end()
        for sink in opened:
            assert await sink.ended() is None and sink.received == chunks


@socket_check
async def items_of_another_type_end_only_their_stream(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier) as made:
        server = await made.serve({"run": held})
        client = made.client()
        wrong, _ = open_on(client, server, item_type=Item)
        right, _ = open_on(client, server, item_type=str)
        await held.called(2)
        for call in held.calls:
            call.items(["text"])
        assert await wrong.code() == ErrorCode.PROTOCOL
        await held.cancelled()
        held.calls[1].end()
        assert await right.ended() is None and right.received == ["text"]


@socket_check
async def addresses_are_tried_in_order(carrier: Carrier) -> None:
    def answer(name: str) -> Any:
        def run(call: Call) -> None:
            call.items([name])
            call.end()

        return run

    async with world(carrier) as made:
        first = await made.serve({"run": answer("first")}, instance="first")
        second = await made.serve({"run": answer("second")}, instance="second")
        addresses = ("inproc://nobody", made.unused_address(), *first.addresses, *second.addresses)
        for wanted, expected in ((None, "first"), ("second", "second"), ("first", "first")):
            sink, _ = open_on(made.client(), addresses, instance=wanted)
            assert await sink.ended() is None and sink.received == [expected]
        nobody, _ = open_on(made.client(), addresses, instance="third")
        assert await nobody.code() == ErrorCode.STALE_INSTANCE


@socket_check
async def a_peer_that_never_answers_is_given_up(carrier: Carrier) -> None:
    async with world(carrier) as made:
        server = await made.serve({})
        client = made.client(connect_timeout_s=0.1)
        async with made.relay(server) as relay:
            relay.freeze()
            sink, _ = open_on(client, relay.address)
            assert await sink.code() == ErrorCode.INSTANCE_LOST
            in_time, _ = open_on(client, relay.address, seconds=0.02)
            assert await in_time.code() == ErrorCode.DEADLINE
            cancelled, handle = open_on(client, relay.address)
            handle.cancel()
            assert await cancelled.code() == ErrorCode.CANCELLED


@socket_check
async def idle_connections_close_and_come_back(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier, **QUICK_HEARTBEAT, idle_close_s=0.05) as made:
        server = await made.serve({"run": held})
        client = made.client()
        await made.barrier(client, server)
        assert client.num_connections == 1
        # A stream on the other lane measures the time; the first lane is idle meanwhile.
        clock, _ = open_on(client, server, lane=Lane.BULK, seconds=0.5)
        assert await clock.code() == ErrorCode.DEADLINE
        assert client.stats.connections == 2 and client.num_connections == 1
        await made.barrier(client, server)
        assert client.stats.connections == 3


@socket_check
async def a_server_that_says_go_away_finishes_what_runs(carrier: Carrier) -> None:
    held = Held()
    async with world(carrier, **QUICK_HEARTBEAT) as made:
        server = await made.serve({"run": held}, instance="old")
        client = made.client()
        running, _ = open_on(client, server)
        call = await held.called()
        server.instance_id = InstanceId("new")
        await made.barrier(client, server)
        fresh, _ = open_on(client, server, instance="new")
        (await held.called(2)).end()
        assert await fresh.ended() is None and client.num_connections == 2
        call.items([1])
        call.end()
        assert await running.ended() is None and running.received == [1]


@socket_check
async def a_token_is_required_to_listen(carrier: Carrier) -> None:
    async with world(carrier) as made:
        made.identity = replace(made.identity, token=None)
        try:
            await made.serve({})
        except ConfigError as error:
            assert "STATOR_TOKEN" in str(error)
        else:
            raise AssertionError("a server without a token listens on a socket")
