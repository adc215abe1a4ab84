"""Paged KV blocks with prefix caching: which block holds what, who uses it, and what may be reused.

A block is in exactly one of these states:

- *free*: nobody uses it, nothing in it is known. In `_free`.
- *used*: referenced by one or more tables; its content is unknown (being filled) or cached. In no list.
- *idle*: cached, referenced by nobody. In `_idle`, least recently used first.

Cached content is a tree: a cached block has a parent block (None for the first of a sequence) that is cached too.
The rules that keep it one:

- A table that uses a cached block uses all its ancestors. When a sequence has just computed content that another
  block already holds, its table is changed to that block (`commit`), so this also holds for content computed twice.
- Hence whoever is idle has only idle descendants, and since tables are released tail first, a block stands in `_idle`
  before its parent. Evicting the oldest therefore never orphans a cached block.

Reuse compares the token ids and the parent block (for first blocks: LoRA and cache salt), never the hash alone. If two
different contents have one hash, the first stays cached and the second is simply not cached, nor is what follows it.

Events are appended where content becomes reusable (`commit`) or ceases to be (`_evict`, `reset_cache`), and nowhere
else. Replaying them gives exactly the set of cached hashes.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from stator.core.hashing import BlockHasher, chain_root, extend_hashes, hash_block
from stator.ids import BlockHash
from stator.messages.engine import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from stator.messages.tokens import BYTES_PER_TOKEN

Tokens = bytes | bytearray
"""Packed token ids of a sequence, as `messages.tokens.TokenBuffer`; a bytearray while it grows."""

Scope = tuple[str | None, str | None]
"""(lora_name, cache_salt): sequences of different scopes share no blocks."""


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order. Changed by the BlockManager only.

    hashes: chain of the sequence's full blocks as far as it was needed. num_cached_blocks: leading blocks that are in
    the prefix cache. cacheable: False after a hash collision, when later blocks have no cached parent to chain on.
    """

    scope: Scope
    root: BlockHash
    block_ids: list[int] = field(default_factory=list[int])
    hashes: list[BlockHash] = field(default_factory=list[BlockHash])
    num_cached_blocks: int = 0
    cacheable: bool = True


@dataclass(slots=True)
class _Block:
    """block_hash None: not cached; then tokens, parent and scope mean nothing."""

    num_refs: int = 0
    block_hash: BlockHash | None = None
    tokens: bytes = b""
    parent: int | None = None
    scope: Scope | None = None


