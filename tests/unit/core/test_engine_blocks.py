"""vLLM's events into ours, against a pool that holds and drops copies of blocks as vLLM's does."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.core.engine_blocks import (
    MAX_VOID_BATCHES,
    EngineBlocks,
    EngineCleared,
    EngineEvent,
    EngineRemoved,
    EngineStored,
    UnionOfRanks,
)
from stator.core.hashing import block_hashes
from stator.messages.engine import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from stator.messages.tokens import pack

SIZE = 2
MODEL = "m"


def ours(token_ids: Sequence[int], *, lora: str | None = None, salt: str | None = None) -> list[int]:
    return [*block_hashes(pack(token_ids), SIZE, model=MODEL, lora_name=lora, cache_salt=salt)]


def stored(names: list[Any], token_ids: Sequence[int], parent: Any = None, **changes: Any) -> EngineStored:
    fields: dict[str, Any] = {
        "block_hashes": names,
        "parent_block_hash": parent,
        "token_ids": list(token_ids),
        "block_size": SIZE,
        "medium": "GPU",
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return EngineStored(**(fields | changes))


def removed(*names: Any, **changes: Any) -> EngineRemoved:
    return EngineRemoved(list(names), **({"medium": "GPU", "group_idx": 0} | changes))


class Mirror:
    """A listener's view; fails on events that make no sense in their order."""

    def __init__(self) -> None:
        self.hashes: set[int] = set()

    def __call__(self, events: Sequence[KvEvent], /) -> None:
        for event in events:
            match event:
                case BlocksStored():
                    assert event.block_hashes and not self.hashes.intersection(event.block_hashes)
                    self.hashes.update(event.block_hashes)
                case BlocksRemoved():
                    assert event.block_hashes and self.hashes.issuperset(event.block_hashes)
                    self.hashes.difference_update(event.block_hashes)
                case BlocksCleared():
                    self.hashes.clear()


def blocks(**changes: Any) -> EngineBlocks:
    return EngineBlocks(MODEL, SIZE, **changes)


def test_hashes_are_those_of_a_prompt() -> None:
    held = blocks()
    a, b, c = ours([1, 2, 3, 4, 5, 6])
    assert held.apply([stored([11, 12], [1, 2, 3, 4])]).events == [BlocksStored([a, b])]
    assert held.apply([stored([b"13"], [5, 6], 12)]).events == [BlocksStored([c], b)]
    assert held.snapshot() == [BlocksStored([a, b, c])]
    assert held.apply([removed(b"13"), removed(12)]).events == [BlocksRemoved([c, b])]
    assert held.longest_prefix([a, b, c]) == 1


def test_a_block_is_claimed_until_its_last_copy_is_gone() -> None:
    held = blocks()
    (a,) = ours([1, 2])
    held.apply([stored([1], [1, 2])])
    assert held.apply([stored([1], [1, 2])]).events == []
    assert held.apply([removed(1)]).events == []
    assert held.apply([removed(1)]).events == [BlocksRemoved([a])]
    assert held.apply([removed(1)]).events == []
    assert held.num_tracked == 0


def test_two_engine_hashes_may_be_one_of_ours() -> None:
    held = blocks()
    held.apply([stored([1], [1, 2]), stored([2], [1, 2])])
    assert held.apply([removed(1)]).events == []
    assert held.apply([removed(2)]).events == [BlocksRemoved(ours([1, 2]))]


def test_a_held_block_in_a_run_is_not_stored_twice() -> None:
    held = blocks()
    a, b, c = ours([1, 2, 3, 4, 5, 6])
    held.apply([stored([1, 2], [1, 2, 3, 4]), removed(1)])
    assert held.apply([stored([1, 2, 3], [1, 2, 3, 4, 5, 6])]).events == [BlocksStored([a]), BlocksStored([c], b)]


