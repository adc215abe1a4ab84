"""Which worker holds which block: chained block hash -> bitmask of holders, for all workers of a deployment.

A *holder* is one worker's set of blocks. It owns one bit position of the masks for as long as it lives. Rules:

- A hidden holder (just added) is filled without being seen by lookups, until `show` or `replace`: that is how a
  snapshot is swapped in whole.
- The death of a holder, or its `clear`, costs O(1): its position is retired, which lookups mask out. Bits of retired
  positions stay in the table until `clean`, called now and then with a budget, has gone over it once; then the
  positions are used again.
- `overlaps` counts *leading* blocks. A chained hash commits to all blocks before it, so a holder of block k normally
  holds those before it too, and the depths are found by galloping: O(drop-outs x log n) probes. Where a holder may have
  holes (`set_closed` was not told otherwise, or an entry of its was dropped because the table was full), its depth is
  found by going through the blocks one by one. The answer is exact in both cases; only the cost differs.
- The table has at most max_entries. When it is full, the entries that were least recently asked for are dropped
  (second chance: lookups mark what they matched, once the table is nearly full) and counted. Overlaps are then too
  small, never too large.
- The table is cut into shards, so that no call ever moves or walks more than a small part of it.

Cost and memory: benchmarks/prefix_index.py. Source of the design: docs/design/kv-index.md.
"""

import heapq
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Generic, TypeVar, cast

K = TypeVar("K", bound=Hashable)

NUM_SHARDS = 256
"""A power of two; hash & 255 is one of CPython's small integers, so that finding the shard allocates nothing."""

SHARD_MASK = NUM_SHARDS - 1
TOUCHED = 1
"""Position 0 of every mask belongs to nobody: it says that a lookup matched the entry since the last pass."""

DEFAULT_MAX_ENTRIES = 8_000_000
MAX_INTERNED = 65_536
FEW_HOLDERS = 24
MAX_ANSWERS = 256
KEY_BYTES = 48
"""What CPython allocates for a 64-bit integer."""

_BITS_TO_FLAGS = bytes(1 if byte == ord("1") else 0 for byte in range(256))


@dataclass(slots=True, eq=False)
class Holder(Generic[K]):
    """A handle on one worker's set of blocks; changed by its PrefixIndex only. bit 0: it was dropped."""

    name: K
    position: int
    bit: int


