"""What a vLLM engine holds, in our hashes, from the KV events that it publishes.

vLLM names a block by a hash of its own, which only its build and settings can recompute. Here it is an opaque id: the
tokens in a store event give our hash (core.hashing), chained on that of the event's parent, or on the root of model,
LoRA name and cache salt for the first block of a sequence. Rules of `EngineBlocks`, one engine rank each:

- A block is *claimed*, that is, told to routers, when we can compute its hash. It is *tracked* without being claimed
  when we cannot: its parent is unknown or not claimed, or its content depends on more than tokens, LoRA name and salt
  (images, prompt embeddings), or it is not one of our block size. What follows such a block is not claimed either.
- vLLM may hold the same content twice, and stores and removes each copy with an event of its own. A block is claimed
  as long as one copy is left.
- Two of vLLM's hashes may be one of ours (it hashes a LoRA's path as well). Claimed as long as one of them is.
- Only the first full-attention group counts. Other groups (sliding window, Mamba) hold parts of a sequence, chosen so
  that a hit in the full-attention group is a hit in them.
- Only medium GPU counts, which is what the CPU platform says too. Blocks that a connector moved to host memory or disk
  (CPU, STORAGE) are ignored: to use them costs a transfer, and a router that claims them would take it for free.
- A removal of what is not tracked means nothing. AllBlocksCleared forgets everything.
- What is stored past `max_blocks` is not tracked: too few claims are safe, an unbounded table is not.

`UnionOfRanks` makes one stream of events out of several ranks': a block is held as long as one rank holds it.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from stator.core.hashing import chain_root, hash_block
from stator.messages.engine import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from stator.messages.tokens import BYTES_PER_TOKEN, pack

EngineHash = int | bytes
"""vLLM's name of a block: the low 64 bits of a digest, or the whole digest. Compared only."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]

MAX_BLOCKS = 1 << 20
"""Engine blocks tracked per rank: several times what a node with 8 GPUs of 80 GB has, and some 250 MB."""

MAX_VOID_BATCHES = 64

_FULL_ATTENTION = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
_FIRST_GROUP = 0


class EngineStored(msgspec.Struct, frozen=True):
    """vLLM's BlockStored, as far as it matters here. token_ids: those of all block_hashes, block_size each.

    extra_keys: per block None or what its hash depends on beside tokens and parent, in this order: the LoRA name, if
    there is one; a pair (identifier, offset) for each image or the like; the cache salt, in a sequence's first block
    only; digests of prompt embeddings as bytes. None if no block has any.
    """

    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None = None
    token_ids: list[TokenId] = []
    block_size: int = 0
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class EngineRemoved(msgspec.Struct, frozen=True):
    """vLLM's BlockRemoved: one copy of each block is gone."""

    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None


class EngineCleared(msgspec.Struct, frozen=True):
    """vLLM's AllBlocksCleared."""


EngineEvent = EngineStored | EngineRemoved | EngineCleared


@dataclass(slots=True)
class Applied:
    """events: what changed, for listeners. incomplete: a parent is unknown, or the state cannot be told from what came;
    a replay of what the engine published may help."""

    events: list[KvEvent] = field(default_factory=list[KvEvent])
    incomplete: bool = False

    def stored(self, block_hash: int, parent: int | None) -> None:
        last = self.events[-1] if self.events else None
        if isinstance(last, BlocksStored) and parent is not None and last.block_hashes[-1] == parent:
            last.block_hashes.append(block_hash)
        else:
            self.events.append(BlocksStored([block_hash], parent))

    def removed(self, block_hash: int) -> None:
        last = self.events[-1] if self.events else None
        if isinstance(last, BlocksRemoved):
            last.block_hashes.append(block_hash)
        else:
            self.events.append(BlocksRemoved([block_hash]))

    def cleared(self) -> None:
        self.events.append(BlocksCleared())


@dataclass(slots=True)
class _Tracked:
    """One engine hash. block_hash: ours, None if not claimed."""

    block_hash: int | None = None
    num_copies: int = 0


@dataclass(slots=True)
class Claim:
    """One of our hashes, held. holders: a count of engine hashes, or in a union a bit set of ranks."""

    parent: int | None
    holders: int = 0


