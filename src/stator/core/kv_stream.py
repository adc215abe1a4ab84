"""Both ends of a worker's KV event stream, without the stream: what to send, and what to make of what comes.

`KvSource` (worker): knows the blocks that the engine holds and numbers their changes. `KvBacklog`: what one subscriber
still has to be sent, bounded. `KvView` (router): one worker's blocks in a PrefixIndex, as its stream tells. Rules of
the view, whose items are described in messages.kv_events:

- *waiting*: no stream, or one that is of no use any more. Everything is ignored until `open`.
- *loading*: the snapshot's chunks fill a hidden holder. Its last one, if count and XOR agree, is swapped in whole.
- *live*: changes are applied in the order of their numbers; a digest must agree with what was applied.

In any of them the last whole view goes on answering; it is `trusted` in *live* only. An item that was had before is
dropped. An item out of its turn, one of a newer epoch, one that cannot be read and a digest that differs all mean the
same: this stream is of no use, subscribe again. Items of an older epoch are ignored.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from operator import xor
from typing import Generic, TypeVar

from stator.core.prefix_index import Holder, PrefixIndex
from stator.messages.engine import BlocksRemoved, BlocksStored, KvEvent
from stator.messages.kv_events import (
    BYTES_PER_HASH,
    KvChange,
    KvChangeKind,
    KvChanges,
    KvDigest,
    KvItem,
    KvSnapshot,
    PackedHashes,
    pack_hashes,
    unpack_hashes,
)

K = TypeVar("K", bound=Hashable)

CHUNK_HASHES = 4096
"""Hashes of one snapshot item: 32 KiB, and about a millisecond of a router."""

MAX_CHANGE_HASHES = 65_536
"""Hashes of one KvChanges; more are split over several, so that no item nears a frame's limit."""

ITEMS_AT_ONCE = 16

_UNKNOWN = -1
"""Position of a block whose predecessor was not held when it was stored. Leaves no remainder with stride 1 only."""


class KvSource:
    """What a worker's engine holds, for one stride. `apply` its events, then `take_changes` what to send.

    A block's position in its sequence follows from the parents the engine names; one stored without its parent has
    none, and is reported with stride 1 only.
    """

    def __init__(self, epoch: int, *, stride: int = 1) -> None:
        self.epoch = epoch
        self.stride = stride
        self._sequence = 0
        self._num_reported = 0
        self._xor = 0
        self._blocks: dict[int, tuple[int | None, int]] = {}
        self._num_children: dict[int, int] = {}
        self._num_orphans = 0
        self._pending: list[tuple[KvChangeKind, list[int]]] = []

    @property
    def num_blocks(self) -> int:
        """Held by the engine, for any stride."""
        return len(self._blocks)

    @property
    def closed(self) -> bool:
        """For every block held, its predecessor is held too."""
        return self._num_orphans == 0

    def apply(self, events: Sequence[KvEvent]) -> None:
        """Storing what is held and removing what is not change nothing and are not sent."""
        for event in events:
            if isinstance(event, BlocksStored):
                self._store(event)
            elif isinstance(event, BlocksRemoved):
                self._remove(event.block_hashes)
            else:
                self._clear()

    def take_changes(self) -> list[KvChanges]:
        """What changed since the last call; empty if nothing did."""
        pending, self._pending = self._pending, []
        batches: list[list[KvChange]] = []
        room = 0
        for kind, hashes in pending:
            for start in range(0, max(1, len(hashes)), MAX_CHANGE_HASHES):
                part = hashes[start : start + MAX_CHANGE_HASHES]
                if not batches or len(part) > room:
                    batches.append([])
                    room = MAX_CHANGE_HASHES
                batches[-1].append(KvChange(kind, pack_hashes(part)))
                room -= len(part)
        items: list[KvChanges] = []
        for batch in batches:
            self._sequence += 1
            # Between the parts of one change there may be holes.
            closed = self.closed and batch is batches[-1]
            items.append(KvChanges(self.epoch, self._sequence, tuple(batch), closed))
        return items

    def digest(self) -> KvDigest:
        """Of everything taken so far; must not be asked for with changes waiting."""
        assert not self._pending, "take the changes first"
        return KvDigest(self.epoch, self._sequence, self._num_reported, self._xor)

    def snapshot(self) -> Iterator[KvSnapshot]:
        """Chunks of what is held now, made one by one from a copy of eight bytes per block."""
        stride = self.stride
        hashes = [h for h, (_, position) in self._blocks.items() if position % stride == 0]
        return _chunks(self.digest(), pack_hashes(hashes), self.closed)

    def _store(self, event: BlocksStored) -> None:
        blocks = self._blocks
        parent = event.parent_hash
        position = 0 if parent is None else blocks[parent][1] if parent in blocks else _UNKNOWN
        stored: list[int] = []
        for block_hash in event.block_hashes:
            if position != _UNKNOWN:
                position += 1
            if block_hash not in blocks:
                self._adopt(block_hash, parent)
                blocks[block_hash] = (parent, position)
                if position % self.stride == 0:
                    stored.append(block_hash)
            parent = block_hash
        self._change(KvChangeKind.STORED, stored)
        self._num_reported += len(stored)

    def _adopt(self, block_hash: int, parent: int | None) -> None:
        children = self._num_children
        if parent is not None:
            children[parent] = children.get(parent, 0) + 1
            if parent not in self._blocks:
                self._num_orphans += 1
        self._num_orphans -= children.get(block_hash, 0)

    def _remove(self, hashes: Sequence[int]) -> None:
        blocks, children = self._blocks, self._num_children
        removed: list[int] = []
        for block_hash in hashes:
            entry = blocks.pop(block_hash, None)
            if entry is None:
                continue
            parent, position = entry
            self._num_orphans += children.get(block_hash, 0)
            if parent is not None:
                if parent not in blocks:
                    self._num_orphans -= 1
                if children[parent] == 1:
                    del children[parent]
                else:
                    children[parent] -= 1
            if position % self.stride == 0:
                removed.append(block_hash)
        self._change(KvChangeKind.REMOVED, removed)
        self._num_reported -= len(removed)

    def _clear(self) -> None:
        self._blocks.clear()
        self._num_children.clear()
        self._num_orphans = self._num_reported = self._xor = 0
        self._pending = [(KvChangeKind.CLEARED, [])]

    def _change(self, kind: KvChangeKind, hashes: list[int]) -> None:
        if not hashes:
            return
        self._xor = reduce(xor, hashes, self._xor)
        if self._pending and self._pending[-1][0] is kind:
            self._pending[-1][1].extend(hashes)
        else:
            self._pending.append((kind, hashes))