class PrefixIndex(Generic[K]):
    """K: what holders are called in answers; shown holders must have different names. Not thread-safe.

    stride: the table is fed the hashes at positions stride-1, 2*stride-1, ... of their sequences only, and overlaps are
    rounded down to it.
    """

    def __init__(self, *, stride: int = 1, max_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        if stride < 1 or max_entries < 1:
            raise ValueError(f"stride and max_entries must be positive, got {stride} and {max_entries}")
        self.stride = stride
        self.max_entries = max_entries
        self.num_dropped = 0
        self._shards: list[dict[int, int]] = [{} for _ in range(NUM_SHARDS)]
        self._interned: dict[int, int] = {}
        # By position. Nobody has position 0, and nobody asks for the name of a position that is free.
        self._names: list[K] = [cast("K", None)]
        self._answers: dict[tuple[int, int], dict[K, int]] = {}
        self._free: list[int] = []
        self._retired: list[int] = []
        self._sweeping: list[int] = []
        self._sweep_shard = 0
        self._sweep_keys: list[int] = []
        self._live = 0
        self._shown = 0
        self._closed = 0
        self._holed = 0
        self._room = 0
        self._nearly_full = False
        self._drop_shard = 0

    # Holders.

    def add(self, name: K) -> Holder[K]:
        """A new, empty, hidden holder."""
        holder = Holder(name, 0, 0)
        self._place(holder)
        return holder

    def show(self, holder: Holder[K]) -> None:
        """Lookups see it from now on."""
        self._shown |= self._bit(holder)

    def replace(self, holder: Holder[K], by: Holder[K]) -> None:
        """At once: drop holder, show `by`. O(1)."""
        bit = self._bit(by)
        self.drop(holder)
        self._shown |= bit

    def drop(self, holder: Holder[K]) -> None:
        """The holder is gone with all its blocks. O(1), idempotent."""
        if holder.bit:
            self._retire(holder)

    def clear(self, holder: Holder[K]) -> None:
        """It holds nothing any more, and may store again. O(1)."""
        bit = self._bit(holder)
        shown, closed = bool(self._shown & bit), bool(self._closed & bit)
        self._retire(holder)
        self._place(holder)
        if shown:
            self._shown |= holder.bit
        if closed:
            self._closed |= holder.bit

    def set_closed(self, holder: Holder[K], closed: bool) -> None:
        """A promise by who feeds the holder: for each block it holds, it holds the blocks before it too. Until it is
        taken back, lookups may gallop over its blocks. False for a new holder."""
        if closed:
            self._closed |= self._bit(holder)
        else:
            self._closed &= ~self._bit(holder)

    # Blocks.

    def store(self, holder: Holder[K], hashes: Sequence[int]) -> None:
        """It holds these blocks too. Storing what it holds changes nothing."""
        bit = self._bit(holder)
        if self._room < len(hashes):
            hashes = self._make_room(holder, hashes)
        self._room -= len(hashes)
        shards = self._shards
        interned = self._interned
        if len(interned) > MAX_INTERNED:
            interned.clear()
        # Neighbours mostly have the same holders, in the same interned object.
        before = after = bit
        for block_hash in hashes:
            shard = shards[block_hash & SHARD_MASK]
            mask = shard.setdefault(block_hash, bit)
            if mask is bit:
                continue
            if mask is before:
                shard[block_hash] = after
            elif not mask & bit:
                before, after = mask, mask | bit
                shard[block_hash] = after = interned.setdefault(after, after)

    def remove(self, holder: Holder[K], hashes: Sequence[int]) -> None:
        """It does not hold these blocks any more. Removing what it does not hold changes nothing."""
        bit = self._bit(holder)
        shards = self._shards
        interned = self._interned
        live = self._live
        before, after = bit, 0
        for block_hash in hashes:
            shard = shards[block_hash & SHARD_MASK]
            mask = shard.get(block_hash, 0)
            if mask is not before:
                if not mask & bit:
                    continue
                before, after = mask, mask ^ bit
                after = interned.setdefault(after, after) if after & live else 0
            if after:
                shard[block_hash] = after
            else:
                del shard[block_hash]

    def holds(self, holder: Holder[K], block_hash: int) -> bool:
        return bool(self._shards[block_hash & SHARD_MASK].get(block_hash, 0) & self._bit(holder))

    # Lookups.

    def overlaps(self, hashes: Sequence[int]) -> dict[K, int]:
        """Leading blocks of a prompt that each shown holder has, by name; only those with at least one.

        hashes: chained hashes of all the prompt's full blocks, first block first (all of them, for any stride).
        """
        stride = self.stride
        if stride > 1:
            hashes = hashes[stride - 1 :: stride]
        if not hashes:
            return {}
        holders = self._shards[hashes[0] & SHARD_MASK].get(hashes[0], 0) & self._shown
        if not holders:
            return {}
        tight = self._closed & ~self._holed
        result = self._gallop(hashes, holders & tight, {})
        if holders & ~tight:
            result = self._walk(hashes, holders & ~tight, result)
        if self._nearly_full:
            self._touch(hashes[: max(result.values()) // stride])
        return result

    def _gallop(self, hashes: Sequence[int], holders: int, result: dict[K, int]) -> dict[K, int]:
        """holders: a non-strict subset of those of the first block, none of which has holes."""
        shards = self._shards
        num_hashes = len(hashes)
        depth = 1
        while holders:
            # All holders have hashes[:depth]. Gallop to where some have not, then bisect.
            low, high, step = depth, depth + 1, 1
            while low < num_hashes:
                probe = min(low + step, num_hashes)
                block_hash = hashes[probe - 1]
                if shards[block_hash & SHARD_MASK].get(block_hash, 0) & holders != holders:
                    high = probe
                    break
                low = probe
                high = low + 1
                step *= 2
            while high - low > 1:
                probe = (low + high) // 2
                block_hash = hashes[probe - 1]
                if shards[block_hash & SHARD_MASK].get(block_hash, 0) & holders != holders:
                    high = probe
                else:
                    low = probe
            stayers = 0
            if low < num_hashes:
                block_hash = hashes[low]
                stayers = shards[block_hash & SHARD_MASK].get(block_hash, 0) & holders
            result = self._report(holders, stayers, low, result)
            holders = stayers
            depth = low + 1
        return result

    def _walk(self, hashes: Sequence[int], holders: int, result: dict[K, int]) -> dict[K, int]:
        """The same for holders of the first block that may have holes."""
        shards = self._shards
        for depth in range(1, len(hashes)):
            block_hash = hashes[depth]
            stayers = shards[block_hash & SHARD_MASK].get(block_hash, 0) & holders
            if stayers != holders:
                result = self._report(holders, stayers, depth, result)
                holders = stayers
                if not holders:
                    return result
        return self._report(holders, 0, len(hashes), result)

    def _report(self, holders: int, stayers: int, depth: int, result: dict[K, int]) -> dict[K, int]:
        """Add those of holders that are no stayers, and perhaps stayers too: they are reported again, deeper."""
        leavers = holders ^ stayers
        num_blocks = depth * self.stride
        num_leavers = leavers.bit_count()
        if num_leavers > FEW_HOLDERS:
            # The holders of a popular prefix are the same from lookup to lookup, those that leave it are not.
            many = holders if 2 * num_leavers >= holders.bit_count() else leavers
            found = self._answer(many, num_blocks)
            return result | found if result else found.copy()
        names = self._names
        while leavers:
            lowest = leavers & -leavers
            leavers ^= lowest
            result[names[lowest.bit_length() - 1]] = num_blocks
        return result

    def _answer(self, holders: int, num_blocks: int) -> dict[K, int]:
        """All of them with this many blocks; not to be changed."""
        answer = self._answers.get((holders, num_blocks))
        if answer is None:
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            flags = format(holders, "b")[::-1].encode().translate(_BITS_TO_FLAGS)
            answer = self._answers[holders, num_blocks] = dict.fromkeys(compress(self._names, flags), num_blocks)
        return answer

    # Room.

    @property
    def num_entries(self) -> int:
        """Distinct blocks in the table, those of retired holders included until `clean` has met them."""
        return sum(map(len, self._shards))

    @property
    def num_holders(self) -> int:
        return self._live.bit_count()

    @property
    def memory_bytes(self) -> int:
        """Estimate of what the table takes: dictionaries, keys, distinct masks, and answers kept to be copied."""
        tables = sum(map(sys.getsizeof, self._shards)) + sys.getsizeof(self._interned)
        tables += sum(map(sys.getsizeof, self._answers.values()))
        mask_bytes = sys.getsizeof(self._live) if self._live else 0
        return tables + self.num_entries * KEY_BYTES + (len(self._interned) + self.num_holders) * mask_bytes

    @property
    def needs_cleaning(self) -> bool:
        return bool(self._retired or self._sweeping)

    def clean(self, budget: int = 2048) -> bool:
        """Look at about `budget` entries for bits of retired holders. Returns whether there is more to do."""
        if not self._sweeping:
            if not self._retired:
                return False
            self._sweeping, self._retired = self._retired, []
            self._sweep_shard = 0
        while budget > 0:
            if self._sweep_keys:
                budget -= self._sweep_some(budget)
            elif self._sweep_shard < NUM_SHARDS:
                self._sweep_keys = list(self._shards[self._sweep_shard])
                self._sweep_shard += 1
                budget -= 1
            else:
                for position in self._sweeping:
                    heapq.heappush(self._free, position)
                self._sweeping = []
                return bool(self._retired)
        return True

    def _sweep_some(self, budget: int) -> int:
        shard = self._shards[self._sweep_shard - 1]
        keys = self._sweep_keys[-budget:]
        del self._sweep_keys[-budget:]
        live = self._live
        dead = sum(1 << position for position in self._sweeping)
        for key in keys:
            mask = shard.get(key, 0)
            if not mask & dead:
                continue
            if mask & live:
                mask &= live | TOUCHED
                shard[key] = self._interned.setdefault(mask, mask)
            else:
                del shard[key]
        return len(keys)

    def _make_room(self, holder: Holder[K], hashes: Sequence[int]) -> Sequence[int]:
        """Drop entries until these fit. Returns those that are to be stored: no more than the table holds at all."""
        if len(hashes) > self.max_entries:
            self.num_dropped += len(hashes) - self.max_entries
            hashes = hashes[: self.max_entries]
            self._holed |= holder.bit
        num_entries = self.num_entries
        excess = num_entries + len(hashes) - self.max_entries
        if excess > 0:
            # A little more than needed, so that the entries are not counted again for every batch.
            excess = min(num_entries, excess + min(self.max_entries // 64, 1024))
            self._drop_entries(excess)
            num_entries -= excess
        # Looked at again after an eighth at the latest, to learn in time that the table is nearly full.
        self._room = max(len(hashes), min(self.max_entries - num_entries, self.max_entries // 8))
        self._nearly_full = num_entries + len(hashes) > self.max_entries * 3 // 4
        return hashes

    def _drop_entries(self, count: int) -> None:
        chances = 4 * count
        while count:
            self._drop_shard = (self._drop_shard + 1) & SHARD_MASK
            shard = self._shards[self._drop_shard]
            if not shard:
                continue
            oldest = next(iter(shard))
            mask = shard.pop(oldest)
            if mask & TOUCHED and mask & self._live and chances:
                chances -= 1
                mask ^= TOUCHED
                shard[oldest] = self._interned.setdefault(mask, mask)
                continue
            count -= 1
            if mask & self._live:
                self.num_dropped += 1
                self._holed |= mask & self._live

    def _touch(self, hashes: Sequence[int]) -> None:
        for block_hash in hashes:
            shard = self._shards[block_hash & SHARD_MASK]
            mask = shard.get(block_hash, TOUCHED)
            if not mask & TOUCHED:
                mask |= TOUCHED
                shard[block_hash] = self._interned.setdefault(mask, mask)

    # Positions.

    def _bit(self, holder: Holder[K]) -> int:
        if not holder.bit:
            raise ValueError(f"{holder.name} was dropped from the index")
        return holder.bit

    def _place(self, holder: Holder[K]) -> None:
        if self._free:
            position = heapq.heappop(self._free)
            self._names[position] = holder.name
            # Masks with this position in them meant who had it before.
            self._answers.clear()
        else:
            position = len(self._names)
            self._names.append(holder.name)
        holder.position = position
        holder.bit = 1 << position
        self._live |= holder.bit

    def _retire(self, holder: Holder[K]) -> None:
        others = ~holder.bit
        self._live &= others
        self._shown &= others
        self._closed &= others
        self._holed &= others
        self._retired.append(holder.position)
        holder.bit = 0