class EngineBlocks:
    """The prefix cache of one engine rank. See the module for the rules."""

    def __init__(self, model: str, block_size: int, *, max_blocks: int = MAX_BLOCKS) -> None:
        """model: the served name, as in `EngineInfo.model`. block_size: tokens; of other blocks none is claimed."""
        self.num_clears = 0
        self._model = model
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._tracked: dict[EngineHash, _Tracked] = {}
        self._claims: dict[int, Claim] = {}
        self._group: int | None = None
        self._void_left = 0

    @property
    def num_tracked(self) -> int:
        return len(self._tracked)

    @property
    def claimed(self) -> Mapping[int, Claim]:
        """Keyed by our hashes of the blocks held; a view."""
        return self._claims

    def apply(self, events: Sequence[EngineEvent]) -> Applied:
        """One published batch."""
        applied = Applied()
        for event in events:
            if isinstance(event, EngineCleared):
                self._void_left = 0
                self.num_clears += 1
                self._forget_all(applied)
            elif not self._void_left and self._counts(event):
                if isinstance(event, EngineStored):
                    self._store(event, applied)
                else:
                    self._remove(event.block_hashes, applied)
        if self._void_left:
            self._void_left -= 1
            applied.incomplete = self._void_left == 0
        return applied

    def clear(self, *, void: bool = False) -> Applied:
        """The engine forgot everything. With void, batches that it published before that may still come, and until its
        own AllBlocksCleared they are ignored; if that does not come for MAX_VOID_BATCHES, a replay is asked for."""
        applied = Applied()
        self._void_left = MAX_VOID_BATCHES if void else 0
        self._forget_all(applied)
        return applied

    def snapshot(self) -> list[KvEvent]:
        """Everything claimed, parents before their children; long runs in one event. A block whose parent is gone comes
        with its parent's hash all the same."""
        return _snapshot(self._claims)

    def longest_prefix(self, chain: Sequence[int]) -> int:
        """Leading blocks of `chain` that are held."""
        return _longest_prefix(self._claims, chain)

    def _counts(self, event: EngineStored | EngineRemoved) -> bool:
        if event.medium not in (None, "GPU"):
            return False
        group = _FIRST_GROUP if event.group_idx is None else event.group_idx
        if self._group is None and isinstance(event, EngineStored):
            kind = event.kv_cache_spec_kind
            if kind in _FULL_ATTENTION or (kind is None and group == _FIRST_GROUP):
                self._group = group
        return group == self._group

    def _store(self, event: EngineStored, applied: Applied) -> None:
        if not event.block_hashes:
            return
        hashable = self._hashable_blocks(event)
        parent, block_hash = self._chain_start(event, applied)
        size = self._block_size * BYTES_PER_TOKEN
        packed = pack(event.token_ids) if hashable else b""
        for index, name in enumerate(event.block_hashes):
            tracked = self._tracked.get(name)
            if tracked is None:
                if len(self._tracked) >= self._max_blocks:
                    return
                tracked = self._tracked[name] = _Tracked()
            tracked.num_copies += 1
            if tracked.block_hash is None and block_hash is not None and index < hashable:
                tracked.block_hash = hash_block(block_hash, packed[index * size : (index + 1) * size])
                self._claim(tracked.block_hash, parent, applied)
            parent = block_hash = tracked.block_hash

    def _hashable_blocks(self, event: EngineStored) -> int:
        """How many leading blocks of the event have a hash of ours, provided that its parent has one."""
        num_blocks = len(event.block_hashes)
        sized = event.block_size == self._block_size and len(event.token_ids) == num_blocks * self._block_size
        if not sized or (event.lora_id is not None and event.lora_name is None):
            return 0
        if event.extra_keys is None:
            return num_blocks
        if len(event.extra_keys) != num_blocks:
            return 0
        first = event.parent_block_hash is None
        for index, keys in enumerate(event.extra_keys):
            rest = _without_lora(keys, event.lora_name)
            salted = first and index == 0 and len(rest) == 1 and isinstance(rest[0], str)
            if rest and not salted:
                return index
        return num_blocks

    def _chain_start(self, event: EngineStored, applied: Applied) -> tuple[int | None, int | None]:
        """(hash of the parent block if there is one, what the first block chains on: None if that is not claimed)."""
        if event.parent_block_hash is None:
            rest = _without_lora(event.extra_keys[0], event.lora_name) if event.extra_keys else []
            salt = rest[0] if rest and isinstance(rest[0], str) else None
            return None, chain_root(self._model, event.lora_name, salt)
        tracked = self._tracked.get(event.parent_block_hash)
        if tracked is None:
            applied.incomplete = True
            return None, None
        return tracked.block_hash, tracked.block_hash

    def _remove(self, hashes: Iterable[EngineHash], applied: Applied) -> None:
        for name in hashes:
            tracked = self._tracked.get(name)
            if tracked is None:
                continue
            tracked.num_copies -= 1
            if tracked.num_copies == 0:
                del self._tracked[name]
                if tracked.block_hash is not None:
                    self._unclaim(tracked.block_hash, applied)

    def _claim(self, block_hash: int, parent: int | None, applied: Applied) -> None:
        claim = self._claims.get(block_hash)
        if claim is None:
            claim = self._claims[block_hash] = Claim(parent)
            applied.stored(block_hash, parent)
        claim.holders += 1

    def _unclaim(self, block_hash: int, applied: Applied) -> None:
        claim = self._claims[block_hash]
        claim.holders -= 1
        if claim.holders == 0:
            del self._claims[block_hash]
            applied.removed(block_hash)

    def _forget_all(self, applied: Applied) -> None:
        self._tracked.clear()
        self._claims.clear()
        applied.cleared()


