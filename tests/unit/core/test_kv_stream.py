from collections.abc import Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.core import kv_stream
from stator.core.kv_stream import BacklogLimits, KvBacklog, KvSource, KvView, KvViewStats, Received
from stator.core.prefix_index import PrefixIndex
from stator.messages.engine import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from stator.messages.kv_events import (
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

CHAINS = [[100 * chain + block for block in range(12)] for chain in range(1, 4)]
CHAINS += [CHAINS[0][:5] + [900 + block for block in range(6)]]
EPOCH = 7


class Router:
    """An index with one view, and what it makes of items."""

    def __init__(self, stride: int = 1) -> None:
        self.index: PrefixIndex[str] = PrefixIndex(stride=stride)
        self.stats = KvViewStats()
        self.view = KvView(self.index, "worker", self.stats)

    def subscribe(self, source: KvSource) -> None:
        self.view.open()
        assert {self.view.receive(chunk) for chunk in source.snapshot()} == {Received.PROGRESS}

    def receive(self, items: Sequence[KvItem]) -> list[Received]:
        return [self.view.receive(item) for item in items]

    def held(self, universe: set[int]) -> set[int]:
        holder = self.view._holder
        return set() if holder is None else {h for h in universe if self.index.holds(holder, h)}


def stored(hashes: list[int], parent: int | None = None) -> BlocksStored:
    return BlocksStored(hashes, parent)


def changes(sequence: int, *stored_hashes: int, epoch: int = EPOCH) -> KvChanges:
    return KvChanges(epoch, sequence, (KvChange(KvChangeKind.STORED, pack_hashes(stored_hashes)),), True)


def live() -> tuple[KvSource, Router]:
    """A view of [1, 2, 3] that has had change number 1."""
    source, router = KvSource(EPOCH), Router()
    source.apply([stored([1, 2, 3])])
    source.take_changes()
    router.subscribe(source)
    return source, router


def test_hashes_are_packed_little_endian() -> None:
    hashes = [0, 1, 2**64 - 1, 0x0102030405060708]
    packed = pack_hashes(hashes)
    assert packed[8:16] == b"\x01" + bytes(7)
    assert packed[24:] == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert unpack_hashes(packed) == hashes
    with pytest.raises(ValueError):
        unpack_hashes(packed[:-1])


def test_items_keep_their_type_on_the_wire() -> None:
    digest = KvDigest(1, 2, 3, 2**64 - 1)
    cleared = KvChange(KvChangeKind.CLEARED)
    items: list[KvItem] = [digest, KvSnapshot(digest, 0, True, pack_hashes([1]), False)]
    items.append(KvChanges(1, 3, (cleared, KvChange(KvChangeKind.STORED, pack_hashes([5]))), True))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(items), type=list[KvItem]) == items


# The source.


def test_changes_are_numbered_and_merged() -> None:
    source = KvSource(EPOCH)
    source.apply([stored([1, 2]), stored([3], 2), BlocksRemoved([3]), BlocksRemoved([2])])
    source.apply([])
    (item,) = source.take_changes()
    assert (item.epoch, item.sequence, item.closed) == (EPOCH, 1, True)
    assert [(c.kind, unpack_hashes(c.hashes)) for c in item.changes] == [
        (KvChangeKind.STORED, [1, 2, 3]),
        (KvChangeKind.REMOVED, [3, 2]),
    ]
    assert source.take_changes() == []
    assert source.digest() == KvDigest(EPOCH, 1, 1, 1)


def test_what_changes_nothing_is_not_sent() -> None:
    source = KvSource(EPOCH)
    source.apply([stored([1, 2])])
    source.take_changes()
    source.apply([stored([1, 2]), BlocksRemoved([9])])
    assert source.take_changes() == []


def test_clearing_makes_what_was_waiting_pointless() -> None:
    source = KvSource(EPOCH)
    source.apply([stored([1, 2]), BlocksCleared(), stored([5])])
    (item,) = source.take_changes()
    assert [c.kind for c in item.changes] == [KvChangeKind.CLEARED, KvChangeKind.STORED]
    assert source.digest() == KvDigest(EPOCH, 1, 1, 5)


