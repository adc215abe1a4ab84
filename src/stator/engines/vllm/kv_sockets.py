"""The two kinds of ZeroMQ socket that a KV event feed needs, behind a Protocol, so that a feed can be tried without.

pyzmq is no dependency of ours: vLLM brings it.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from stator.errors import ConfigError

QUEUED_BATCHES = 10_000
"""Received and not yet read; as many as vLLM keeps for a replay, which gives again what was dropped beyond that."""

QUEUED_ANSWERS = 20_000


class FrameSocket(Protocol):
    """Messages of several frames. One task receives at a time. After a receive was cancelled, only close it."""

    async def send(self, frames: Sequence[bytes]) -> None: ...

    async def recv(self) -> list[bytes]: ...

    def close(self) -> None:
        """What was not sent is dropped. Idempotent."""
        ...


class KvSockets(Protocol):
    def subscribe(self, address: str) -> FrameSocket:
        """Receives what is published at `address` from about now on, also if nobody publishes there yet."""
        ...

    def ask(self, address: str) -> FrameSocket:
        """A conversation of its own with who answers at `address`; answers to other sockets do not come here."""
        ...

    def close(self) -> None:
        """Closes every socket made here. Idempotent."""
        ...


class ZmqSockets:
    """KvSockets on pyzmq and the running event loop."""

    def __init__(self) -> None:
        """Raises ConfigError if pyzmq is not installed."""
        try:
            self._zmq: Any = importlib.import_module("zmq")
            asyncio_zmq: Any = importlib.import_module("zmq.asyncio")
        except ImportError as error:
            raise ConfigError(
                f"KV events of vLLM need pyzmq, which cannot be imported ({error}); it comes with vLLM: "
                "pip install 'stator[vllm]'"
            ) from None
        self._context: Any = asyncio_zmq.Context()

    def subscribe(self, address: str) -> FrameSocket:
        socket = self._socket(self._zmq.SUB, QUEUED_BATCHES)
        socket.subscribe(b"")
        socket.connect(address)
        return _ZmqSocket(socket)

    def ask(self, address: str) -> FrameSocket:
        socket = self._socket(self._zmq.DEALER, QUEUED_ANSWERS)
        socket.connect(address)
        return _ZmqSocket(socket)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _socket(self, kind: int, max_queued: int) -> Any:
        socket = self._context.socket(kind)
        socket.setsockopt(self._zmq.RCVHWM, max_queued)
        socket.setsockopt(self._zmq.LINGER, 0)
        return socket


class _ZmqSocket:
    def __init__(self, socket: Any) -> None:
        self._socket = socket

    async def send(self, frames: Sequence[bytes]) -> None:
        await self._socket.send_multipart(list(frames))

    async def recv(self) -> list[bytes]:
        return await self._socket.recv_multipart()

    def close(self) -> None:
        self._socket.close(linger=0)
