"""Connections of clients that mean no good, on a virtual clock: none stays for ever, none takes much."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from frontend_fakes import chat_body, delta, frontend, say_hello
from uvicorn.config import Config
from uvicorn.server import ServerState

from stator.frontend import connections
from stator.frontend.bodies import FREE_BYTES, Bodies
from stator.frontend.connections import RESERVED_FILES, OpenConnections, allowed_by_open_files
from stator.frontend.protocol import BoundedHttpProtocol
from stator.frontend.settings import ConnectionSettings, FrontendSettings
from stator.testing.clock import run_virtual

HIGH_WATER = 64 * 1024
GET = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"
SETTINGS = ConnectionSettings()


class FakeTransport(asyncio.Transport):
    """What a client does not read stays, once the kernel has taken kernel_bytes. unread: whether it reads nothing."""

    def __init__(self, protocol: BoundedHttpProtocol, *, unread: bool = False, kernel_bytes: int = 0) -> None:
        super().__init__()
        self._protocol = protocol
        self._unread = unread
        self._room = kernel_bytes
        self.written = bytearray()
        self.buffered = 0
        self.closing = False
        self.closed_at: float | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None:
        if self.closing:
            return
        self.written += data
        if self._unread:
            taken = min(self._room, len(data))
            self._room -= taken
            self.buffered += len(data) - taken
            if self.buffered > HIGH_WATER:
                self._protocol.pause_writing()

    def take(self, num_bytes: int) -> None:
        """The client reads some of what waits."""
        self.buffered = max(0, self.buffered - num_bytes)
        if self.closing and not self.buffered:
            self._lost()

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            if not self.buffered:
                self._lost()

    def abort(self) -> None:
        self.closing = True
        self._lost()

    def _lost(self) -> None:
        if self.closed_at is None:
            loop = asyncio.get_running_loop()
            self.closed_at = loop.time()
            loop.call_soon(self._protocol.connection_lost, None)


class Client:
    def __init__(self, server: "Server", **transport: Any) -> None:
        self.protocol = BoundedHttpProtocol(server.config, server.state, server.loop, server.settings, lambda: None)
        self.transport = FakeTransport(self.protocol, **transport)
        self.protocol.connection_made(self.transport)

    def send(self, data: bytes) -> "Client":
        """What a network would deliver; a closed connection delivers nothing."""
        if not self.transport.closing:
            self.protocol.data_received(data)
        return self

    @property
    def written(self) -> bytes:
        return bytes(self.transport.written)

    @property
    def statuses(self) -> list[int]:
        return [int(part[:3]) for part in self.written.split(b"HTTP/1.1 ")[1:]]

    async def closed_after(self, within_s: float) -> float:
        """Seconds from now until the server closes; fails if it has not within within_s."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await asyncio.sleep(within_s)
        assert self.transport.closed_at is not None, f"the connection is still open after {within_s} s"
        return max(0.0, self.transport.closed_at - begun)


class Server:
    def __init__(self, app: Any, settings: ConnectionSettings) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.config = Config(app, loop="none", http=BoundedHttpProtocol, ws="none", lifespan="off", log_config=None)
        self.config.timeout_keep_alive = settings.keep_alive_s  # type: ignore[assignment]
        self.config.load()
        self.state = ServerState()
        self.state.connections = OpenConnections[Any](settings.max_connections)  # type: ignore[assignment]


@asynccontextmanager
async def serving(
    script: Any = say_hello, settings: FrontendSettings | None = None, connection: ConnectionSettings = SETTINGS
) -> AsyncIterator[tuple[Any, Server]]:
    async with asyncio.timeout(10_000), frontend(script, settings, timeout_s=10_000) as fe:
        yield fe, Server(fe.app, connection)