def test_holes_are_seen() -> None:
    source = KvSource(EPOCH)
    source.apply([stored([1, 2, 3, 4])])
    assert source.closed
    source.apply([BlocksRemoved([2])])
    assert not source.closed
    source.apply([stored([2], 1)])
    assert source.closed
    source.apply([BlocksRemoved([3]), BlocksRemoved([4])])
    assert source.closed
    source.apply([stored([8], 77)])
    assert not source.closed
    source.apply([BlocksCleared()])
    assert source.closed


def test_large_changes_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_stream, "MAX_CHANGE_HASHES", 10)
    monkeypatch.setattr(kv_stream, "CHUNK_HASHES", 7)
    source, router = KvSource(EPOCH), Router()
    router.subscribe(source)
    source.apply([stored(list(range(1, 26))), BlocksRemoved([25, 24]), stored([50])])
    items = source.take_changes()
    assert [item.sequence for item in items] == [1, 2, 3]
    assert [item.closed for item in items] == [False, False, True]
    assert all(sum(len(c.hashes) for c in item.changes) <= 80 for item in items)
    router.receive([*items, source.digest()])
    assert router.view.trusted
    assert router.index.overlaps(list(range(1, 26))) == {"worker": 23}
    chunks = list(source.snapshot())
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.last for chunk in chunks] == [False, False, False, True]


@pytest.mark.parametrize("num_hashes", [0, 7, 8])
def test_a_snapshot_has_a_last_chunk(num_hashes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_stream, "CHUNK_HASHES", 7)
    source = KvSource(EPOCH)
    source.apply([stored(list(range(1, num_hashes + 1)))])
    source.take_changes()
    router = Router()
    router.subscribe(source)
    assert router.view.trusted
    assert router.index.num_entries == num_hashes


def test_stride_follows_the_position_in_the_sequence() -> None:
    source = KvSource(EPOCH, stride=3)
    source.apply([stored([1, 2]), stored([3, 4, 5, 6], 2), stored([13, 14, 15], 2)])
    (item,) = source.take_changes()
    assert unpack_hashes(item.changes[0].hashes) == [3, 6, 13]
    assert source.num_blocks == 9
    # Its predecessor is not known, so neither is its position.
    source.apply([stored([77, 78, 79], 99), BlocksRemoved([6])])
    (item,) = source.take_changes()
    assert [(c.kind, unpack_hashes(c.hashes)) for c in item.changes] == [(KvChangeKind.REMOVED, [6])]
    router = Router(stride=3)
    router.subscribe(source)
    assert router.index.overlaps([1, 2, 3, 4, 5, 6, 7]) == {"worker": 3}
    assert router.index.overlaps([1, 2, 13, 14, 15]) == {"worker": 3}


# The backlog.


def test_changes_queue_behind_the_snapshot() -> None:
    source = KvSource(EPOCH)
    backlog = KvBacklog(source.snapshot(), BacklogLimits())
    assert backlog.push(changes(1, 5))
    first, second = backlog.take()
    assert isinstance(first, KvSnapshot)
    assert second == changes(1, 5)
    assert backlog.take() == []


def test_a_backlog_has_a_bound() -> None:
    backlog = KvBacklog(KvSource(EPOCH).snapshot(), BacklogLimits(max_items=2, max_hashes=5))
    assert backlog.push(changes(1, 1, 2))
    assert backlog.push(changes(2, 3))
    assert not backlog.push(KvDigest(EPOCH, 2, 3, 0))
    backlog.discard()
    assert backlog.take() == []
    backlog = KvBacklog(KvSource(EPOCH).snapshot(), BacklogLimits(max_items=10, max_hashes=5))
    assert backlog.push(changes(1, 1, 2, 3))
    assert not backlog.push(changes(2, 4, 5, 6))