@pytest.mark.parametrize(
    ("changes", "root"),
    [
        ({"lora_name": "x", "lora_id": 1, "extra_keys": [["x"], ["x"]]}, {"lora": "x"}),
        ({"extra_keys": [["s"], None]}, {"salt": "s"}),
        ({"lora_name": "x", "extra_keys": [["x", "s"], ["x"]]}, {"lora": "x", "salt": "s"}),
        ({"lora_name": "x", "extra_keys": [["x", "x"], ["x"]]}, {"lora": "x", "salt": "x"}),
        ({"lora_name": "x"}, {"lora": "x"}),
        ({"kv_cache_spec_kind": None, "group_idx": None, "medium": None}, {}),
        ({"kv_cache_spec_kind": "mla_attention"}, {}),
    ],
)
def test_lora_and_salt_are_in_the_root(changes: dict[str, Any], root: dict[str, str]) -> None:
    held = blocks()
    assert held.apply([stored([1, 2], [1, 2, 3, 4], **changes)]).events == [BlocksStored(ours([1, 2, 3, 4], **root))]


@pytest.mark.parametrize(
    ("changes", "num_claimed"),
    [
        ({"extra_keys": [None, [["image", 0]], None]}, 1),
        ({"extra_keys": [[b"digest"], [b"digest"], None]}, 0),
        ({"extra_keys": [["s", b"digest"], None, None]}, 0),
        ({"extra_keys": [None, ["a salt where none can be"], None]}, 1),
        ({"extra_keys": [None]}, 0),
        ({"lora_id": 3}, 0),
        ({"block_size": 1}, 0),
        ({"token_ids": [1, 2]}, 0),
    ],
)
def test_what_we_cannot_hash_is_not_claimed_nor_what_follows(changes: dict[str, Any], num_claimed: int) -> None:
    held = blocks()
    first = msgspec.structs.replace(stored([1, 2, 3], [1, 2, 3, 4, 5, 6]), **changes)
    applied = held.apply([first, stored([4], [7, 8], 3)])
    assert not applied.incomplete, "the parent is known, only not claimed"
    assert applied.events == ([BlocksStored(ours([1, 2, 3, 4])[:num_claimed])] if num_claimed else [])
    held.apply([removed(1, 2, 3, 4)])
    assert (held.num_tracked, held.snapshot()) == (0, [])


@pytest.mark.parametrize("changes", [{"medium": "CPU"}, {"medium": "STORAGE"}, {"group_idx": 1}])
def test_other_media_and_groups_do_not_count(changes: dict[str, Any]) -> None:
    held = blocks()
    held.apply([stored([1], [1, 2])])
    assert held.apply([stored([1, 2], [1, 2, 3, 4], **changes), removed(1, **changes)]).events == []
    assert held.num_tracked == 1


def test_the_first_full_attention_group_counts_whatever_its_number() -> None:
    held = blocks()
    window = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window"}
    full = {"group_idx": 1}
    assert held.apply([stored([1], [1, 2], **window), removed(1)]).events == []
    events = held.apply([stored([1], [1, 2], **full), removed(1), stored([2], [3, 4], group_idx=2)]).events
    assert events == [BlocksStored(ours([1, 2]))]


def test_an_unknown_parent_is_told_and_its_children_are_not_claimed() -> None:
    held = blocks()
    late = stored([3], [5, 6], 2)
    applied = held.apply([late])
    assert (applied.events, applied.incomplete) == ([], True)
    assert not held.apply([stored([4], [7, 8], 3)]).incomplete, "that one's parent is tracked"
    # A second copy, stored with a parent that is known by now, makes the block known.
    held.apply([stored([1, 2], [1, 2, 3, 4])])
    assert held.apply([late]).events == [BlocksStored(ours([1, 2, 3, 4, 5, 6])[2:], ours([1, 2, 3, 4])[1])]
    assert held.apply([removed(3)]).events == []
    assert len(held.apply([removed(3)]).events) == 1


def test_cleared() -> None:
    held = blocks()
    held.apply([stored([1], [1, 2])])
    assert held.apply([EngineCleared(), stored([2], [3, 4])]).events == [BlocksCleared(), BlocksStored(ours([3, 4]))]
    assert held.apply([removed(1)]).events == []
    assert held.clear().events == [BlocksCleared()]
    assert (held.num_tracked, held.snapshot()) == (0, [])


