"""A client's socket connections: one per (address, lane), made on demand, shared, and tried in the target's order."""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.messages.control import NONCE_BYTES
from stator.runtime.tasks import TaskOwner
from stator.transport.addresses import TcpAddress, UnixAddress
from stator.transport.base import Lane, Target
from stator.transport.client_connection import ClientConnection
from stator.transport.client_stream import ClientStream
from stator.transport.connection import TransportStats
from stator.transport.refusals import too_many_streams
from stator.transport.settings import Identity, TransportSettings
from stator.transport.tls import TlsContexts

logger = logging.getLogger(__name__)

SocketAddress = TcpAddress | UnixAddress
_Key = tuple[SocketAddress, Lane]
_DialKey = tuple[tuple[SocketAddress, ...], Lane, str | None]
_Waiting = tuple[ClientStream, Target, Any]


class ConnectionPool:
    def __init__(self, identity: Identity, settings: TransportSettings) -> None:
        """Raises ConfigError for TLS files that cannot be used."""
        self.stats = TransportStats()
        self._identity = identity
        self._settings = settings
        self._tls = None if identity.tls is None else TlsContexts(identity.tls)
        self._tasks = TaskOwner("request plane client")
        self._live: dict[_Key, ClientConnection] = {}
        self._connecting: dict[_Key, asyncio.Task[ClientConnection | StatorError]] = {}
        self._connections: dict[ClientConnection, None] = {}
        self._dials: dict[_DialKey, list[_Waiting]] = {}

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def open(self, stream: ClientStream, target: Target, addresses: Sequence[SocketAddress], request: Any) -> None:
        """Begin the stream on a connection that is up, or once one is. Raises StatorError if too many wait."""
        for address in addresses:
            connection = self._live.get((address, target.lane))
            if connection is not None and _is_meant(connection, target.instance_id):
                connection.open(stream, target, request)
                return
        key = (tuple(addresses), target.lane, target.instance_id)
        waiting = self._dials.get(key)
        if waiting is None:
            waiting = self._dials[key] = []
            self._tasks.spawn(self._dial(key), f"connect to {addresses[0]}")
        if len(waiting) >= self._settings.max_streams:
            raise too_many_streams(self._settings.max_streams)
        waiting.append((stream, target, request))

    async def close(self) -> None:
        """Streams must have been cancelled before."""
        await self._tasks.close()
        connections = list(self._connections)
        for connection in connections:
            connection.close(StatorError(ErrorCode.CANCELLED, "this client was closed"))
        await close_connections(connections, self._settings.close_timeout_s)

    async def _dial(self, key: _DialKey) -> None:
        """Reach one of the addresses and begin there the streams that wait for it."""
        addresses, lane, instance_id = key
        reached = await self._reach(addresses, lane, instance_id)
        for stream, target, request in self._dials.pop(key):
            if isinstance(reached, StatorError):
                stream.lose(StatorError(reached.code, reached.message))
            elif not stream.closed:
                reached.open(stream, target, request)

    async def _reach(
        self, addresses: Sequence[SocketAddress], lane: Lane, instance_id: str | None
    ) -> ClientConnection | StatorError:
        """A server that is another instance is used only if no address leads to the right one: it then says so."""
        other: ClientConnection | None = None
        failures: list[StatorError] = []
        for address in addresses:
            reached = await self._connection(address, lane)
            if isinstance(reached, StatorError):
                failures.append(reached)
            elif _is_meant(reached, instance_id):
                return reached
            else:
                other = other or reached
        return other or _worst(failures)

    async def _connection(self, address: SocketAddress, lane: Lane) -> ClientConnection | StatorError:
        key = (address, lane)
        live = self._live.get(key)
        if live is not None:
            return live
        task = self._connecting.get(key)
        if task is None:
            task = self._connecting[key] = self._tasks.spawn(self._connect(key), f"connect to {address}")
        return await asyncio.shield(task)

    async def _connect(self, key: _Key) -> ClientConnection | StatorError:
        address, lane = key
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                return await self._shake_hands(key, address, lane)
        except StatorError as error:
            return StatorError(error.code, f"{address}: {error.message}")
        except TimeoutError:
            seconds = self._settings.connect_timeout_s
            return StatorError(ErrorCode.INSTANCE_LOST, f"{address} did not answer within {seconds:g} s")
        except (OSError, UnicodeError) as error:
            return StatorError(ErrorCode.INSTANCE_LOST, f"cannot connect to {address}: {error}")
        finally:
            self._connecting.pop(key, None)

    async def _shake_hands(self, key: _Key, address: SocketAddress, lane: Lane) -> ClientConnection:
        is_tcp = isinstance(address, TcpAddress)
        session = self._tls.to(address.host, str(address)) if is_tcp and self._tls is not None else None

        def made() -> ClientConnection:
            return ClientConnection(
                self._identity,
                lane,
                self._settings,
                self.stats,
                nonce=secrets.token_bytes(NONCE_BYTES),
                address=str(address),
                on_unusable=lambda connection: self._drop(key, connection),
                tls=session,
            )

        loop = asyncio.get_running_loop()
        if isinstance(address, UnixAddress):
            _, connection = await loop.create_unix_connection(made, address.path)
        else:
            _, connection = await loop.create_connection(made, address.host, address.port)
        self._connections[connection] = None
        connection.closed.add_done_callback(lambda _: self._connections.pop(connection, None))
        try:
            await connection.connected
        except BaseException:
            connection.abort()
            raise
        if connection.usable:
            self._live[key] = connection
        return connection

    def _drop(self, key: _Key, connection: ClientConnection) -> None:
        if self._live.get(key) is connection:
            del self._live[key]


def _is_meant(connection: ClientConnection, instance_id: str | None) -> bool:
    return instance_id is None or connection.instance_id == instance_id


def _worst(failures: Sequence[StatorError]) -> StatorError:
    """One error for all addresses: a refusal says more than an address where nobody listens."""
    for failure in failures:
        if failure.code is not ErrorCode.INSTANCE_LOST:
            return failure
    return StatorError(ErrorCode.INSTANCE_LOST, "; ".join(failure.message for failure in failures))


async def close_connections(connections: Sequence[Any], timeout_s: float) -> None:
    """Wait until closing connections are closed; abort those that still have something to send after timeout_s."""
    if not connections:
        return
    _, late = await asyncio.wait([connection.closed for connection in connections], timeout=timeout_s)
    if late:
        for connection in connections:
            connection.abort()
        await asyncio.wait(late)