def test_taking_makes_room() -> None:
    backlog = KvBacklog(KvSource(EPOCH).snapshot(), BacklogLimits(max_items=3, max_hashes=5))
    for sequence in range(1, 20):
        assert backlog.push(changes(sequence, 1, 2, 3))
        assert len(backlog.take()) == (2 if sequence == 1 else 1)


# The view.


def test_a_snapshot_is_swapped_in_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_stream, "CHUNK_HASHES", 2)
    source, router = live()
    assert router.view.settled
    source.apply([BlocksCleared(), stored([7, 8, 9])])
    source.take_changes()
    router.view.open()
    first, last = source.snapshot()
    router.view.receive(first)
    assert not router.view.trusted
    assert router.view.settled
    assert router.index.overlaps([1, 2, 3]) == {"worker": 3}
    assert router.index.overlaps([7, 8, 9]) == {}
    router.view.receive(last)
    assert router.view.trusted
    assert router.index.overlaps([1, 2, 3]) == {}
    assert router.index.overlaps([7, 8, 9]) == {"worker": 3}


def test_before_the_first_snapshot_nothing_is_settled() -> None:
    router = Router()
    router.view.open()
    assert not router.view.settled
    assert not router.view.trusted


def test_duplicates_are_dropped() -> None:
    source, router = live()
    chunks: list[KvItem] = list(source.snapshot())
    first = changes(2, 4)
    assert router.receive([first, first, changes(3, 5), first, *chunks[1:]]) == [
        Received.PROGRESS,
        Received.IGNORED,
        Received.PROGRESS,
        Received.IGNORED,
    ]
    assert router.stats.num_duplicates == 2
    assert router.index.overlaps([1, 2, 3, 4, 5]) == {"worker": 5}


@pytest.mark.parametrize(
    "item",
    [changes(3, 4), KvDigest(EPOCH, 2, 3, 0), changes(2, 4, epoch=EPOCH + 1), KvDigest(EPOCH + 1, 0, 3, 0)],
)
def test_a_gap_keeps_the_old_view_untrusted(item: KvItem) -> None:
    source, router = live()
    assert router.view.receive(item) is Received.USELESS
    assert router.stats.num_gaps == 1
    assert not router.view.trusted
    assert router.view.settled
    assert router.index.overlaps([1, 2, 3]) == {"worker": 3}
    assert router.view.receive(changes(1, 4)) is Received.IGNORED
    router.subscribe(source)
    assert router.view.trusted


def test_items_of_an_older_epoch_are_ignored() -> None:
    _, router = live()
    results = router.receive([changes(1, 4, epoch=EPOCH - 1), KvDigest(EPOCH - 1, 9, 9, 9)])
    assert results == [Received.IGNORED] * 2
    assert router.stats.num_stale == 2
    assert router.view.trusted
    older = KvSource(EPOCH - 1)
    router.view.open()
    assert router.receive(list(older.snapshot())) == [Received.IGNORED]
    assert not router.view.trusted


def test_items_before_the_snapshot_is_whole_are_out_of_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_stream, "CHUNK_HASHES", 1)
    source, router = live()
    chunks = list(source.snapshot())
    for items in ([changes(1, 4)], [chunks[0], source.digest()], [chunks[1]], [chunks[0], chunks[2]]):
        router.view.open()
        assert router.receive(items)[-1] is Received.USELESS
    router.view.open()
    assert router.receive([chunks[0], chunks[0], chunks[1], chunks[0], chunks[2]])[-1] is Received.PROGRESS
    assert router.view.trusted
    while router.index.clean():
        pass
    assert router.index.num_holders == 1
    assert router.index.num_entries == 3


def test_a_silent_difference_is_found_by_the_digest() -> None:
    source, router = live()
    source.apply([stored([4], 3)])
    source.take_changes()
    router.view.receive(changes(2, 5))
    assert router.view.trusted
    assert router.view.receive(source.digest()) is Received.USELESS
    assert router.stats.num_mismatches == 1
    router.subscribe(source)
    assert router.view.receive(source.digest()) is Received.PROGRESS


