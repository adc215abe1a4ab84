"""The decode side: fetches a held prefill's KV blocks into the engine's own."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from stator.engines.transfer.messages import (
    FETCH_ENDPOINT,
    RELEASE_ENDPOINT,
    BlockPiece,
    FetchRequest,
    ReleaseRequest,
)
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, RequestId, TransferId
from stator.runtime.context import CallContext, loop_time
from stator.transport.base import Lane, StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)

MAX_BUFFERED_BYTES = 16 * 1024 * 1024
"""Fetched bytes that wait for their turn on the worker thread; above it the stream is paused."""

RELEASE_TIMEOUT_S = 5.0

ImportBlocks = Callable[[list[tuple[int, bytes]]], Awaitable[None]]
"""Fills blocks, given as (block id, content). Raises ValueError for contents that do not fit."""


class HeldBlocks(Protocol):
    """Where a finished prefill's blocks are."""

    @property
    def transfer_id(self) -> TransferId: ...

    @property
    def instance_id(self) -> InstanceId: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...


class _FetchSink:
    """Collects pieces until their reader takes them."""

    def __init__(self) -> None:
        self.handle: StreamHandle | None = None
        self.error: StatorError | None = None
        self.ended = False
        self._pieces: deque[BlockPiece] = deque()
        self._num_bytes = 0
        self._changed = asyncio.Event()

    def items(self, items: Sequence[Any], /) -> None:
        self._pieces.extend(items)
        self._num_bytes += sum(len(piece.data) for piece in items)
        if self._num_bytes > MAX_BUFFERED_BYTES and self.handle is not None:
            self.handle.pause()
        self._changed.set()

    def end(self, error: StatorError | None = None, /) -> None:
        self.error = error
        self.ended = True
        self._changed.set()

    async def take(self) -> list[BlockPiece]:
        """Everything that has arrived, at least one piece; empty at the normal end. Raises the stream's error."""
        while not self._pieces:
            if self.error is not None:
                raise self.error
            if self.ended:
                return []
            self._changed.clear()
            await self._changed.wait()
        pieces = list(self._pieces)
        self._pieces.clear()
        self._num_bytes = 0
        if self.handle is not None:
            self.handle.resume()
        return pieces


class _IgnoreAnswer:
    def items(self, items: Sequence[Any], /) -> None:
        return

    def end(self, error: StatorError | None = None, /) -> None:
        if error is not None:
            logger.debug("releasing KV blocks: %r; they expire", error)


class BlockFetcher:
    """timeout_s: for a whole fetch. layout: see FetchRequest."""

    def __init__(
        self, client: TransportClient, import_blocks: ImportBlocks, *, timeout_s: float, layout: str = ""
    ) -> None:
        self._client = client
        self._import = import_blocks
        self._timeout_s = timeout_s
        self._layout = layout

    async def fetch(self, held: HeldBlocks, request_id: RequestId, indexes: range, block_ids: list[int]) -> None:
        """Fill block_ids[i] with block indexes[i] of the transfer. When it returns, all are filled.

        Raises StatorError: the peer's, the connection's, DEADLINE after timeout_s, or TRANSFER_FAILED for a stream
        that is not what was asked for. Cancelling it cancels the stream.
        """
        sink = _FetchSink()
        target = Target(held.addresses, FETCH_ENDPOINT, held.instance_id, Lane.BULK)
        context = CallContext(request_id, loop_time() + self._timeout_s)
        asked = FetchRequest(held.transfer_id, indexes.start, len(indexes), self._layout)
        sink.handle = self._client.open(target, asked, sink, context=context, item_type=BlockPiece)
        try:
            await self._receive(sink, dict(zip(indexes, block_ids, strict=True)))
        finally:
            if not sink.ended:
                sink.handle.cancel()

    def release(self, held: HeldBlocks, request_id: RequestId) -> None:
        """Tell the prefill engine that nobody needs the blocks any more. Best effort: the hold expires anyway."""
        target = Target(held.addresses, RELEASE_ENDPOINT, held.instance_id)
        context = CallContext(request_id, loop_time() + RELEASE_TIMEOUT_S)
        self._client.open(target, ReleaseRequest(held.transfer_id), _IgnoreAnswer(), context=context)

    async def _receive(self, sink: _FetchSink, missing: dict[int, int]) -> None:
        assembly = _Assembly(missing)
        while pieces := await sink.take():
            if complete := assembly.add(pieces):
                try:
                    await self._import(complete)
                except ValueError as error:
                    raise _failed(f"the peer's KV blocks do not fit: {error}") from error
        if assembly.missing:
            raise _failed(f"{len(assembly.missing)} KV blocks did not come")


class _Assembly:
    """Joins pieces to blocks. missing: block index -> block id, of the blocks that have not been completed."""

    def __init__(self, missing: dict[int, int]) -> None:
        self.missing = missing
        self._partial: dict[int, bytearray] = {}

    def add(self, pieces: Sequence[BlockPiece]) -> list[tuple[int, bytes]]:
        """Returns what is complete now as (block id, content). Raises StatorError(TRANSFER_FAILED) for a bad piece."""
        complete: list[tuple[int, bytes]] = []
        for piece in pieces:
            content = self._partial.setdefault(piece.block_index, bytearray())
            if piece.block_index not in self.missing or piece.offset != len(content):
                raise _failed("KV block pieces came out of order or were not asked for")
            content += piece.data
            if len(content) >= piece.num_bytes:
                del self._partial[piece.block_index]
                complete.append((self.missing.pop(piece.block_index), bytes(content)))
        return complete


def _failed(message: str) -> StatorError:
    return StatorError(ErrorCode.TRANSFER_FAILED, message)
