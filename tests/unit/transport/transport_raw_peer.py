"""Connections without a socket, and hand-made frames, for tests of what a faulty peer may send."""

import asyncio
from typing import Any

import msgspec

from stator.ids import InstanceId
from stator.messages import control
from stator.transport import handshake
from stator.transport.base import Call, Endpoint, Lane
from stator.transport.client_connection import ClientConnection
from stator.transport.connection import TransportStats
from stator.transport.dispatch import Dispatcher
from stator.transport.encoding import FrameSplitter, append_frame
from stator.transport.server_connection import ServerConnection
from stator.transport.settings import Identity, TransportSettings

IDENTITY = Identity("stator", InstanceId("server-1"), "test", "token")
NONCE = bytes(control.NONCE_BYTES)
LIMIT = 1 << 20


class MemoryTransport(asyncio.Transport):
    """Keeps what is written. Closing tells the protocol at the next turn of the loop, as a socket's does."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_closed = False
        self.protocol: asyncio.Protocol | None = None

    def attach(self, protocol: asyncio.Protocol) -> None:
        self.protocol = protocol
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        assert not self.is_closed, "written to after close"
        self.written += data

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            assert self.protocol is not None
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def frames(self) -> list[Any]:
        """What was written since the last call, as plain msgpack values."""
        data, self.written = bytes(self.written), bytearray()
        return [msgspec.msgpack.decode(frame) for frame in FrameSplitter(1 << 30).feed(data)]


def frame(message: Any) -> bytes:
    buffer = bytearray()
    append_frame(buffer, message, 1 << 30)
    return bytes(buffer)


def echo(call: Call) -> None:
    call.items([call.request])
    call.end()


def never(call: Call) -> None:
    pass


def raw_server(**settings: Any) -> tuple[ServerConnection, MemoryTransport]:
    dispatcher = Dispatcher(IDENTITY)
    dispatcher.register(Endpoint("echo", int, echo))
    dispatcher.register(Endpoint("never", Any, never))
    connection = ServerConnection(
        dispatcher,
        TransportSettings(**settings),
        TransportStats(),
        token="token",
        new_nonce=lambda: NONCE,
        on_made=lambda _: True,
    )
    transport = MemoryTransport()
    transport.attach(connection)
    return connection, transport


def greeting() -> tuple[bytes, bytes]:
    """A caller's Hello and Proof, for `raw_server`."""
    first = handshake.hello(IDENTITY, Lane.CALLS, NONCE, LIMIT)
    answer = handshake.challenge(IDENTITY, IDENTITY.instance_id, NONCE, LIMIT)
    return frame(first), frame(control.Proof(handshake.proof("token", handshake.CALLER, first, answer)))


def ready_server(**settings: Any) -> tuple[ServerConnection, MemoryTransport]:
    connection, transport = raw_server(**settings)
    for part in greeting():
        connection.data_received(part)
    connection.flush()
    assert connection.ready
    transport.frames()
    return connection, transport


def ready_client(**settings: Any) -> tuple[ClientConnection, MemoryTransport]:
    connection = ClientConnection(
        IDENTITY,
        Lane.CALLS,
        TransportSettings(**settings),
        TransportStats(),
        nonce=NONCE,
        address="memory",
        on_unusable=lambda _: None,
    )
    transport = MemoryTransport()
    transport.attach(connection)
    first = handshake.hello(IDENTITY, Lane.CALLS, NONCE, connection.limit)
    answer = handshake.challenge(IDENTITY, IDENTITY.instance_id, NONCE, LIMIT)
    connection.data_received(frame(answer))
    connection.data_received(frame(control.Welcome(handshake.proof("token", handshake.SERVER, first, answer))))
    connection.flush()
    assert connection.usable
    transport.frames()
    return connection, transport
