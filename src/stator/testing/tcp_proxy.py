"""A TCP proxy between a client and a real server, for tests that take the network away or make it worse."""

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass

from stator.runtime.tasks import TaskOwner

_CHUNK_BYTES = 64 * 1024
_IN_FLIGHT = 256
"""Chunks of one direction of a connection that are on their way; then the sender waits."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: a close sends a reset."""


@dataclass(slots=True)
class Link:
    """What a connection's bytes go through, each way; may be changed while they do.

    delay_s: until a byte arrives. bytes_per_s: of one direction of one connection; None for no limit.
    """

    delay_s: float = 0.0
    bytes_per_s: float | None = None


class TcpProxy:
    """Passes connections on to (host, port) from `start` to `close`; `cut` breaks them off and takes no new ones.

    bind: the address it listens on, and port, 0 for a free one. link: how it passes them on.
    """

    def __init__(
        self, host: str, port: int, *, bind: tuple[str, int] = ("127.0.0.1", 0), link: Link | None = None
    ) -> None:
        self.link = link or Link()
        self._upstream = (host, port)
        self._host, self._port = bind
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._tasks = TaskOwner("tcp proxy")

    @property
    def port(self) -> int:
        """Where it listens, also after a cut."""
        return self._port

    @property
    def num_connections(self) -> int:
        return len(self._writers) // 2

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, self._host, self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        if server is not None:
            await server.wait_closed()

    def reset(self) -> None:
        """Ends every connection with a reset on both sides; new ones are taken."""
        for writer in list(self._writers):
            connection = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def lose(self) -> None:
        """From now on nothing arrives, either way, and no connection ends."""
        self._passing.clear()

    def find(self) -> None:
        """What was lost arrives after all, as from a peer that sends it again."""
        self._passing.set()

    async def close(self) -> None:
        self.find()
        await self.cut()
        await self._tasks.close()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._tasks.spawn(self._serve(reader, writer), "connection")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            back, upstream = await asyncio.open_connection(*self._upstream)
            self._writers.add(upstream)
            if self._server is None:
                return
            async with asyncio.TaskGroup() as group:
                for source, target in ((reader, upstream), (back, writer)):
                    chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
                    group.create_task(self._take(source, chunks))
                    group.create_task(self._pass_on(chunks, target))
        except* OSError:
            pass
        finally:
            for end in (writer, upstream):
                if end is not None:
                    self._writers.discard(end)
                    end.close()
                    with contextlib.suppress(OSError):
                        await end.wait_closed()

    async def _take(self, reader: asyncio.StreamReader, chunks: "asyncio.Queue[tuple[float, bytes]]") -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(_CHUNK_BYTES):
            await chunks.put((loop.time(), data))
        await chunks.put((loop.time(), b""))

    async def _pass_on(self, chunks: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        free_at = 0.0
        while True:
            sent_at, data = await chunks.get()
            begin = max(sent_at, free_at)
            rate = self.link.bytes_per_s
            free_at = begin + (len(data) / rate if rate else 0.0)
            await asyncio.sleep(max(0.0, free_at + self.link.delay_s - loop.time()))
            await self._passing.wait()
            if not data:
                # Either end's close closes both.
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
