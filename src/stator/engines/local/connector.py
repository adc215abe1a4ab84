"""KV blocks between local engines, over the request plane.

Prefill side (`BlockServer`): holds finished prefills and serves them. Decode side (`BlockFetcher`): fetches blocks
into the engine's own. A hold ends when it is released or when it expires; a fetcher releases once it needs the blocks
no more, whatever the reason. Blocks are read and written on the engine's worker thread, between its steps.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stator.engines.base import EngineHost
from stator.engines.local.transfer import (
    FETCH_ENDPOINT,
    RELEASE_ENDPOINT,
    BlockPiece,
    FetchRequest,
    ReleaseRequest,
    TransferParams,
)
from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.runtime.context import CallContext, loop_time
from stator.transport.base import Call, Endpoint, Lane, StreamHandle, Target
from stator.transport.calls import CallTasks

logger = logging.getLogger(__name__)

PIECE_BYTES = 1024 * 1024
"""Largest data of one item, so that a frame stays far below the carriers' limit whatever a block's size."""

EXPORT_BATCH_BYTES = 8 * 1024 * 1024
"""Copied out of the blocks in one turn on the worker thread; a turn waits for a step, so small ones are slow."""

MAX_BUFFERED_BYTES = 16 * 1024 * 1024
"""Fetched bytes that wait for their turn on the worker thread; above it the stream is paused."""

RELEASE_TIMEOUT_S = 5.0

ExportBlocks = Callable[[Sequence[int], int], Awaitable[list[bytes]]]
"""(block ids, byte bound) -> contents of the leading ones, at least one, until the bound is reached."""

ImportBlocks = Callable[[list[tuple[int, bytes]]], Awaitable[None]]
"""Fills blocks, given as (block id, content)."""


@dataclass(slots=True)
class _Hold:
    """num_readers: fetches under way; its blocks are freed only when there is none."""

    expiry: asyncio.TimerHandle
    num_readers: int = 0
    released: bool = False


class BlockServer:
    """blocks_of: block ids of a held prefill, in order. free: called exactly once per hold, at its end."""

    def __init__(
        self,
        *,
        blocks_of: Callable[[TransferId], Sequence[int] | None],
        free: Callable[[TransferId], None],
        export: ExportBlocks,
        hold_s: float,
    ) -> None:
        self._blocks_of = blocks_of
        self._free = free
        self._export = export
        self._hold_s = hold_s
        self._holds: dict[TransferId, _Hold] = {}
        self._calls = CallTasks("kv server")

    def register(self, host: EngineHost) -> None:
        host.register(self._calls.endpoint(FETCH_ENDPOINT, FetchRequest, self._serve))
        host.register(Endpoint(RELEASE_ENDPOINT, ReleaseRequest, self._handle_release))

    def hold(self, transfer_id: TransferId) -> None:
        """The prefill is finished: serve its blocks for hold_s, or until release."""
        self._holds[transfer_id] = _Hold(self._expire_later(transfer_id))

    def release(self, transfer_id: TransferId) -> None:
        """Idempotent. Fetches under way fail; the blocks are freed when the last of them has ended."""
        hold = self._holds.pop(transfer_id, None)
        if hold is None:
            return
        hold.expiry.cancel()
        hold.released = True
        if not hold.num_readers:
            self._free(transfer_id)

    async def close(self) -> None:
        for transfer_id in list(self._holds):
            self.release(transfer_id)
        await self._calls.close()

    def _expire_later(self, transfer_id: TransferId) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._hold_s, self._expire, transfer_id)

    def _expire(self, transfer_id: TransferId) -> None:
        hold = self._holds[transfer_id]
        if hold.num_readers:
            # A fetch has a deadline of its own, so this ends.
            hold.expiry = self._expire_later(transfer_id)
            return
        logger.warning("nobody fetched the KV blocks of %s within %.0f s; freed", transfer_id, self._hold_s)
        self.release(transfer_id)

    def _handle_release(self, call: Call) -> None:
        self.release(call.request.transfer_id)
        call.end(None)

    async def _serve(self, request: FetchRequest, context: CallContext) -> AsyncIterator[BlockPiece]:
        hold = self._holds.get(request.transfer_id)
        block_ids = self._blocks_of(request.transfer_id)
        if hold is None or block_ids is None:
            raise _failed(f"no KV blocks are held as {request.transfer_id}: released, expired, or never made")
        first, stop = request.first_block, request.first_block + request.num_blocks
        if not 0 <= first <= stop <= len(block_ids):
            raise _failed(f"blocks {first} to {stop} of {request.transfer_id} were asked for; it has {len(block_ids)}")
        hold.num_readers += 1
        try:
            while first < stop:
                for content in await self._export(block_ids[first:stop], EXPORT_BATCH_BYTES):
                    for offset in range(0, len(content), PIECE_BYTES):
                        if hold.released:
                            raise _failed(f"{request.transfer_id} was released while its blocks were fetched")
                        yield BlockPiece(first, offset, len(content), content[offset : offset + PIECE_BYTES])
                    first += 1
        finally:
            hold.num_readers -= 1
            if hold.released and not hold.num_readers:
                self._free(request.transfer_id)


def _failed(message: str) -> StatorError:
    return StatorError(ErrorCode.TRANSFER_FAILED, message)


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
    """timeout_s: for a whole fetch."""

    def __init__(self, host: EngineHost, import_blocks: ImportBlocks, *, timeout_s: float) -> None:
        self._host = host
        self._import = import_blocks
        self._timeout_s = timeout_s

    async def fetch(self, params: TransferParams, request_id: RequestId, indexes: range, block_ids: list[int]) -> None:
        """Fill block_ids[i] with block indexes[i] of the transfer. When it returns, all are filled.

        Raises StatorError: the peer's, the connection's, DEADLINE after timeout_s, or TRANSFER_FAILED for a stream
        that is not what was asked for. Cancelling it cancels the stream.
        """
        sink = _FetchSink()
        target = Target(params.addresses, FETCH_ENDPOINT, params.instance_id, Lane.BULK)
        context = CallContext(request_id, loop_time() + self._timeout_s)
        asked = FetchRequest(params.transfer_id, indexes.start, len(indexes))
        sink.handle = self._host.client.open(target, asked, sink, context=context, item_type=BlockPiece)
        try:
            await self._receive(sink, dict(zip(indexes, block_ids, strict=True)))
        finally:
            if not sink.ended:
                sink.handle.cancel()

    def release(self, params: TransferParams, request_id: RequestId) -> None:
        """Tell the prefill engine that nobody needs the blocks any more. Best effort: the hold expires anyway."""
        target = Target(params.addresses, RELEASE_ENDPOINT, params.instance_id)
        context = CallContext(request_id, loop_time() + RELEASE_TIMEOUT_S)
        self._host.client.open(target, ReleaseRequest(params.transfer_id), _IgnoreAnswer(), context=context)

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