@pytest.mark.parametrize(
    ("sent", "limit_s"),
    [
        ([], SETTINGS.head_timeout_s),
        ([b"\r\n"] * 40, SETTINGS.head_timeout_s),
        ([b"GET /live HTTP/1.1\r\n", *[b"x: y\r\n"] * 40], SETTINGS.head_timeout_s),
        ([GET], SETTINGS.keep_alive_s),
        ([GET, *[b"\r\n"] * 40], SETTINGS.keep_alive_s + 1),
        ([GET, GET[:-2]], SETTINGS.head_timeout_s + 1),
        ([b"POST /nowhere HTTP/1.1\r\ncontent-length: 9999\r\n\r\n", *[b"x"] * 40], SETTINGS.keep_alive_s + 1),
        ([b"GET /live HTTP/1.1\r\ncontent-length: 9999\r\n\r\n", *[b"x"] * 40], SETTINGS.keep_alive_s + 1),
        ([b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9999\r\n\r\n", *[b"x"] * 40], 30.0),
        ([b"\x16\x03\x01\x02\x00\x01"], 0.0),
    ],
    ids=[
        "nothing", "line ends", "head without end", "idle", "line ends behind an answer", "half a second head",
        "body behind a refusal", "body behind an answer", "body byte by byte", "garbage",
    ],
)  # fmt: skip
def test_no_connection_stays_that_brings_no_request(sent: list[bytes], limit_s: float):
    """Each part a second after the one before it."""

    async def main() -> None:
        async with serving() as (fe, server):
            client = Client(server)
            begun = server.loop.time()
            for data in sent:
                client.send(data)
                await asyncio.sleep(1)
            await client.closed_after(200)
            assert client.transport.closed_at is not None
            assert client.transport.closed_at - begun <= limit_s + 1
            assert not fe.calls
            assert not list(server.state.connections) and not server.state.tasks

    run_virtual(main())


def test_a_client_that_goes_on_asking_is_not_closed():
    async def main() -> None:
        async with serving() as (_, server):
            client = Client(server)
            for _ in range(10):
                client.send(GET[:-2])
                await asyncio.sleep(20)
                client.send(GET[-2:])
                await asyncio.sleep(50)
            assert client.statuses == [200] * 10
            assert client.transport.closed_at is None

    run_virtual(main())


def test_a_long_answer_is_not_taken_for_an_idle_connection():
    """Its request came in pieces, behind an answer."""

    async def main() -> None:
        async with serving(lambda call: call.items([delta("a")])) as (fe, server):
            client = Client(server).send(GET)
            await asyncio.sleep(1)
            client.send(
                b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(chat_body(stream=True))
            )
            client.send(chat_body(stream=True))
            await asyncio.sleep(500)
            assert client.transport.closed_at is None
            assert fe.app.generation.num_open == 1
            client.transport.abort()
            await asyncio.sleep(1)
            assert fe.app.generation.num_open == 0

    run_virtual(main())


@pytest.mark.parametrize("close", [b"", b"connection: close\r\n"])
def test_an_answer_that_nobody_reads_does_not_hold_its_connection(close: bytes):
    async def main() -> None:
        async with serving() as (_, server):
            client = Client(server, unread=True).send(GET[:-2] + close + b"\r\n")
            assert await client.closed_after(200) <= SETTINGS.write_timeout_s
            assert client.statuses == [200]

    run_virtual(main())


@pytest.mark.parametrize("close", [b"", b"connection: close\r\n"])
def test_an_answer_that_is_read_slowly_is_read_to_its_end(close: bytes):
    async def main() -> None:
        async with serving() as (_, server):
            transport = Client(server, unread=True).send(GET[:-2] + close + b"\r\n").transport
            await asyncio.sleep(1)
            piece = transport.buffered // 4
            assert piece
            # Three breaks longer than an idle connection is kept, none as long as a reader may take nothing.
            for _ in range(4):
                assert transport.closed_at is None
                await asyncio.sleep(SETTINGS.write_timeout_s * 0.7)
                transport.take(piece)
            transport.take(piece)
            await asyncio.sleep(SETTINGS.keep_alive_s + 1)
            assert transport.closed_at is not None

    run_virtual(main())


def test_a_slow_reader_that_asks_again_has_as_long_as_any():
    async def main() -> None:
        async with serving() as (_, server):
            client = Client(server, unread=True).send(GET)
            await asyncio.sleep(SETTINGS.write_timeout_s / 2)
            client.send(GET)
            await asyncio.sleep(SETTINGS.write_timeout_s / 4)
            client.transport.take(client.transport.buffered // 4)
            await asyncio.sleep(SETTINGS.write_timeout_s * 0.9)
            assert client.transport.closed_at is None
            assert await client.closed_after(200) <= SETTINGS.write_timeout_s

    run_virtual(main())


def test_whoever_reads_by_the_byte_does_not_hold_its_connection_for_ever():
    async def main() -> None:
        async with serving() as (_, server):
            client = Client(server, unread=True).send(GET)
            for _ in range(100):
                await asyncio.sleep(20)
                client.transport.take(1)
            assert client.transport.closed_at is not None and client.transport.buffered
            assert client.transport.closed_at <= SETTINGS.rest_timeout_s + SETTINGS.keep_alive_s

    run_virtual(main())


def test_a_refusal_that_nobody_reads_does_not_hold_its_connection():
    async def main() -> None:
        async with serving() as (_, server):
            assert await Client(server, unread=True).send(b"\0").closed_after(200) == SETTINGS.write_timeout_s

    run_virtual(main())


def chunked(rest: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n" + rest


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /live HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /live HTTP/1.1\r\na: " + b"b" * 16_384 + b"\r\n\r\n", 431),
        (b"GET /" + b"b" * 16_384, 431),
        (b"GET /live HTTP/1.1\r\n" + b"b" * 16_384, 431),
        (b"GET /live HTTP/1.1\r\n" + b"a: b\r\n" * 100 + b"\r\n", 200),
        (b"GET /live HTTP/1.1\r\na: " + b"b" * 16_000 + b"\r\n\r\n", 200),
        (GET * 40, 200),
    ],
    ids=["headers", "a header", "the path", "a header's name", "as many as may", "as long as may", "pipelined"],
)
def test_heads_have_bounds(sent: bytes, status: int):
    async def main() -> None:
        async with serving() as (_, server):
            client = Client(server).send(sent)
            await asyncio.sleep(0.1)
            assert client.statuses == [status]
            if sent == GET * 40:
                assert client.transport.closed_at is not None
            elif status != 200:
                assert b'"type":"invalid_request_error"' in client.written

    run_virtual(main())


@pytest.mark.parametrize(
    "parts",
    [
        [b"0\r\n" + b"a: b\r\n" * 200],
        [b"0\r\na: ", *[b"b" * 1000] * 40],
        [b"1;", *[b"b" * 1000] * 40],
    ],
    ids=["trailers", "a trailer", "a chunk's extension"],
)
def test_what_frames_a_body_has_bounds(parts: list[bytes]):
    async def main() -> None:
        async with serving() as (fe, server):
            client = Client(server).send(chunked(parts[0]))
            for part in parts[1:]:
                client.send(part)
            assert len(client.protocol.headers) <= SETTINGS.max_headers + 1
            assert client.protocol._refused, "no more of it is read"
            assert await client.closed_after(40) <= 30
            assert client.statuses == [408]
            assert not fe.calls

    run_virtual(main())


def test_of_too_many_connections_those_go_first_that_never_asked():
    async def main() -> None:
        async with serving(lambda call: None, connection=ConnectionSettings(max_connections=3)) as (fe, server):
            kept = Client(server).send(GET)
            busy = Client(server).send(
                b"POST /v1/completions HTTP/1.1\r\ncontent-length: 40\r\n\r\n"
                + b'{"model":"org/tiny","prompt":"hello yo"}'
            )
            await asyncio.sleep(0.1)
            assert fe.app.generation.num_open == 1
            idle = [Client(server) for _ in range(50)]
            await asyncio.sleep(0.1)
            assert [client.transport.closed_at is None for client in idle] == [False] * 49 + [True]
            assert kept.transport.closed_at is None and busy.transport.closed_at is None
            kept.send(GET)
            await asyncio.sleep(0.1)
            assert kept.statuses == [200, 200]
            assert len(list(server.state.connections)) == 3
            busy.transport.abort()
            await asyncio.sleep(0.1)

    run_virtual(main())


def test_when_none_waits_the_newest_goes():
    open_ones = OpenConnections[str](2)
    for name in ("a", "b", "c"):
        open_ones.add(name)
        open_ones.busy(name)
    assert open_ones.take_surplus() == "c"
    assert open_ones.take_surplus() is None
    open_ones.waits("c")
    assert list(open_ones) == ["a", "b"], "a connection that was given up does not come back"
    open_ones.waits("b")
    open_ones.add("d")
    open_ones.busy("d")
    assert open_ones.take_surplus() == "b"
    open_ones.discard("b")
    assert list(open_ones) == ["a", "d"]


@pytest.mark.parametrize(
    ("limits", "allowed", "raised"),
    [
        ((1024, 1 << 20), 5000, 5000 + RESERVED_FILES),
        ((1024, 4096), 4096 - RESERVED_FILES, 4096),
        ((1 << 20, 1 << 20), 5000, None),
        ((-1, -1), 5000, None),
        ((256, 256), 128, 256),
    ],
)
def test_open_files_bound_connections(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], allowed: int, raised: int | None
):
    set_to: list[int] = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, new: set_to.append(new[0]))
    assert allowed_by_open_files(5000) == allowed
    assert set_to == ([] if raised is None else [raised])


