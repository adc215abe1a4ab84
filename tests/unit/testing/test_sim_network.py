"""Connections of the simulated network behave as asyncio's over TCP."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from stator.testing.sim.loop import SimLoop, run_sim
from stator.testing.sim.network import Network, Weather
from stator.testing.sim.trace import Trace

PORT = 80


class Peer(asyncio.Protocol):
    """Remembers all that happens to it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.received = bytearray()
        self.events: list[str] = []
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> bool:
        self.events.append("eof")
        return False

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost" if exc is None else type(exc).__name__)
        self.lost.set_result(None)


class World:
    def __init__(self, loop: SimLoop, weather: Weather | None = None) -> None:
        self.network = Network(loop, Random(1), Trace(loop.time), weather)
        self.server, self.client = loop.node("server", "s"), loop.node("client", "c")
        self.accepted: list[Peer] = []
        self.listener: asyncio.AbstractServer | None = None

    async def connect(self) -> tuple[Peer, Peer]:
        loop = asyncio.get_running_loop()

        def make() -> Peer:
            self.accepted.append(Peer())
            return self.accepted[-1]

        async def dial() -> Peer:
            return (await loop.create_connection(Peer, "s", PORT))[1]

        if self.listener is None:
            self.listener = await self.server.spawn(loop.create_server(make, "0.0.0.0", PORT))
        peer = await self.client.spawn(dial())
        await asyncio.sleep(0.1)
        return peer, self.accepted[-1]


def in_world(test: Callable[[World], Awaitable[None]], weather: Weather | None = None) -> None:
    async def main(loop: SimLoop) -> None:
        await test(World(loop, weather))

    run_sim(main)


def test_bytes_arrive_whole_in_order_and_later() -> None:
    async def test(world: World) -> None:
        a, b = await world.connect()
        rng = Random(2)
        sent = b"".join(bytes([rng.randrange(256)]) * rng.randrange(2000) for _ in range(200))
        at = 0
        while at < len(sent):
            size = rng.randrange(1, 9000)
            a.transport.write(sent[at : at + size])
            at += size
        assert not b.received
        a.transport.close()
        await a.lost
        await b.lost
        assert bytes(b.received) == sent
        assert (a.events[-1], b.events[-2:]) == ("lost", ["eof", "lost"])
        assert not world.network.connections

    in_world(test, Weather(spike=0.3, window_bytes=4096))


def test_who_does_not_read_stops_the_writer() -> None:
    async def test(world: World) -> None:
        a, b = await world.connect()
        a.transport.set_write_buffer_limits(high=1000, low=100)
        b.transport.pause_reading()
        a.transport.write(bytes(4096))
        assert a.events == []
        a.transport.write(bytes(5000))
        await asyncio.sleep(1.0)
        assert a.events == ["pause"]
        assert a.transport.get_write_buffer_size() == 5000
        assert not b.received
        b.transport.resume_reading()
        await asyncio.sleep(1.0)
        assert a.events == ["pause", "resume"]
        assert len(b.received) == 9096

    in_world(test, Weather(window_bytes=4096))


def test_a_cut_holds_what_is_under_way_until_it_heals() -> None:
    async def test(world: World) -> None:
        a, b = await world.connect()
        world.network.cut("c", "s")
        a.transport.write(b"one")
        a.transport.write(b"two")
        await asyncio.sleep(5.0)
        assert not b.received
        world.network.heal("c", "s")
        a.transport.write(b"three")
        await asyncio.sleep(1.0)
        assert bytes(b.received) == b"onetwothree"

    in_world(test)


def test_a_cut_in_one_direction_lets_the_other_through() -> None:
    async def test(world: World) -> None:
        a, b = await world.connect()
        world.network.cut("c", "s", one_way=True)
        a.transport.write(b"x")
        b.transport.write(b"y")
        await asyncio.sleep(1.0)
        assert (bytes(a.received), bytes(b.received)) == (b"y", b"")

    in_world(test)


def test_a_killed_peer_is_noticed_and_refuses() -> None:
    async def test(world: World) -> None:
        a, b = await world.connect()
        world.server.kill()
        await asyncio.sleep(1.0)
        assert a.events[-1] in ("lost", "ConnectionResetError")
        assert b.events == []
        with pytest.raises(ConnectionRefusedError):
            await world.connect()

    in_world(test)


def test_a_lost_host_is_silent() -> None:
    async def test(world: World) -> None:
        a, _ = await world.connect()
        world.network.lose_host("s")
        world.server.kill()
        a.transport.write(b"anybody there?")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30.0):
                await world.connect()
        assert a.events == []

    in_world(test)


def test_resets_reach_both_ends_and_silence_neither() -> None:
    async def test(world: World) -> None:
        a, b = await world.connect()
        c, d = await world.connect()
        first, second = sorted(world.network.connections)
        world.network.reset(first)
        world.network.silence(second)
        c.transport.write(b"x")
        await asyncio.sleep(60.0)
        assert a.events == b.events == ["ConnectionResetError"]
        assert c.events == d.events == []
        assert not d.received

    in_world(test)


def test_a_paused_peer_connects_and_answers_when_it_goes_on() -> None:
    async def test(world: World) -> None:
        await world.connect()
        world.server.pause()
        peer, _ = await world.connect()
        peer.transport.write(b"hello")
        await asyncio.sleep(3.0)
        assert len(world.accepted) == 1
        world.server.resume()
        await asyncio.sleep(0.1)
        assert bytes(world.accepted[1].received) == b"hello"

    in_world(test)


def test_an_abort_drops_what_was_not_read() -> None:
    async def test(world: World) -> None:
        a, b = await world.connect()
        a.transport.write(bytes(10_000))
        a.transport.abort()
        a.transport.write(b"not sent")
        await b.lost
        assert (a.events, b.events) == (["lost"], ["ConnectionResetError"])
        assert len(b.received) <= 4096

    in_world(test, Weather(window_bytes=4096))


def test_writing_to_a_connection_that_the_peer_closed_is_answered_with_a_reset() -> None:
    async def test(world: World) -> None:
        a, b = await world.connect()
        world.network.cut("s", "c", one_way=True)
        b.transport.close()
        await asyncio.sleep(1.0)
        assert a.events == []
        a.transport.write(b"x")
        world.network.heal("s", "c")
        await asyncio.sleep(1.0)
        assert a.events[0] in ("eof", "ConnectionResetError")
        assert a.transport.is_closing()

    in_world(test)
