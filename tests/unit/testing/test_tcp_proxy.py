"""The proxy between a client and a server, on real sockets."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from stator.testing.tcp_proxy import Link, TcpProxy

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def run(scene: Callable[[TcpProxy, Callable[[], Awaitable[Ends]]], Awaitable[None]], link: Link | None = None) -> None:
    """With an echo server behind the proxy."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def play() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        proxy = TcpProxy("127.0.0.1", server.sockets[0].getsockname()[1], link=link)
        opened: list[Ends] = []

        async def connect() -> Ends:
            opened.append(await asyncio.open_connection("127.0.0.1", proxy.port))
            return opened[-1]

        await proxy.start()
        try:
            async with asyncio.timeout(20):
                await scene(proxy, connect)
        finally:
            for _, writer in opened:
                writer.close()
            await proxy.close()
            server.close()

    asyncio.run(play())


async def said(ends: Ends, text: bytes) -> bytes:
    ends[1].write(text)
    return await ends[0].readexactly(len(text))


def test_a_link_delays_and_limits() -> None:
    link = Link()

    async def scene(proxy: TcpProxy, connect: Callable[[], Awaitable[Ends]]) -> None:
        loop = asyncio.get_running_loop()
        ends = await connect()
        assert await said(ends, b"hello") == b"hello"
        link.delay_s = 0.05
        begin = loop.time()
        assert await said(ends, b"there") == b"there"
        assert loop.time() - begin >= 0.1, "each way"
        link.delay_s, link.bytes_per_s = 0.0, 10_000.0
        begin = loop.time()
        assert await said(ends, bytes(1000)) == bytes(1000)
        assert loop.time() - begin >= 0.15, "a tenth of a second each way, of which one may overlap"

    run(scene, link)


def test_a_reset_ends_what_is_open_and_takes_new_ones() -> None:
    async def scene(proxy: TcpProxy, connect: Callable[[], Awaitable[Ends]]) -> None:
        ends = await connect()
        assert await said(ends, b"hello") == b"hello"
        proxy.reset()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await said(ends, b"again")
        assert await said(await connect(), b"new") == b"new"

    run(scene)


def test_what_is_lost_arrives_when_it_is_found() -> None:
    async def scene(proxy: TcpProxy, connect: Callable[[], Awaitable[Ends]]) -> None:
        ends = await connect()
        assert await said(ends, b"hello") == b"hello"
        proxy.lose()
        answer = asyncio.ensure_future(said(ends, b"there"))
        done, _ = await asyncio.wait([answer], timeout=0.1)
        assert not done and proxy.num_connections == 1
        proxy.find()
        assert await answer == b"there"

    run(scene)
