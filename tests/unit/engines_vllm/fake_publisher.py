"""What vLLM's KV event publisher does on its sockets, in memory: numbers, buffer, replay, and what gets lost."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from stator.engines.vllm.kv_sockets import FrameSocket

END = (-1).to_bytes(8, "big", signed=True)


def number_frame(number: int) -> bytes:
    return number.to_bytes(8, "big")


class FakeSocket:
    def __init__(self, publisher: "FakePublisher | None" = None) -> None:
        self.received: asyncio.Queue[list[bytes]] = asyncio.Queue(100_000)
        self.closed = False
        self._publisher = publisher

    async def send(self, frames: Sequence[bytes]) -> None:
        assert self._publisher is not None and not self.closed
        self._publisher.asked(self, list(frames))

    async def recv(self) -> list[bytes]:
        assert not self.closed
        return await self.received.get()

    def close(self) -> None:
        self.closed = True


class FakePublisher:
    """One rank. silent: it answers no replay. max_answers: batches of an answer that reach the asker, as with a full
    queue; the end does then not reach it either. not_replayed: numbers that never do."""

    def __init__(self, buffer_steps: int = 10_000) -> None:
        self.silent = False
        self.max_answers = 1 << 30
        self.not_replayed: set[int] = set()
        self.asked_from: list[int] = []
        self.subscribers: list[FakeSocket] = []
        self._buffer_steps = buffer_steps
        self.restart()

    def restart(self) -> None:
        """Another engine publishes at the same address."""
        self._next = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=self._buffer_steps)

    def publish(self, *events: Any, lost: bool = False) -> None:
        """One batch. lost: subscribers do not get it, a replay does."""
        self.publish_payload(msgspec.msgpack.encode([float(self._next), list(events), 0]), lost=lost)

    def publish_payload(self, payload: bytes, *, lost: bool = False) -> None:
        self._buffer.append((self._next, payload))
        for socket in self.subscribers if not lost else []:
            socket.received.put_nowait([b"", number_frame(self._next), payload])
        self._next += 1

    def asked(self, socket: FakeSocket, frames: list[bytes]) -> None:
        empty, first = frames
        assert empty == b""
        self.asked_from.append(int.from_bytes(first, "big"))
        if self.silent:
            return
        answer = [
            [b"", b"", number_frame(n), payload]
            for n, payload in self._buffer
            if n >= self.asked_from[-1] and n not in self.not_replayed
        ]
        answer.append([b"", b"", END, b""])
        for message in answer[: self.max_answers]:
            socket.received.put_nowait(message)


class FakeSockets:
    """KvSockets on publishers by address."""

    def __init__(self, publishers: dict[str, FakePublisher]) -> None:
        self._publishers = publishers
        self._made: list[FakeSocket] = []
        self.num_closed = 0

    @property
    def num_open(self) -> int:
        return sum(1 for socket in self._made if not socket.closed)

    def subscribe(self, address: str) -> FrameSocket:
        socket = FakeSocket()
        self._publishers[address].subscribers.append(socket)
        self._made.append(socket)
        return socket

    def ask(self, address: str) -> FrameSocket:
        socket = FakeSocket(self._publishers[address])
        self._made.append(socket)
        return socket

    def close(self) -> None:
        self.num_closed += 1
        for socket in self._made:
            socket.close()
