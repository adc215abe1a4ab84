"""The request plane's client: picks the carrier by the address, shares connections, never raises from `open`."""

import asyncio
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.runtime.context import CallContext
from stator.transport.addresses import Address, InProcessAddress, parse_address
from stator.transport.base import Sink, StreamHandle, Target
from stator.transport.client_stream import ClientStream
from stator.transport.connection import TransportStats
from stator.transport.inprocess import InProcessCarrier, InProcessNetwork
from stator.transport.pool import ConnectionPool, SocketAddress
from stator.transport.refusals import HUB_ROLE, stale_instance, wrong_namespace
from stator.transport.server_call import deadline_passed
from stator.transport.settings import Identity, TransportSettings

MAX_PARSED_ADDRESSES = 4096


class RequestPlaneClient:
    """Implements transport.base.TransportClient over all carriers.

    identity: who calls, and the token that is proved to servers on sockets. network: where `inproc://` names are
    looked up; without it such addresses are passed over. Making one raises ConfigError for TLS files that cannot be
    used.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        network: InProcessNetwork | None = None,
        settings: TransportSettings | None = None,
    ) -> None:
        self._identity = identity
        self._network = network
        self._settings = settings or TransportSettings()
        self._parsed: dict[str, Address] = {}
        self._streams: dict[ClientStream, None] = {}
        self._pool = ConnectionPool(identity, self._settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        window = self._settings.window(target.lane)
        stream = ClientStream(target.endpoint, sink, context, item_type, window, self._streams, loop)
        if context.deadline is not None and context.deadline <= loop.time():
            stream.break_soon(deadline_passed(target.endpoint))
        elif self._closed:
            stream.break_soon(StatorError(ErrorCode.CANCELLED, "this client was closed"))
        else:
            try:
                self._route(stream, target, request)
            except StatorError as error:
                stream.break_soon(error)
        return stream

    async def close(self) -> None:
        self._closed = True
        for stream in list(self._streams):
            stream.cancel()
        await self._pool.close()
        # The last ends are on their way to their sinks.
        await asyncio.sleep(0)

    @property
    def stats(self) -> TransportStats:
        """Of the socket connections."""
        return self._pool.stats

    @property
    def num_connections(self) -> int:
        """Sockets that are open now."""
        return self._pool.num_connections

    def _route(self, stream: ClientStream, target: Target, request: Any) -> None:
        """Raises StatorError for a target that cannot be reached."""
        sockets: list[SocketAddress] = []
        refusal: StatorError | None = None
        for text in target.addresses:
            address = self._parsed.get(text) or self._parse(text)
            if not isinstance(address, InProcessAddress):
                sockets.append(address)
                continue
            server = None if self._network is None else self._network.find(address.name)
            if server is None:
                continue
            refusal = self._refusal(server, target)
            if refusal is None:
                server.open(stream, target, request)
                return
        if not sockets:
            raise refusal or StatorError(
                ErrorCode.INSTANCE_LOST,
                f"nothing is reached for {target.endpoint} at {', '.join(target.addresses) or 'no address'}",
            )
        self._pool.open(stream, target, sockets, request)

    def _refusal(self, server: InProcessCarrier, target: Target) -> StatorError | None:
        ours, theirs = self._identity.namespace, server.identity
        if not theirs.takes(ours):
            return wrong_namespace(theirs.namespace, ours, is_hub=theirs.role == HUB_ROLE)
        if target.instance_id is not None and target.instance_id != server.instance_id:
            return stale_instance(target.instance_id, server.instance_id)
        return None

    def _parse(self, text: str) -> Address:
        try:
            address = parse_address(text)
        except ValueError as error:
            raise StatorError(ErrorCode.PROTOCOL, str(error)) from error
        if len(self._parsed) >= MAX_PARSED_ADDRESSES:
            self._parsed.clear()
        self._parsed[text] = address
        return address