def test_what_comes_late_after_a_reset_is_void_until_the_engine_says_cleared() -> None:
    held = blocks()
    held.apply([stored([1], [1, 2])])
    held.clear(void=True)
    assert held.apply([stored([2], [3, 4], 1)]) == held.apply([]), "neither claimed nor asked for"
    events = held.apply([stored([3], [3, 4]), EngineCleared(), stored([4], [5, 6])]).events
    assert events == [BlocksCleared(), BlocksStored(ours([5, 6]))]


def test_void_ends_with_a_request_for_a_replay_if_the_engine_never_says_cleared() -> None:
    held = blocks()
    held.clear(void=True)
    told = [held.apply([stored([n], [n, n])]).incomplete for n in range(MAX_VOID_BATCHES)]
    assert told == [False] * (MAX_VOID_BATCHES - 1) + [True]
    assert held.apply([stored([1], [1, 2])]).events == [BlocksStored(ours([1, 2]))]


def test_the_table_has_a_bound() -> None:
    held = blocks(max_blocks=2)
    held.apply([stored([1, 2, 3], [1, 2, 3, 4, 5, 6])])
    assert (held.num_tracked, len(held.claimed)) == (2, 2)
    held.apply([removed(3), removed(2), stored([2], [3, 4], 1)])
    assert held.longest_prefix(ours([1, 2, 3, 4, 5, 6])) == 2


def test_snapshot_has_parents_first_even_if_the_parent_came_back_later() -> None:
    held = blocks()
    a, b, c = ours([1, 2, 3, 4, 5, 6])
    held.apply([stored([1, 2, 3], [1, 2, 3, 4, 5, 6]), removed(1)])
    assert held.snapshot() == [BlocksStored([b, c], a)]
    held.apply([stored([1], [1, 2])])
    assert held.snapshot() == [BlocksStored([a, b, c])]


def test_ranks_are_one_holder() -> None:
    union = UnionOfRanks([blocks(), blocks()])
    a, b = ours([1, 2, 3, 4])
    assert union.apply(0, [stored([1], [1, 2])]).events == [BlocksStored([a])]
    assert union.apply(1, [stored([9, 8], [1, 2, 3, 4])]).events == [BlocksStored([b], a)]
    assert union.longest_prefix([a, b]) == (2, 1)
    assert union.longest_prefix([a]) == (1, 0)
    assert union.longest_prefix([5, a]) == (0, 0)
    assert union.apply(1, [removed(9)]).events == []
    assert union.clear(0) == [BlocksCleared(), BlocksStored([b], a)]
    assert union.apply(1, [EngineCleared()]).events == [BlocksCleared()]
    assert union.num_clears == (0, 1)


def test_a_replaced_rank_comes_in_one_piece() -> None:
    union = UnionOfRanks([blocks(), blocks()])
    union.apply(0, [stored([1], [1, 2])])
    union.apply(1, [stored([5], [5, 6])])
    fresh = blocks()
    fresh.apply([stored([1, 2], [1, 2, 3, 4])])
    mirror = Mirror()
    mirror(union.replace(0, fresh))
    assert mirror.hashes == {*ours([1, 2, 3, 4]), *ours([5, 6])}
    assert union.num_clears == (1, 0)
    assert UnionOfRanks([blocks()]).replace(0, blocks()) == []


# Scope of a sequence, and whether it can be hashed: (lora, salt, image in block 1).
SCOPES = [(None, None, False), ("x", None, False), (None, "s", False), (None, None, True)]