class UnionOfRanks:
    """Several ranks as one holder. Ranks are numbered from 0; events are those of the whole."""

    def __init__(self, ranks: Sequence[EngineBlocks]) -> None:
        self._ranks = list(ranks)
        self._claims: dict[int, Claim] = {}

    @property
    def num_clears(self) -> tuple[int, ...]:
        """Per rank: how often its whole state was replaced, by the engine's word or by `replace`. Only grows."""
        return tuple(rank.num_clears for rank in self._ranks)

    @property
    def num_blocks(self) -> int:
        return len(self._holders)

    def apply(self, rank: int, events: Sequence[EngineEvent]) -> Applied:
        return self._merge(rank, self._ranks[rank].apply(events))

    def clear(self, rank: int, *, void: bool = False) -> list[KvEvent]:
        """As EngineBlocks.clear. Events: cleared, and then what other ranks hold."""
        return self._merge(rank, self._ranks[rank].clear(void=void)).events

    def replace(self, rank: int, blocks: EngineBlocks) -> list[KvEvent]:
        """A new state of a rank, in one piece. Events: cleared, and then everything; none if all was and is empty."""
        old, self._ranks[rank] = self._ranks[rank], blocks
        blocks.num_clears = old.num_clears + 1
        if not old.claimed and not blocks.claimed:
            return []
        # What is common to both must not look lost in between.
        return self._merge(rank, Applied([BlocksCleared(), *blocks.snapshot()])).events

    def snapshot(self) -> list[KvEvent]:
        """Everything held by any rank, as EngineBlocks.snapshot."""
        return _snapshot(self._holders)

    def longest_prefix(self, chain: Sequence[int]) -> tuple[int, int]:
        """(leading blocks of `chain` in the rank that has most of them, that rank); the lowest rank of equal ones, so
        (0, 0) if none has any."""
        found = [blocks.longest_prefix(chain) for blocks in self._ranks]
        best = max(found)
        return best, found.index(best)

    @property
    def _holders(self) -> Mapping[int, Claim]:
        # With one rank its events are those of the whole, and nothing is kept twice.
        return self._ranks[0].claimed if len(self._ranks) == 1 else self._claims

    def _merge(self, rank: int, applied: Applied) -> Applied:
        if len(self._ranks) == 1:
            return applied
        merged = Applied(incomplete=applied.incomplete)
        bit = 1 << rank
        for event in applied.events:
            if isinstance(event, BlocksStored):
                self._hold(bit, event, merged)
            elif isinstance(event, BlocksRemoved):
                for lost in self._let_go(bit, event.block_hashes):
                    merged.removed(lost)
            else:
                for _ in self._let_go(bit, list(self._claims)):
                    pass
                merged.events.extend([event, *_snapshot(self._claims)])
        return merged

    def _hold(self, bit: int, event: BlocksStored, merged: Applied) -> None:
        parent = event.parent_hash
        for block_hash in event.block_hashes:
            claim = self._claims.get(block_hash)
            if claim is None:
                claim = self._claims[block_hash] = Claim(parent)
                merged.stored(block_hash, parent)
            claim.holders |= bit
            parent = block_hash

    def _let_go(self, bit: int, hashes: Iterable[int]) -> Iterator[int]:
        """Those that no rank holds any more."""
        for block_hash in hashes:
            claim = self._claims[block_hash]
            claim.holders &= ~bit
            if claim.holders == 0:
                del self._claims[block_hash]
                yield block_hash


def _without_lora(keys: Sequence[Any] | None, lora_name: str | None) -> Sequence[Any]:
    if keys and lora_name is not None and keys[0] == lora_name:
        return keys[1:]
    return keys or ()


def _longest_prefix(held: Container[int], chain: Sequence[int]) -> int:
    for index, block_hash in enumerate(chain):
        if block_hash not in held:
            return index
    return len(chain)


def _snapshot(claims: Mapping[int, Claim]) -> list[KvEvent]:
    runs: list[BlocksStored] = []
    run_ending_in: dict[int, BlocksStored] = {}
    done: set[int] = set()
    for block_hash in claims:
        path: list[int] = []
        node: int | None = block_hash
        # Usually one step: a block is claimed after its parent. Not if the parent was lost and came back.
        while node is not None and node in claims and node not in done:
            path.append(node)
            node = claims[node].parent
        for name in reversed(path):
            done.add(name)
            parent = claims[name].parent
            run = run_ending_in.pop(parent, None) if parent is not None else None
            if run is None:
                run = BlocksStored([], parent)
                runs.append(run)
            run.block_hashes.append(name)
            run_ending_in[name] = run
    return list[KvEvent](runs)