class BlockManager:
    """Owns all blocks of one engine. Block ids are 0 .. num_blocks - 1."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        model: str,
        enable_prefix_caching: bool = True,
        hasher: BlockHasher = hash_block,
    ) -> None:
        """model: name that goes into the hashes. hasher: replaced only to force collisions in a test."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be positive, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._model = model
        self._caching = enable_prefix_caching
        self._hasher = hasher
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[BlockHash, int] = {}
        self._events: list[KvEvent] = []

    @property
    def num_free(self) -> int:
        """Blocks that a sequence may get, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        return len(self._by_hash)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def new_table(self, lora_name: str | None = None, cache_salt: str | None = None) -> BlockTable:
        return BlockTable((lora_name, cache_salt), chain_root(self._model, lora_name, cache_salt))

    def lookup(self, table: BlockTable, tokens: Tokens) -> list[int]:
        """Ids of the leading full blocks of tokens that are cached. Changes nothing but `table.hashes`."""
        found: list[int] = []
        if not self._caching:
            return found
        extend_hashes(table.hashes, tokens, self.block_size, table.root, hasher=self._hasher)
        parent: int | None = None
        for index, block_hash in enumerate(table.hashes):
            block_id = self._by_hash.get(block_hash)
            if block_id is None or not self._holds(block_id, table, tokens, index, parent):
                break
            found.append(block_id)
            parent = block_id
        return found

    def acquire(
        self, table: BlockTable, tokens: Tokens, num_tokens: int, *, reserve: int = 0, look_up: bool = True
    ) -> int | None:
        """Give an empty table the cached blocks that match and new ones, to cover num_tokens. look_up False: only new
        ones.

        Returns how many leading blocks were cached; None, and nothing is changed, if fewer than `reserve` blocks
        would be left free. Contents of the others are undefined.
        """
        assert not table.block_ids, "acquire is for a table without blocks"
        cached = self.lookup(table, tokens)[: self.blocks_for(num_tokens)] if look_up else []
        num_idle = sum(1 for block_id in cached if self._blocks[block_id].num_refs == 0)
        num_new = self.blocks_for(num_tokens) - len(cached)
        if num_new + num_idle + reserve > self.num_free:
            return None
        for block_id in cached:
            self._ref(block_id)
        table.block_ids.extend(cached)
        table.num_cached_blocks = len(cached)
        self._append_new(table, num_new)
        return len(cached)

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Add new blocks until the table covers num_tokens. False, and nothing is changed, if too few are free."""
        num_new = self.blocks_for(num_tokens) - len(table.block_ids)
        if num_new > self.num_free:
            return False
        self._append_new(table, num_new)
        return True

    def commit(self, table: BlockTable, tokens: Tokens, num_computed: int) -> None:
        """The KV of the first num_computed tokens is in the table's blocks: make its full blocks reusable.

        May exchange blocks of the table for equal ones that were cached first; the ids that the table had are free
        afterwards. So no computation may be under way in the table's blocks.
        """
        if not self._caching:
            return
        extend_hashes(table.hashes, tokens, self.block_size, table.root, hasher=self._hasher)
        while table.cacheable and table.num_cached_blocks < num_computed // self.block_size:
            self._commit_next(table, tokens)

    def release(self, table: BlockTable) -> None:
        """The sequence needs its blocks no more; cached ones stay reusable until evicted. Empties the table."""
        for block_id in reversed(table.block_ids):
            self._unref(block_id)
        table.block_ids.clear()
        table.num_cached_blocks = 0
        table.cacheable = True

    def reset_cache(self) -> bool:
        """Forget every idle block. True if nothing is cached any more."""
        for block_id in list(self._idle):
            self._forget(block_id)
            self._free.append(block_id)
        self._idle.clear()
        self._events.append(BlocksCleared())
        self._events.extend(self.snapshot())
        return not self._by_hash

    def take_events(self) -> list[KvEvent]:
        """What changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def snapshot(self) -> list[KvEvent]:
        """All cached content as events, parents before their children; long runs in one event."""
        runs: list[BlocksStored] = []
        run_ending_in: dict[BlockHash | None, BlocksStored] = {}
        # _by_hash keeps the order of insertion, and a block is cached after its parent and forgotten before it.
        for block_hash, block_id in self._by_hash.items():
            parent = self._parent_hash(block_id)
            run = run_ending_in.pop(parent, None) if parent is not None else None
            if run is None:
                run = BlocksStored([], parent)
                runs.append(run)
            run.block_hashes.append(block_hash)
            run_ending_in[block_hash] = run
        return list[KvEvent](runs)

    def cached_hashes(self) -> Iterable[BlockHash]:
        return self._by_hash.keys()

    def _block_tokens(self, tokens: Tokens, index: int) -> bytes:
        size = self.block_size * BYTES_PER_TOKEN
        return bytes(tokens[index * size : (index + 1) * size])

    def _holds(self, block_id: int, table: BlockTable, tokens: Tokens, index: int, parent: int | None) -> bool:
        block = self._blocks[block_id]
        return (
            block.parent == parent and block.scope == table.scope and block.tokens == self._block_tokens(tokens, index)
        )

    def _parent_hash(self, block_id: int) -> BlockHash | None:
        parent = self._blocks[block_id].parent
        return None if parent is None else self._blocks[parent].block_hash

    def _append_new(self, table: BlockTable, count: int) -> None:
        for _ in range(count):
            block_id = self._free.popleft() if self._free else self._evict()
            self._blocks[block_id].num_refs = 1
            table.block_ids.append(block_id)

    def _commit_next(self, table: BlockTable, tokens: Tokens) -> None:
        index = table.num_cached_blocks
        own = table.block_ids[index]
        parent = table.block_ids[index - 1] if index else None
        existing = self._by_hash.get(table.hashes[index])
        if existing is None:
            self._store(own, table, tokens, index, parent)
        elif self._holds(existing, table, tokens, index, parent):
            self._ref(existing)
            table.block_ids[index] = existing
            self._unref(own)
        else:
            table.cacheable = False
            return
        table.num_cached_blocks += 1

    def _store(self, block_id: int, table: BlockTable, tokens: Tokens, index: int, parent: int | None) -> None:
        block = self._blocks[block_id]
        block.block_hash = table.hashes[index]
        block.tokens = self._block_tokens(tokens, index)
        block.parent = parent
        block.scope = table.scope
        self._by_hash[block.block_hash] = block_id
        parent_hash = self._parent_hash(block_id)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksStored) and parent_hash is not None and last.block_hashes[-1] == parent_hash:
            last.block_hashes.append(block.block_hash)
        else:
            self._events.append(BlocksStored([block.block_hash], parent_hash))

    def _ref(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.num_refs == 0:
            del self._idle[block_id]
        block.num_refs += 1

    def _unref(self, block_id: int) -> None:
        block = self._blocks[block_id]
        block.num_refs -= 1
        if block.num_refs:
            return
        if block.block_hash is None:
            self._free.append(block_id)
        else:
            self._idle[block_id] = None

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        block_hash = self._forget(block_id)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksRemoved):
            last.block_hashes.append(block_hash)
        else:
            self._events.append(BlocksRemoved([block_hash]))
        return block_id

    def _forget(self, block_id: int) -> BlockHash:
        block = self._blocks[block_id]
        block_hash = block.block_hash
        assert block_hash is not None, "only cached blocks are forgotten"
        del self._by_hash[block_hash]
        block.block_hash = None
        block.tokens = b""
        block.parent = None
        block.scope = None
        return block_hash
