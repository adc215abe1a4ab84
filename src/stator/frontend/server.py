"""Listens for the Frontend: uvicorn's connection handling in the running loop, started and stopped by its owner."""

import asyncio
import errno
import gc
import logging
import os
import socket
from collections.abc import Callable
from email.utils import formatdate
from time import time
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from stator.errors import ConfigError
from stator.frontend.app import FrontendApp
from stator.frontend.connections import OpenConnections, allowed_by_open_files
from stator.frontend.protocol import BoundedHttpProtocol
from stator.frontend.settings import ConnectionSettings

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
"""For answers that were cut short to be written, and for connections to close, before they are dropped."""

LINGER_S = 1.0
"""How long a connection that was handed over may be idle before it is closed."""

GC_THRESHOLD = 10_000
"""Container objects made and not freed between two looks of the garbage collector at the young ones."""


class _Tasks(dict[Any, None]):
    """As much of a set as uvicorn needs, in the order of arrival, as OpenConnections."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)


class FrontendServer:
    """start, then drain if running requests matter, then stop. Installs no signal handlers.

    uvicorn's own Server is not used: it takes the process's signals and polls for its end.
    """

    def __init__(
        self,
        app: FrontendApp,
        *,
        host: str = "0.0.0.0",
        port: int = 8000,
        fd: int | None = None,
        settings: ConnectionSettings | None = None,
    ) -> None:
        """fd: a bound TCP socket that the parent process opened; host and port are then not used."""
        self._app = app
        self._host = host
        self._port = port
        self._fd = fd
        self._settings = settings if settings is not None else ConnectionSettings()
        self._state = ServerState()
        self._state.tasks = _Tasks()  # type: ignore[assignment]
        self._server: asyncio.Server | None = None
        self._addresses: tuple[tuple[str, int], ...] = ()
        self._date_timer: asyncio.TimerHandle | None = None
        self._none_connected = asyncio.Event()

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """(host, port) of each listening socket; valid after start."""
        return self._addresses

    @property
    def port(self) -> int:
        return self._addresses[0][1]

    async def start(self) -> None:
        """Returns when connections are accepted. Raises ConfigError when the address cannot be used."""
        uvicorn_log = logging.getLogger("uvicorn.error")
        if uvicorn_log.level == logging.NOTSET:
            # At NOTSET it formats a trace record for every connection, only to drop it.
            uvicorn_log.setLevel(logging.INFO)
        loop = asyncio.get_running_loop()
        max_connections = allowed_by_open_files(self._settings.max_connections)
        self._state.connections = OpenConnections[Any](max_connections)  # type: ignore[assignment]
        config = Config(
            self._app,  # type: ignore[arg-type]
            loop="none",
            http=BoundedHttpProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=self._settings.keep_alive_s,  # type: ignore[arg-type]
        )
        config.load()
        self._server = await self._listen(
            loop, lambda: BoundedHttpProtocol(config, self._state, loop, self._settings, self._connection_lost)
        )
        self._addresses = tuple(sock.getsockname()[:2] for sock in self._server.sockets)
        for listening in self._server.sockets:
            _bound_kernel_buffer(listening.fileno(), self._settings.kernel_receive_bytes)
        self._refresh_date()
        _settle_heap()
        logger.info("listening on %s", ", ".join(f"{host}:{port}" for host, port in self._addresses))

    async def _listen(self, loop: asyncio.AbstractEventLoop, factory: Callable[[], asyncio.Protocol]) -> asyncio.Server:
        backlog = self._settings.backlog
        try:
            if self._fd is not None:
                sock = socket.socket(fileno=self._fd)
                return await loop.create_server(factory, sock=sock, backlog=backlog)
            return await loop.create_server(factory, self._host, self._port, backlog=backlog)
        except OSError as error:
            raise ConfigError(self._explain(error)) from error

    def _explain(self, error: OSError) -> str:
        if self._fd is not None:
            return f"cannot accept connections on inherited socket {self._fd}: {error.strerror or error}"
        where = f"{self._host} port {self._port}"
        if error.errno == errno.EADDRINUSE:
            return f"{where} is in use by another process; stop it or choose another port with --Frontend.port"
        if error.errno == errno.EACCES:
            return f"no permission to listen on {where}; choose a port above 1023 with --Frontend.port"
        reason = error.strerror or os.strerror(error.errno or 0)
        return f"cannot listen on {where}: {reason}; choose another address with --Frontend.host and --Frontend.port"

    def _refresh_date(self) -> None:
        self._state.default_headers = [(b"date", formatdate(time(), usegmt=True).encode("ascii"))]
        self._date_timer = asyncio.get_running_loop().call_later(1.0, self._refresh_date)

    @property
    def num_open(self) -> int:
        """Requests that are not answered."""
        return self._app.generation.num_open

    async def drain(self, grace_s: float | None = None) -> bool:
        """Refuse new requests, let open ones finish. True if all did within grace_s. Connections stay open, so that
        clients and load balancers learn why they are refused."""
        self._app.generation.drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._app.generation.idle()
        except TimeoutError:
            logger.warning("%d requests did not finish in %g s", self.num_open, grace_s)
            return False
        return True

    async def hand_over(self) -> None:
        """Accept no more, serve to the end whoever is connected, and return when nobody is. For a server whose
        listening socket others accept from too: no client is refused, and none sees a reset."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            cast(BoundedHttpProtocol, connection).hand_over(LINGER_S)
        await self._closed(None)

    async def stop(self) -> None:
        """Stop listening, end what is open (its clients are told), close every connection. Idempotent."""
        self._app.generation.drain()
        if self._server is not None:
            self._server.close()
        if self._date_timer is not None:
            self._date_timer.cancel()
        self._app.generation.abort()
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._closed(CLOSE_TIMEOUT_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await self._closed(CLOSE_TIMEOUT_S)
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    def _connection_lost(self) -> None:
        if not self._state.connections:
            self._none_connected.set()

    async def _closed(self, timeout_s: float | None) -> None:
        """Wait until every connection is gone and every answer's task has ended, or until timeout_s passed."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._state.connections:
                    self._none_connected.clear()
                    await self._none_connected.wait()
                if self._state.tasks:
                    await asyncio.wait(list(self._state.tasks))
        except TimeoutError:
            pass


def _bound_kernel_buffer(fd: int, num_bytes: int) -> None:
    """Of each connection that is accepted there, what the kernel takes that nobody has read. By itself it grows to
    megabytes, and where many clients send what is not read, the system runs out of memory for TCP, and drops packets of
    all. A loop whose sockets are not the kernel's (stator.testing.sim) has none to bound."""
    if fd < 0:
        return
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, num_bytes)


def _settle_heap() -> None:
    """Keep the garbage collector from walking, over and over, what start-up built for the life of the process.

    A request makes and drops a few hundred objects, nearly all of them freed by their reference counts; the collector
    is there for the few cycles, and may come rarely.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
