"""The prefill side: holds finished prefills and serves their KV blocks.

A hold ends when it is released or when it expires; a fetcher releases once it needs the blocks no more, whatever the
reason. A transfer may be announced before its prefill is finished: then a fetch of it waits, and a release of it is
remembered, so that neither can come too early.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stator.engines.transfer.messages import (
    FETCH_ENDPOINT,
    RELEASE_ENDPOINT,
    BlockPiece,
    FetchRequest,
    ReleaseRequest,
)
from stator.errors import ErrorCode, StatorError
from stator.ids import TransferId
from stator.runtime.context import CallContext
from stator.transport.base import Call, Endpoint
from stator.transport.calls import CallTasks

logger = logging.getLogger(__name__)

PIECE_BYTES = 1024 * 1024
"""Largest data of one item, so that a frame stays far below the carriers' limit whatever a block's size."""

EXPORT_BATCH_BYTES = 8 * 1024 * 1024
"""Copied out of the blocks in one turn on the worker thread; a turn waits for a step, so small ones are slow."""

ExportBlocks = Callable[[Sequence[int], int], Awaitable[list[bytes]]]
"""(block ids, byte bound) -> contents of the leading ones, at least one, until the bound is reached."""


class Registrar(Protocol):
    """Where endpoints are registered: an engine's host, or a request plane server."""

    def register(self, endpoint: Endpoint, /) -> None: ...


@dataclass(slots=True)
class _Hold:
    """num_readers: fetches under way; its blocks are freed only when there is none."""

    expiry: asyncio.TimerHandle
    num_readers: int = 0
    released: bool = False


@dataclass(slots=True)
class _Announced:
    """A prefill that is not finished. decided: it is held, or it will not be. released: nobody wants it any more."""

    decided: asyncio.Event = field(default_factory=asyncio.Event)
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
        layout: str = "",
    ) -> None:
        """layout: see FetchRequest."""
        self._blocks_of = blocks_of
        self._free_blocks = free
        self._num_held = 0
        self._none_held = asyncio.Event()
        self._none_held.set()
        self._export = export
        self._hold_s = hold_s
        self._layout = layout
        self._holds: dict[TransferId, _Hold] = {}
        self._announced: dict[TransferId, _Announced] = {}
        self._calls = CallTasks("kv server")

    def register(self, host: Registrar) -> None:
        host.register(self._calls.endpoint(FETCH_ENDPOINT, FetchRequest, self._serve))
        host.register(Endpoint(RELEASE_ENDPOINT, ReleaseRequest, self._handle_release))

    def announce(self, transfer_id: TransferId) -> None:
        """Its prefill has begun; `hold` or `withdraw` follows. Idempotent until then."""
        self._announced.setdefault(transfer_id, _Announced())

    def withdraw(self, transfer_id: TransferId) -> None:
        """The announced prefill ended without blocks to hold: fetches of it fail."""
        announced = self._announced.pop(transfer_id, None)
        if announced is not None:
            announced.decided.set()

    def hold(self, transfer_id: TransferId) -> None:
        """The prefill is finished: serve its blocks for hold_s, or until release."""
        self._holds[transfer_id] = _Hold(self._expire_later(transfer_id))
        self._num_held += 1
        self._none_held.clear()
        announced = self._announced.pop(transfer_id, None)
        if announced is not None:
            announced.decided.set()
            if announced.released:
                self.release(transfer_id)

    def release(self, transfer_id: TransferId) -> None:
        """Idempotent. Fetches under way fail; the blocks are freed when the last of them has ended."""
        if (announced := self._announced.get(transfer_id)) is not None:
            announced.released = True
            return
        hold = self._holds.pop(transfer_id, None)
        if hold is None:
            return
        hold.expiry.cancel()
        hold.released = True
        if not hold.num_readers:
            self._free(transfer_id)

    async def holds_ended(self) -> None:
        """Returns once no blocks are held."""
        await self._none_held.wait()

    async def close(self) -> None:
        for transfer_id in list(self._announced):
            self.withdraw(transfer_id)
        for transfer_id in list(self._holds):
            self.release(transfer_id)
        await self._calls.close()

    def _free(self, transfer_id: TransferId) -> None:
        self._free_blocks(transfer_id)
        self._num_held -= 1
        if not self._num_held:
            self._none_held.set()

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
        if request.layout != self._layout:
            raise _failed(f"the KV blocks of {request.transfer_id} are laid out otherwise than the decode engine's")
        if (announced := self._announced.get(request.transfer_id)) is not None:
            # The call has a deadline, so this ends.
            await announced.decided.wait()
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
