"""What the transport contract runs in: servers, clients, recording sinks, and a relay that can fail like a network."""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from stator.config.authority import issue, make_authority
from stator.config.node_tls import DIR, NodeTls, node_tls
from stator.errors import StatorError
from stator.ids import InstanceId, RequestId
from stator.runtime.context import CallContext, loop_time
from stator.transport.addresses import TcpAddress, UnixAddress, parse_address
from stator.transport.base import Call, Endpoint, Handler, Lane, StreamHandle, Target
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen, TransportSettings

TIMEOUT_S = 10.0
TOKEN = "the deployment's token"


class Carrier(StrEnum):
    INPROCESS = "inprocess"
    UNIX = "unix"
    TCP = "tcp"
    TLS = "tls"
    """TCP, with a certificate on both sides."""


class Recorder:
    """A sink that remembers everything, and wakes whoever waits for it."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.ends: list[StatorError | None] = []
        self.items_after_end = 0
        self._changed = asyncio.Event()

    def items(self, items: Sequence[Any], /) -> None:
        if self.ends:
            self.items_after_end += 1
        self.received.extend(items)
        self._changed.set()

    def end(self, error: StatorError | None = None, /) -> None:
        self.ends.append(error)
        self._changed.set()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def ended(self) -> StatorError | None:
        """The one end, after the loop had time for a second one."""
        await self.wait_for(lambda: bool(self.ends))
        await turns(5)
        assert len(self.ends) == 1, f"{len(self.ends)} ends"
        assert self.items_after_end == 0, "items after the end"
        return self.ends[0]

    async def code(self) -> str:
        """The error code that the stream ended with; empty for a normal end."""
        error = await self.ended()
        return "" if error is None else error.code.value


class Held:
    """A handler that keeps its calls for the test to drive."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.num_cancelled = 0
        self._changed = asyncio.Event()

    def __call__(self, call: Call) -> None:
        self.calls.append(call)
        call.on_cancel(self._cancelled)
        self._changed.set()

    def _cancelled(self) -> None:
        self.num_cancelled += 1
        self._changed.set()

    async def called(self, num_calls: int = 1) -> Call:
        await self._wait_for(lambda: len(self.calls) >= num_calls)
        return self.calls[num_calls - 1]

    async def cancelled(self, num_calls: int = 1) -> None:
        await self._wait_for(lambda: self.num_cancelled >= num_calls)
        await turns(5)
        assert self.num_cancelled == num_calls

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


def _barrier(call: Call) -> None:
    call.end()


async def turns(count: int) -> None:
    """Let the loop run that many times."""
    for _ in range(count):
        await asyncio.sleep(0)


def context(seconds: float | None = None, request_id: str = "request-1", **headers: str) -> CallContext:
    return CallContext(RequestId(request_id), None if seconds is None else loop_time() + seconds, headers)


@dataclass
class World:
    """One deployment on one carrier. Everything made here is closed, and checked to be gone, when the test ends."""

    carrier: Carrier
    identity: Identity
    settings: TransportSettings
    folder: Path
    network: InProcessNetwork
    servers: list[RequestPlaneServer]
    clients: list[RequestPlaneClient]

    async def serve(
        self,
        handlers: dict[str, Handler],
        *,
        request_type: Any = Any,
        instance: str = "server-1",
        guests: Collection[str] = (),
        **settings: Any,
    ) -> RequestPlaneServer:
        number = len(self.servers)
        listen = {
            Carrier.INPROCESS: Listen(host=None, inproc_name=f"server-{number}"),
            Carrier.UNIX: Listen(host=None, unix_path=str(self.folder / f"{number}.sock")),
            Carrier.TCP: Listen(host="127.0.0.1"),
            Carrier.TLS: Listen(host="127.0.0.1"),
        }[self.carrier]
        server = RequestPlaneServer(
            replace(self.identity, instance_id=InstanceId(instance), guests=frozenset(guests)),
            listen,
            network=self.network,
            settings=replace(self.settings, **settings),
        )
        self.servers.append(server)
        for name, handler in handlers.items():
            server.register(Endpoint(name, request_type, handler))
        server.register(Endpoint("barrier", Any, _barrier))
        await server.start()
        return server

    def client(self, **changes: Any) -> RequestPlaneClient:
        """changes: of the identity or of the settings."""
        identity = replace(self.identity, **{k: v for k, v in changes.items() if k in ("namespace", "token")})
        settings = {k: v for k, v in changes.items() if k not in ("namespace", "token")}
        client = RequestPlaneClient(identity, network=self.network, settings=replace(self.settings, **settings))
        self.clients.append(client)
        return client

    async def barrier(self, client: RequestPlaneClient, server: RequestPlaneServer | str) -> None:
        """Everything that either side sent before has been handled by the other: calls there and back are in order."""
        for _ in range(2):
            sink, _ = open_on(client, server, endpoint="barrier")
            assert await sink.ended() is None

    def unused_address(self) -> str:
        return {
            Carrier.INPROCESS: "inproc://nobody",
            Carrier.UNIX: f"unix://{self.folder / 'nobody.sock'}",
            Carrier.TCP: "tcp://127.0.0.1:9",
            Carrier.TLS: "tcp://127.0.0.1:9",
        }[self.carrier]

    @asynccontextmanager
    async def relay(self, server: RequestPlaneServer) -> AsyncGenerator["Relay", None]:
        relay = Relay(server.addresses[-1])
        await relay.start()
        try:
            yield relay
        finally:
            await relay.close()

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
        for server in self.servers:
            await server.close()


