"""The request plane's server: one set of endpoints, reached in process, over a Unix socket and over TCP at once."""

import asyncio
import contextlib
import logging
import os
import secrets
import socket

from stator.errors import ConfigError
from stator.ids import InstanceId
from stator.messages.control import NONCE_BYTES
from stator.transport.addresses import InProcessAddress, UnixAddress
from stator.transport.base import Endpoint
from stator.transport.connection import TransportStats
from stator.transport.dispatch import Dispatcher
from stator.transport.inprocess import InProcessCarrier, InProcessNetwork
from stator.transport.listening import BACKLOG, BindTcp, bind_tcp, bind_unix
from stator.transport.pool import close_connections
from stator.transport.refusals import TOKEN_SOURCES
from stator.transport.server_connection import ServerConnection
from stator.transport.settings import Identity, Listen, TransportSettings
from stator.transport.tls import TlsContexts

logger = logging.getLogger(__name__)

TURNED_AWAY_EVERY_S = 10.0


class RequestPlaneServer:
    """Implements transport.base.TransportServer. `listen` says which carriers it has; they share the endpoints.

    addresses: in process first, then the Unix socket, then TCP; callers that cannot reach one try the next.
    """

    def __init__(
        self,
        identity: Identity,
        listen: Listen,
        *,
        network: InProcessNetwork | None = None,
        settings: TransportSettings | None = None,
        bind: BindTcp = bind_tcp,
    ) -> None:
        """Raises ConfigError for an in-process name without a network, for sockets without a token, and for TLS files
        that cannot be used."""
        if listen.inproc_name is not None and network is None:
            raise ConfigError(f"inproc_name {listen.inproc_name!r} needs an InProcessNetwork")
        if (listen.host is not None or listen.unix_path is not None) and not identity.token:
            raise ConfigError(f"a request plane on sockets needs a token: {TOKEN_SOURCES}")
        self.stats = TransportStats()
        self._identity = identity
        self._listen = listen
        self._network = network
        self._settings = settings or TransportSettings()
        self._bind = bind
        self._dispatcher = Dispatcher(identity)
        self._inprocess: InProcessCarrier | None = None
        self._servers: list[asyncio.Server] = []
        self._connections: dict[ServerConnection, None] = {}
        self._unproved: dict[ServerConnection, None] = {}
        self._turned_away = RareWarning(TURNED_AWAY_EVERY_S)
        self._tls = None if identity.tls is None else TlsContexts(identity.tls)
        self._addresses: list[str] = []

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self._addresses)

    @property
    def instance_id(self) -> InstanceId:
        return self._dispatcher.instance_id

    @instance_id.setter
    def instance_id(self, instance_id: InstanceId) -> None:
        """Calls that mean another instance are refused from now on (STALE_INSTANCE); those that run go on."""
        self._dispatcher.instance_id = instance_id
        for connection in list(self._connections):
            connection.go_away()

    def register(self, endpoint: Endpoint) -> None:
        self._dispatcher.register(endpoint)

    async def start(self) -> None:
        """Raises ConfigError for a port or path that cannot be had; nothing is left open then."""
        listen = self._listen
        try:
            if listen.inproc_name is not None and self._network is not None:
                carrier = InProcessCarrier(self._dispatcher, self._settings)
                self._network.add(listen.inproc_name, carrier)
                self._inprocess = carrier
                self._addresses.append(str(InProcessAddress(listen.inproc_name)))
            if listen.unix_path is not None:
                await self._serve(bind_unix(listen.unix_path))
                self._addresses.append(str(UnixAddress(listen.unix_path)))
            if listen.host is not None:
                bound, address = await self._bind(listen, listen.host)
                await self._serve(bound)
                self._addresses.append(str(address))
        except BaseException:
            await self.close()
            raise

    def mute(self) -> None:
        self._dispatcher.closing = True
        for connection in list(self._connections):
            connection.mute()

    async def close(self) -> None:
        self._dispatcher.closing = True
        for server in self._servers:
            server.close()
        if self._inprocess is not None and self._network is not None and self._listen.inproc_name is not None:
            self._network.remove(self._listen.inproc_name)
            self._inprocess.close()
            self._inprocess = None
        connections = list(self._connections)
        for connection in connections:
            connection.shut_down()
        await close_connections(connections, self._settings.close_timeout_s)
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()
        if (path := self._listen.unix_path) is not None and str(UnixAddress(path)) in self._addresses:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._addresses.clear()

    async def _serve(self, bound: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            if bound.family == socket.AF_UNIX:
                server = await loop.create_unix_server(lambda: self._make(None), sock=bound, backlog=BACKLOG)
            else:
                server = await loop.create_server(lambda: self._make(self._tls), sock=bound, backlog=BACKLOG)
        except BaseException:
            bound.close()
            raise
        self._servers.append(server)

    def _make(self, contexts: TlsContexts | None) -> ServerConnection:
        return ServerConnection(
            self._dispatcher,
            self._settings,
            self.stats,
            token=self._identity.token or "",
            new_nonce=lambda: secrets.token_bytes(NONCE_BYTES),
            on_made=self._made,
            on_proved=self._proved,
            contexts=contexts,
        )

    def _made(self, connection: ServerConnection) -> bool:
        """False for a connection that is not taken."""
        settings = self._settings
        if self._dispatcher.closing:
            return False
        if len(self._connections) - len(self._unproved) >= settings.max_connections:
            self._turned_away.say(f"{settings.max_connections} connections are open; no more are taken")
            return False
        self._connections[connection] = self._unproved[connection] = None
        connection.closed.add_done_callback(lambda _: self._forget(connection))
        if len(self._unproved) > settings.max_unauthenticated:
            oldest = next(iter(self._unproved))
            self._turned_away.say(
                f"more than {settings.max_unauthenticated} connections have not proved the token; closing the oldest, "
                f"from {oldest.peer}"
            )
            self._unproved.pop(oldest)
            oldest.abort()
        return True

    def _proved(self, connection: ServerConnection) -> None:
        self._unproved.pop(connection, None)

    def _forget(self, connection: ServerConnection) -> None:
        self._connections.pop(connection, None)
        self._unproved.pop(connection, None)


class RareWarning:
    """One line for many events: at most one in every_s, with how many were not told."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next: float | None = None
        self._untold = 0

    def say(self, message: str) -> None:
        now = asyncio.get_running_loop().time()
        if self._next is not None and now < self._next:
            self._untold += 1
            return
        more = f" ({self._untold} times more since the last such line)" if self._untold else ""
        self._next, self._untold = now + self._every_s, 0
        logger.warning("%s%s", message, more)