def test_a_snapshot_that_does_not_add_up_is_not_swapped_in() -> None:
    source, router = live()
    (chunk,) = source.snapshot()
    router.view.open()
    broken = msgspec.structs.replace(chunk, hashes=pack_hashes([1, 2, 9]))
    assert router.view.receive(broken) is Received.USELESS
    assert router.stats.num_mismatches == 1
    assert router.index.overlaps([1, 2, 3]) == {"worker": 3}


def test_what_cannot_be_read_ends_the_stream() -> None:
    _, router = live()
    item = KvChanges(EPOCH, 2, (KvChange(KvChangeKind.STORED, PackedHashes(b"123")),), True)
    assert router.view.receive(item) is Received.USELESS
    assert router.stats.num_malformed == 1


def test_a_lost_connection_keeps_the_view_until_the_worker_is_gone() -> None:
    _, router = live()
    router.view.lose()
    assert (router.view.trusted, router.view.settled) == (False, True)
    assert router.index.overlaps([1, 2]) == {"worker": 2}
    router.view.close()
    assert not router.view.settled
    assert router.index.overlaps([1, 2]) == {}
    while router.index.clean():
        pass
    assert router.index.num_entries == 0


# Both ends.


def events_for(rng: Random) -> list[KvEvent]:
    """Any events, tidy or not: holes, unknown parents, blocks stored twice."""
    events: list[KvEvent] = []
    for _ in range(rng.randint(0, 4)):
        chain = rng.choice(CHAINS)
        start = rng.choice([0, 0, rng.randrange(len(chain))])
        end = rng.randint(start, len(chain))
        kind = rng.random()
        if kind < 0.6:
            events.append(BlocksStored(chain[start:end], chain[start - 1] if start else None))
        elif kind < 0.95:
            events.append(BlocksRemoved(chain[start:end][::-1]))
        else:
            events.append(BlocksCleared())
    return events


def replay(held: set[int], events: Sequence[KvEvent]) -> None:
    for event in events:
        if isinstance(event, BlocksStored):
            held.update(event.block_hashes)
        elif isinstance(event, BlocksRemoved):
            held.difference_update(event.block_hashes)
        else:
            held.clear()


def depth(held: set[int], prompt: list[int]) -> int:
    return next((i for i, h in enumerate(prompt) if h not in held), len(prompt))


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_view_equals_what_the_engine_said(rng: Random) -> None:
    source, router = KvSource(EPOCH), Router()
    held: set[int] = set()
    universe = {h for chain in CHAINS for h in chain}
    router.subscribe(source)
    for _ in range(20):
        events = events_for(rng)
        replay(held, events)
        source.apply(events)
        if rng.random() < 0.1:
            source.take_changes()
            router.subscribe(source)
        elif rng.random() < 0.6:
            router.receive(source.take_changes())
        else:
            continue
        assert router.view.receive(source.digest()) is Received.PROGRESS
        assert router.view.trusted
        assert router.held(universe) == held
        for chain in CHAINS:
            found = router.index.overlaps(chain)
            assert found == ({"worker": depth(held, chain)} if depth(held, chain) else {})


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_trusted_view_is_one_that_the_engine_had(rng: Random) -> None:
    """Items lost, doubled and exchanged: what is trusted was once true, and what it is true for is never older than
    the last digest that agreed."""
    source, router = KvSource(EPOCH), Router()
    held: set[int] = set()
    universe = {h for chain in CHAINS for h in chain}
    had = [set[int]()]
    router.subscribe(source)
    since = 0
    for _ in range(30):
        events = events_for(rng)
        replay(held, events)
        source.apply(events)
        had += [set(held)] if (items := source.take_changes()) else []
        sent: list[KvItem] = [item for item in [*items, source.digest()] for _ in range(rng.choice([0, 1, 1, 1, 2]))]
        if rng.random() < 0.3:
            rng.shuffle(sent)
        results = router.receive(sent)
        if Received.USELESS in results:
            router.subscribe(source)
            since = len(had) - 1
        elif source.digest() in sent and results[sent.index(source.digest())] is Received.PROGRESS:
            since = len(had) - 1
        assert router.view.trusted
        assert router.held(universe) in had[since:]
