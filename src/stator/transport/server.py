"""The request plane's server: one set of endpoints, reached in process, over a Unix socket and over TCP at once."""

import asyncio
import contextlib
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
from stator.transport.listening import BACKLOG, bind_tcp, bind_unix
from stator.transport.pool import close_connections
from stator.transport.refusals import TOKEN_SOURCES
from stator.transport.server_connection import ServerConnection
from stator.transport.settings import Identity, Listen, TransportSettings


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
    ) -> None:
        """Raises ConfigError for an in-process name without a network, and for sockets without a token."""
        if listen.inproc_name is not None and network is None:
            raise ConfigError(f"inproc_name {listen.inproc_name!r} needs an InProcessNetwork")
        if (listen.host is not None or listen.unix_path is not None) and not identity.token:
            raise ConfigError(f"a request plane on sockets needs a token: {TOKEN_SOURCES}")
        self.stats = TransportStats()
        self._identity = identity
        self._listen = listen
        self._network = network
        self._settings = settings or TransportSettings()
        self._dispatcher = Dispatcher(identity)
        self._inprocess: InProcessCarrier | None = None
        self._servers: list[asyncio.Server] = []
        self._connections: set[ServerConnection] = set()
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
                bound, address = await bind_tcp(listen, listen.host)
                await self._serve(bound)
                self._addresses.append(str(address))
        except BaseException:
            await self.close()
            raise

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
                server = await loop.create_unix_server(self._make, sock=bound, backlog=BACKLOG)
            else:
                server = await loop.create_server(self._make, sock=bound, backlog=BACKLOG)
        except BaseException:
            bound.close()
            raise
        self._servers.append(server)

    def _make(self) -> ServerConnection:
        return ServerConnection(
            self._dispatcher,
            self._settings,
            self.stats,
            token=self._identity.token or "",
            new_nonce=lambda: secrets.token_bytes(NONCE_BYTES),
            on_made=self._made,
        )

    def _made(self, connection: ServerConnection) -> bool:
        """False for a connection that is not taken."""
        if self._dispatcher.closing or len(self._connections) >= self._settings.max_connections:
            return False
        self._connections.add(connection)
        connection.closed.add_done_callback(lambda _: self._connections.discard(connection))
        return True