def _chunks(digest: KvDigest, packed: PackedHashes, closed: bool) -> Iterator[KvSnapshot]:
    size = CHUNK_HASHES * BYTES_PER_HASH
    for index in range(max(1, -(-len(packed) // size))):
        end = (index + 1) * size
        part = PackedHashes(packed[index * size : end])
        yield KvSnapshot(digest, index, end >= len(packed), part, closed)


@dataclass(frozen=True, slots=True)
class BacklogLimits:
    """What may wait for one subscriber beside its snapshot."""

    max_items: int = 4096
    max_hashes: int = 1_000_000


class KvBacklog:
    """A snapshot, and what has come up behind it, until the subscriber has room."""

    def __init__(self, snapshot: Iterator[KvSnapshot], limits: BacklogLimits) -> None:
        self._snapshot: Iterator[KvSnapshot] | None = snapshot
        self._limits = limits
        self._items: deque[KvItem] = deque()
        self._num_hashes = 0

    @property
    def num_items(self) -> int:
        """Waiting beside the snapshot."""
        return len(self._items)

    def push(self, item: KvItem) -> bool:
        """False: the subscriber is too far behind and must start again."""
        self._items.append(item)
        self._num_hashes += _num_hashes(item)
        return len(self._items) <= self._limits.max_items and self._num_hashes <= self._limits.max_hashes

    def discard(self) -> None:
        """Nothing more will be taken."""
        self._snapshot = None
        self._items.clear()

    def take(self) -> list[KvItem]:
        """The next few items, in order; empty if all was taken."""
        taken: list[KvItem] = []
        while self._snapshot is not None and len(taken) < ITEMS_AT_ONCE:
            chunk = next(self._snapshot)
            taken.append(chunk)
            if chunk.last:
                self._snapshot = None
        while self._items and len(taken) < ITEMS_AT_ONCE:
            item = self._items.popleft()
            self._num_hashes -= _num_hashes(item)
            taken.append(item)
        return taken


def _num_hashes(item: KvItem) -> int:
    if isinstance(item, KvChanges):
        return sum(len(change.hashes) for change in item.changes) // BYTES_PER_HASH
    return 0


class Received(Enum):
    """PROGRESS: the view is as new as the item. IGNORED: it was had before, or nobody waits for it. USELESS: the stream
    cannot be followed; close it and open another."""

    PROGRESS = 0
    IGNORED = 1
    USELESS = 2


@dataclass(slots=True)
class KvViewStats:
    """Counts over all views that share it. num_events: blocks stored and removed, snapshots included."""

    num_events: int = 0
    num_snapshots: int = 0
    num_gaps: int = 0
    num_duplicates: int = 0
    num_mismatches: int = 0
    num_malformed: int = 0
    num_stale: int = 0


class _Phase(Enum):
    WAITING = 0
    LOADING = 1
    LIVE = 2


class KvView(Generic[K]):
    """One worker's blocks in `index` under `name`, from its first whole snapshot until `close`."""

    def __init__(self, index: PrefixIndex[K], name: K, stats: KvViewStats) -> None:
        self._index = index
        self._name = name
        self._stats = stats
        self._phase = _Phase.WAITING
        self._holder: Holder[K] | None = None
        self._loading: Holder[K] | None = None
        self._snapshot: KvDigest | None = None
        self._next_chunk = 0
        self._epoch = -1
        self._sequence = 0
        self._num_blocks = 0
        self._xor = 0
        self._closed = False

    @property
    def trusted(self) -> bool:
        """It has everything that its worker said, as far as is known."""
        return self._phase is _Phase.LIVE

    @property
    def settled(self) -> bool:
        """A whole snapshot was had: that the index finds nothing means that nothing was held."""
        return self._holder is not None

    def open(self) -> None:
        """A new stream begins."""
        self.lose()
        self._phase = _Phase.LOADING

    def lose(self) -> None:
        """The stream ended. The last whole view stays, untrusted."""
        self._phase = _Phase.WAITING
        self._snapshot = None
        self._next_chunk = self._num_blocks = self._xor = 0
        if self._loading is not None:
            self._index.drop(self._loading)
            self._loading = None

    def close(self) -> None:
        """The worker is gone, and what it held."""
        self.lose()
        if self._holder is not None:
            self._index.drop(self._holder)
            self._holder = None

    def receive(self, item: KvItem) -> Received:
        if self._phase is _Phase.WAITING:
            return Received.IGNORED
        epoch = item.digest.epoch if isinstance(item, KvSnapshot) else item.epoch
        if epoch < self._epoch:
            self._stats.num_stale += 1
            return Received.IGNORED
        try:
            if isinstance(item, KvChanges):
                return self._changes(item)
            if isinstance(item, KvDigest):
                return self._digest(item)
            return self._chunk(item)
        except ValueError:
            self._stats.num_malformed += 1
            return self._useless()

    def _chunk(self, item: KvSnapshot) -> Received:
        if self._snapshot is None and self._phase is _Phase.LOADING and item.index == 0:
            self._snapshot = item.digest
            self._loading = self._index.add(self._name)
        if item.digest != self._snapshot or item.index > self._next_chunk:
            return self._gap()
        if item.index < self._next_chunk:
            return self._duplicate()
        assert self._loading is not None, "a snapshot's chunks have somewhere to go"
        self._next_chunk += 1
        hashes = unpack_hashes(item.hashes)
        self._count(hashes, len(hashes))
        self._index.store(self._loading, hashes)
        return self._swap_in(item) if item.last else Received.PROGRESS

    def _swap_in(self, item: KvSnapshot) -> Received:
        digest = item.digest
        if (self._num_blocks, self._xor) != (digest.num_blocks, digest.xor):
            return self._mismatch()
        assert self._loading is not None, "the chunks were stored there"
        self._set_closed(self._loading, item.closed)
        if self._holder is None:
            self._index.show(self._loading)
        else:
            self._index.replace(self._holder, self._loading)
        self._holder, self._loading = self._loading, None
        self._epoch, self._sequence = digest.epoch, digest.sequence
        self._phase = _Phase.LIVE
        self._stats.num_snapshots += 1
        return Received.PROGRESS

    def _changes(self, item: KvChanges) -> Received:
        if self._phase is not _Phase.LIVE or item.epoch != self._epoch or item.sequence > self._sequence + 1:
            return self._gap()
        if item.sequence <= self._sequence:
            return self._duplicate()
        assert self._holder is not None, "a live view has a holder"
        self._sequence = item.sequence
        for change in item.changes:
            self._change(self._holder, change)
        if item.closed != self._closed:
            self._set_closed(self._holder, item.closed)
        return Received.PROGRESS

    def _set_closed(self, holder: Holder[K], closed: bool) -> None:
        self._closed = closed
        self._index.set_closed(holder, closed)

    def _change(self, holder: Holder[K], change: KvChange) -> None:
        hashes = unpack_hashes(change.hashes)
        if change.kind is KvChangeKind.STORED:
            self._count(hashes, len(hashes))
            self._index.store(holder, hashes)
        elif change.kind is KvChangeKind.REMOVED:
            self._count(hashes, -len(hashes))
            self._index.remove(holder, hashes)
        else:
            self._num_blocks = self._xor = 0
            self._index.clear(holder)

    def _count(self, hashes: list[int], num_blocks: int) -> None:
        self._stats.num_events += len(hashes)
        self._num_blocks += num_blocks
        self._xor = reduce(xor, hashes, self._xor)

    def _digest(self, item: KvDigest) -> Received:
        if self._phase is not _Phase.LIVE or item.epoch != self._epoch or item.sequence > self._sequence:
            return self._gap()
        if item.sequence < self._sequence:
            return self._duplicate()
        if (item.num_blocks, item.xor) != (self._num_blocks, self._xor):
            return self._mismatch()
        return Received.PROGRESS

    def _duplicate(self) -> Received:
        self._stats.num_duplicates += 1
        return Received.IGNORED

    def _gap(self) -> Received:
        self._stats.num_gaps += 1
        return self._useless()

    def _mismatch(self) -> Received:
        self._stats.num_mismatches += 1
        return self._useless()

    def _useless(self) -> Received:
        self.lose()
        return Received.USELESS