def open_on(
    client: RequestPlaneClient,
    address: RequestPlaneServer | str | tuple[str, ...],
    request: Any = None,
    *,
    endpoint: str = "run",
    lane: Lane = Lane.CALLS,
    instance: str | None = None,
    seconds: float | None = None,
    item_type: Any = Any,
    sink: Recorder | None = None,
) -> tuple[Recorder, StreamHandle]:
    if isinstance(address, RequestPlaneServer):
        address = address.addresses
    addresses = (address,) if isinstance(address, str) else address
    target = Target(addresses, endpoint, None if instance is None else InstanceId(instance), lane)
    sink = sink or Recorder()
    handle = client.open(target, request, sink, context=context(seconds), item_type=item_type)
    assert not sink.received and not sink.ends, "the sink was called from inside open"
    return sink, handle


def _certificate(folder: Path) -> NodeTls:
    make_authority(folder / "ca")
    issue(folder / "ca", ["127.0.0.1"], folder / "node")
    found = node_tls({DIR: str(folder / "node")})
    assert found is not None
    return found


@asynccontextmanager
async def world(carrier: Carrier, **settings: Any) -> AsyncGenerator[World, None]:
    before = asyncio.all_tasks()
    with tempfile.TemporaryDirectory(prefix="stator-") as folder:
        sockets = Path(folder) / "sockets"
        sockets.mkdir()
        made = World(
            carrier,
            Identity(token=TOKEN, role="test", tls=_certificate(Path(folder)) if carrier is Carrier.TLS else None),
            TransportSettings(**settings),
            sockets,
            InProcessNetwork(),
            [],
            [],
        )
        try:
            yield made
        finally:
            addresses = [address for server in made.servers for address in server.addresses]
            await made.close()
        await turns(3)
        left = {task.get_name() for task in asyncio.all_tasks() - before}
        assert not left, f"tasks left behind: {left}"
        for address in addresses:
            assert not await _is_served(made, address), f"{address} is still served"
        assert not os.listdir(sockets), "a socket file was left behind"


async def _is_served(made: World, text: str) -> bool:
    address = parse_address(text)
    try:
        if isinstance(address, TcpAddress):
            _, writer = await asyncio.open_connection(address.host, address.port)
        elif isinstance(address, UnixAddress):
            _, writer = await asyncio.open_unix_connection(address.path)
        else:
            return made.network.find(address.name) is not None
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


class Relay:
    """A TCP address that passes bytes on to a server, until it is told to fail."""

    def __init__(self, upstream: str) -> None:
        self._upstream = parse_address(upstream)
        self._server: asyncio.Server | None = None
        self.address = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._up_open = asyncio.Event()
        self._down_open = asyncio.Event()
        self._up_open.set()
        self._down_open.set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def freeze(self) -> None:
        """Pass nothing on any more and read nothing, but keep the connections."""
        self._up_open.clear()
        self._down_open.clear()

    def freeze_downstream(self) -> None:
        """Read nothing from the server any more; the caller's bytes still reach it."""
        self._down_open.clear()

    def cut(self) -> None:
        """Close every connection without a word."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream = self._upstream
        if isinstance(upstream, TcpAddress):
            up_reader, up_writer = await asyncio.open_connection(upstream.host, upstream.port)
        else:
            assert isinstance(upstream, UnixAddress)
            up_reader, up_writer = await asyncio.open_unix_connection(upstream.path)
        self._writers += [writer, up_writer]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, up_writer, self._up_open))
                group.create_task(self._pass_on(up_reader, writer, self._down_open))
        for each in (writer, up_writer):
            each.close()
            with contextlib.suppress(OSError):
                await each.wait_closed()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while True:
                await gate.wait()
                data = await reader.read(65536)
                await gate.wait()
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        writer.close()