class Pool:
    """Copies of blocks as in vLLM's pool: stored with their parent held, dropped in any order."""

    def __init__(self) -> None:
        self.copies: Counter[tuple[int, tuple[int, ...]]] = Counter()

    @staticmethod
    def name(scope: int, path: tuple[int, ...]) -> int | bytes:
        # Ints and bytes; both must do.
        return hash((scope, path)) & 0xFFFF_FFFF if len(path) % 2 else repr((scope, path)).encode()

    def store(self, scope: int, path: tuple[int, ...], start: int) -> list[EngineEvent]:
        while start and not self.copies[scope, path[:start]]:
            start -= 1
        if start == len(path):
            return []
        lora, salt, image = SCOPES[scope]
        keys: list[list[Any] | None] = []
        for index in range(start, len(path)):
            own = [*([lora] if lora else []), *([["image", 0]] if image and index == 1 else [])]
            keys.append([*own, *([salt] if salt and index == 0 else [])] or None)
        names: list[Any] = []
        for end in range(start + 1, len(path) + 1):
            self.copies[scope, path[:end]] += 1
            names.append(self.name(scope, path[:end]))
        tokens = [token for block in path[start:] for token in (block, block)]
        parent = self.name(scope, path[:start]) if start else None
        return [stored(names, tokens, parent, lora_name=lora, extra_keys=keys if any(keys) else None)]

    def drop(self, which: int) -> list[EngineEvent]:
        if not self.copies:
            return []
        key = sorted(self.copies)[which % len(self.copies)]
        self.copies[key] -= 1
        if not self.copies[key]:
            del self.copies[key]
        return [removed(self.name(*key))]

    def claimable(self) -> set[int]:
        held: set[int] = set()
        for (scope, path), count in self.copies.items():
            lora, salt, image = SCOPES[scope]
            if count and not (image and len(path) > 1):
                held.add(ours([token for block in path for token in (block, block)], lora=lora, salt=salt)[-1])
        return held


path = st.lists(st.integers(1, 2), min_size=1, max_size=4).map(tuple)
step = st.one_of(
    st.tuples(st.just("store"), st.integers(0, 3), path, st.integers(0, 3)),
    st.tuples(st.just("drop"), st.integers(0, 50)),
    st.tuples(st.just("drop"), st.integers(0, 50)),
    st.tuples(st.just("clear")),
    st.tuples(st.just("replace")),
)


def play(pool: Pool, action: tuple[Any, ...]) -> list[EngineEvent]:
    match action:
        case ("store", scope, blocks_of, start):
            return pool.store(scope, blocks_of, min(start, len(blocks_of)))
        case ("drop", which):
            return pool.drop(which)
        case _:
            pool.copies.clear()
            return [EngineCleared()]


@settings(max_examples=200, deadline=None)
@given(num_ranks=st.integers(1, 3), actions=st.lists(st.tuples(st.integers(0, 2), step), max_size=40))
def test_claims_are_what_the_pools_hold(num_ranks: int, actions: list[tuple[int, tuple[Any, ...]]]) -> None:
    union = UnionOfRanks([blocks() for _ in range(num_ranks)])
    pools = [Pool() for _ in range(num_ranks)]
    logs: list[list[EngineEvent]] = [[] for _ in range(num_ranks)]
    mirror = Mirror()
    for number, action in actions:
        rank = number % num_ranks
        if action == ("replace",):
            again = blocks()
            again.apply(logs[rank])
            mirror(union.replace(rank, again))
        else:
            events = play(pools[rank], action)
            logs[rank] += events
            applied = union.apply(rank, events)
            assert not applied.incomplete
            mirror(applied.events)
        held = [pool.claimable() for pool in pools]
        assert mirror.hashes == set[int]().union(*held)
        assert union.num_blocks == len(mirror.hashes)
        check_snapshot(union.snapshot(), mirror.hashes)
        chain = ours([1, 1, 1, 1, 2, 2])
        prefixes = [next((i for i, name in enumerate(chain) if name not in part), 3) for part in held]
        assert union.longest_prefix(chain) == (max(prefixes), prefixes.index(max(prefixes)))


def check_snapshot(events: list[KvEvent], held: set[int]) -> None:
    seen = Mirror()
    for event in events:
        assert isinstance(event, BlocksStored)
        assert event.parent_hash is None or event.parent_hash in seen.hashes or event.parent_hash not in held
        seen([event])
    assert seen.hashes == held