def half_sent(num_bytes: int = 100) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9999999\r\n\r\n" + b"x" * num_bytes


def test_bodies_that_do_not_arrive_give_way_to_those_that_do():
    async def main() -> None:
        async with serving(settings=FrontendSettings(max_arriving_bodies=3, max_open_requests=4)) as (_, server):
            hostile: list[Client] = []
            for _ in range(20):
                hostile.append(Client(server).send(half_sent()))
                await asyncio.sleep(0.01)
            assert [len(client.statuses) for client in hostile] == [1] * 17 + [0] * 3
            body = chat_body()
            honest = Client(server).send(
                b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            await asyncio.sleep(0.01)
            honest.send(body)
            await asyncio.sleep(0.01)
            assert honest.statuses == [200]
            await hostile[-1].closed_after(40)
            assert {status for client in hostile for status in client.statuses} == {408}

    run_virtual(main())


def test_all_bodies_together_have_a_bound_that_small_ones_do_not_count_for():
    async def main() -> None:
        large = 1_000_000
        settings = FrontendSettings(max_bodies_bytes=2 * large)
        async with serving(settings=settings) as (fe, server):
            hostile = [Client(server).send(half_sent()) for _ in range(3)]
            for _ in range(20):
                await asyncio.sleep(0)
                for client in hostile:
                    client.send(b"x" * (large // 20))
            await asyncio.sleep(0.1)
            assert sorted(client.statuses for client in hostile) == [[], [], [429]]
            assert fe.app._bodies.num_bytes <= 2 * large
            small = Client(server).send(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 40\r\n\r\n")
            small.send(b'{"model":"org/tiny","prompt":"hello yo"}')
            await asyncio.sleep(0.1)
            assert small.statuses == [200]
            await asyncio.sleep(40)
            assert fe.app._bodies.num_bytes == 0

    run_virtual(main())


def test_the_room_of_a_body_is_counted_once():
    bodies = Bodies(1, 100)
    held = bodies.hold(FREE_BYTES, 0)
    assert held == 0
    held = bodies.hold(FREE_BYTES + 60, 0)
    assert held == 60
    assert bodies.hold(FREE_BYTES + 41, 0) is None
    assert bodies.hold(FREE_BYTES + 100, 60) == 100
    bodies.release(100)
    assert bodies.num_bytes == 0
