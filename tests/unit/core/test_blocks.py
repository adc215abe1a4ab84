"""The block manager: reuse, eviction, collisions, events; and a state machine against a model that knows contents."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from stator.core.blocks import BlockManager, BlockTable
from stator.core.hashing import block_hashes, hash_block
from stator.messages.engine import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from stator.messages.tokens import pack

SIZE = 4


def manager(num_blocks: int = 8, **options: Any) -> BlockManager:
    return BlockManager(num_blocks, SIZE, model="m", **options)


def run(blocks: BlockManager, token_ids: list[int], salt: str | None = None) -> BlockTable:
    """A sequence that is computed whole and still holds its blocks."""
    table, tokens = blocks.new_table(None, salt), pack(token_ids)
    assert blocks.acquire(table, tokens, len(token_ids)) is not None
    blocks.commit(table, tokens, len(token_ids))
    return table


def replay(events: list[KvEvent], known: set[int]) -> None:
    """What a router does with events; checks that they make sense in their order."""
    for event in events:
        match event:
            case BlocksStored():
                assert event.parent_hash is None or event.parent_hash in known
                assert not known & set(event.block_hashes)
                known.update(event.block_hashes)
            case BlocksRemoved():
                assert set(event.block_hashes) <= known
                known.difference_update(event.block_hashes)
            case BlocksCleared():
                known.clear()


def test_a_second_sequence_reuses_full_blocks_of_the_first() -> None:
    blocks = manager()
    first = run(blocks, list(range(10)))
    second, tokens = blocks.new_table(), pack([*range(8), 99, 98])
    assert blocks.acquire(second, tokens, 10) == 2
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert blocks.num_used == 4


def test_events_name_the_documented_hashes_and_their_parent() -> None:
    blocks = manager()
    table, tokens = blocks.new_table(), pack(list(range(12)))
    blocks.acquire(table, tokens, 12)
    hashes = block_hashes(tokens, SIZE, model="m")
    blocks.commit(table, tokens, 7)
    assert blocks.take_events() == [BlocksStored(hashes[:1])]
    blocks.commit(table, tokens, 12)
    assert blocks.take_events() == [BlocksStored(hashes[1:], hashes[0])]
    assert blocks.take_events() == []
    assert blocks.snapshot() == [BlocksStored(hashes)]


def test_different_salts_share_nothing() -> None:
    blocks = manager()
    run(blocks, list(range(8)), "tenant a")
    table = blocks.new_table(None, "tenant b")
    assert blocks.acquire(table, pack(list(range(8))), 8) == 0


def test_eviction_takes_the_least_recent_chain_from_its_tail() -> None:
    blocks = manager(4)
    blocks.release(run(blocks, [1] * 8))
    blocks.release(run(blocks, [2] * 8))
    old = block_hashes(pack([1] * 8), SIZE, model="m")
    blocks.take_events()
    table = blocks.new_table()
    assert blocks.acquire(table, pack([3] * 4), 4) == 0
    assert blocks.take_events() == [BlocksRemoved([old[1]])]
    again = blocks.new_table()
    assert blocks.acquire(again, pack([1] * 4), 4) == 1, "the head of the chain outlives its tail"


def test_acquire_changes_nothing_when_blocks_are_too_few() -> None:
    blocks = manager(4)
    blocks.release(run(blocks, list(range(8))))
    holder = run(blocks, [9] * 4)
    blocks.take_events()
    table = blocks.new_table()
    # Two cached idle blocks match, one is free: five tokens' worth beyond them do not fit.
    assert blocks.acquire(table, pack([*range(8), *[7] * 8]), 16) is None
    assert (table.block_ids, blocks.num_free, blocks.take_events()) == ([], 3, [])
    assert blocks.acquire(table, pack([*range(8), 7, 7, 7]), 11, reserve=1) is None
    assert blocks.acquire(table, pack([*range(8), 7, 7, 7]), 11) == 2
    assert blocks.num_free == 0
    blocks.release(holder)


def test_content_computed_twice_ends_in_one_block() -> None:
    blocks = manager()
    tokens = pack(list(range(9)))
    left, right = blocks.new_table(), blocks.new_table()
    blocks.acquire(left, tokens, 9)
    blocks.acquire(right, tokens, 9)
    assert blocks.num_used == 6
    blocks.commit(left, tokens, 9)
    blocks.commit(right, tokens, 9)
    assert blocks.num_used == 4
    assert left.block_ids[:2] == right.block_ids[:2]
    blocks.release(left)
    assert blocks.num_used == 3, "the other sequence still uses them"


@pytest.mark.parametrize("salts", [(None, None), ("a", "b")])
def test_colliding_hashes_never_give_another_contents_blocks(salts: tuple[str | None, str | None]) -> None:
    blocks = manager(hasher=lambda parent, tokens: hash_block(0, b"all the same"))
    first = run(blocks, [1] * 8, salts[0])
    assert first.num_cached_blocks == 1, "the second block collides with the first"
    second = blocks.new_table(None, salts[1])
    other = pack([1 if salts[1] else 2] * 8)
    assert blocks.acquire(second, other, 8) == 0
    blocks.commit(second, other, 8)
    assert not set(first.block_ids) & set(second.block_ids)
    assert not second.cacheable
    assert blocks.num_cached == 1
    blocks.release(second)
    third = blocks.new_table(None, salts[0])
    assert blocks.acquire(third, pack([1] * 8), 8) == 1


def test_a_collision_of_roots_between_tenants_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stator.core.blocks.chain_root", lambda *_: 7)
    blocks = manager()
    run(blocks, [5] * 8, "tenant a")
    table = blocks.new_table(None, "tenant b")
    assert blocks.acquire(table, pack([5] * 8), 8) == 0


def test_same_tokens_under_another_parent_are_not_reused() -> None:
    # Hashes of the second block do not depend on the first.
    blocks = manager(hasher=lambda parent, tokens: hash_block(0, tokens))
    run(blocks, [1, 1, 1, 1, 5, 5, 5, 5])
    table = blocks.new_table()
    run(blocks, [2] * 4)
    assert blocks.acquire(table, pack([2, 2, 2, 2, 5, 5, 5, 5]), 8) == 1


def test_reset_keeps_what_is_in_use_and_says_so() -> None:
    blocks = manager()
    held = run(blocks, [1] * 8)
    blocks.release(run(blocks, [2] * 8))
    blocks.take_events()
    assert blocks.reset_cache() is False
    kept = block_hashes(pack([1] * 8), SIZE, model="m")
    assert blocks.take_events() == [BlocksCleared(), BlocksStored(kept)]
    blocks.release(held)
    assert blocks.reset_cache() is True
    assert blocks.take_events() == [BlocksCleared()]
    assert blocks.snapshot() == []


def test_without_prefix_caching_nothing_is_cached() -> None:
    blocks = manager(enable_prefix_caching=False)
    blocks.release(run(blocks, list(range(8))))
    assert blocks.acquire(blocks.new_table(), pack(list(range(8))), 8) == 0
    assert blocks.take_events() == []
    assert blocks.num_cached == 0


class BlockMachine(RuleBasedStateMachine):
    """Sequences over two tokens, so that prefixes are shared; `content` is what a runner would have written."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(2, 9), colliding=st.booleans())
    def begin(self, num_blocks: int, colliding: bool) -> None:
        # Hashes of four values collide all the time.
        hasher = (lambda parent, tokens: hash_block(parent, tokens) % 4) if colliding else hash_block
        self.blocks = BlockManager(num_blocks, 2, model="m", hasher=hasher)
        self.content: dict[int, tuple[int, ...] | None] = dict.fromkeys(range(num_blocks))
        self.live: dict[int, tuple[BlockTable, list[int], int]] = {}
        self.router: set[int] = set()
        self.events: list[KvEvent] = []
        self.counter = 0

    def write(self, table: BlockTable, token_ids: list[int], start: int, stop: int) -> None:
        """Each block's content is all tokens up to its end: KV depends on everything before."""
        for index in range(start // 2, -(-stop // 2)):
            self.content[table.block_ids[index]] = tuple(token_ids[: min(stop, index * 2 + 2)])

    @rule(
        target=tables, token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from([None, "s"])
    )
    def admit(self, token_ids: list[int], salt: str | None) -> Any:
        token_ids = [5 if salt else 6, *token_ids]
        table = self.blocks.new_table(None, salt)
        free = self.blocks.num_free
        cached = self.blocks.acquire(table, pack(token_ids), len(token_ids))
        if cached is None:
            assert (table.block_ids, self.blocks.num_free) == ([], free)
            assert self.blocks.blocks_for(len(token_ids)) > free - len(self.blocks.lookup(table, pack(token_ids)))
            return None
        for index in range(cached):
            assert self.content[table.block_ids[index]] == tuple(token_ids[: index * 2 + 2]), "wrong KV reused"
        self.counter += 1
        self.live[self.counter] = (table, token_ids, cached * 2)
        return self.counter

    @rule(key=tables, count=st.integers(1, 4))
    def compute(self, key: Any, count: int) -> None:
        if key not in self.live:
            return
        table, token_ids, computed = self.live[key]
        stop = min(len(token_ids), computed + count)
        self.write(table, token_ids, computed, stop)
        self.blocks.commit(table, pack(token_ids), stop)
        self.live[key] = (table, token_ids, max(computed, stop))

    @rule(key=tables, token_id=st.integers(0, 1))
    def generate(self, key: Any, token_id: int) -> None:
        if key not in self.live or self.live[key][2] < len(self.live[key][1]):
            return
        table, token_ids, computed = self.live[key]
        if self.blocks.grow(table, len(token_ids) + 1):
            self.live[key] = (table, [*token_ids, token_id], computed)

    @rule(key=consumes(tables))
    def release(self, key: Any) -> None:
        if key in self.live:
            self.blocks.release(self.live.pop(key)[0])

    @precondition(lambda self: hasattr(self, "blocks"))
    @rule()
    def reset(self) -> None:
        emptied = self.blocks.reset_cache()
        assert emptied == (self.blocks.num_cached == 0)

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "blocks"):
            return
        blocks = self.blocks
        inner: Any = blocks
        uses: dict[int, int] = {}
        for table, token_ids, computed in self.live.values():
            assert len(set(table.block_ids)) == len(table.block_ids)
            for index, block_id in enumerate(table.block_ids):
                uses[block_id] = uses.get(block_id, 0) + 1
                if index < computed // 2:
                    assert self.content[block_id] == tuple(token_ids[: index * 2 + 2])
        assert {b: block.num_refs for b, block in enumerate(inner._blocks) if block.num_refs} == uses
        free, idle = list(inner._free), list(inner._idle)
        assert len(set(free + idle + list(uses))) == len(free) + len(idle) + len(uses) == blocks.num_blocks
        assert blocks.num_free + blocks.num_used == blocks.num_blocks
        for position, block_id in enumerate(idle):
            parent = inner._blocks[block_id].parent
            assert parent not in idle[:position], "a parent would be evicted before its child"
        for block_hash, block_id in inner._by_hash.items():
            parent = inner._blocks[block_id].parent
            assert inner._blocks[block_id].block_hash == block_hash
            assert parent is None or inner._blocks[parent].block_hash is not None
        replay(blocks.take_events(), self.router)
        assert self.router == set(blocks.cached_hashes())
        fresh: set[int] = set()
        replay(blocks.snapshot(), fresh)
        assert fresh == self.router


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
