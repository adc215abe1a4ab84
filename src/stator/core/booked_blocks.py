"""Blocks that workers are about to hold, because a request that has them was just sent there. Pure.

Workers announce blocks when they are computed. Until then a second request with the same prefix would find them
nowhere; with this it goes to the same worker when waiting for the first one's prefill is cheapest. Entries end after a
time, or at once when the request failed before its first token.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from stator.ids import InstanceId

MAX_ENTRIES = 200_000


class _Insertion(NamedTuple):
    expires_at: float
    instance_id: InstanceId
    hashes: Sequence[int]


class BookedBlocks:
    """At most max_entries (block, worker) pairs, the oldest insertions dropped first. Times as the caller's."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._by_hash: dict[int, dict[InstanceId, float]] = {}
        self._insertions: deque[_Insertion] = deque()
        self._num_inserted = 0

    @property
    def num_entries(self) -> int:
        return self._num_inserted

    def add(self, instance_id: InstanceId, hashes: Sequence[int], expires_at: float) -> None:
        """hashes: the request's chain from its first block on."""
        if not hashes or len(hashes) > self._max_entries:
            return
        for block_hash in hashes:
            holders = self._by_hash.setdefault(block_hash, {})
            holders[instance_id] = max(expires_at, holders.get(instance_id, 0.0))
        self._insertions.append(_Insertion(expires_at, instance_id, hashes))
        self._num_inserted += len(hashes)
        while self._num_inserted > self._max_entries:
            self._drop_oldest(expires_at)

    def revoke(self, instance_id: InstanceId, hashes: Sequence[int]) -> None:
        """They will not be computed. Takes along what another request booked there of the same blocks: too little is
        predicted then, which costs a choice and no wait."""
        for block_hash in hashes:
            self._remove(instance_id, block_hash)

    def drop_worker(self, instance_id: InstanceId) -> None:
        for insertion in self._insertions:
            if insertion.instance_id == instance_id:
                self.revoke(instance_id, insertion.hashes)

    def overlaps(self, hashes: Sequence[int], now: float) -> dict[InstanceId, int]:
        """Leading blocks of the chain that each worker will hold; workers with none are left out.

        A chain's hash commits to all before it, so a holder of a block was sent all blocks before: the last one is
        found by bisection.
        """
        self._expire(now)
        if not hashes or not (holders := self._by_hash.get(hashes[0])):
            return {}
        return {i: self._depth(i, hashes, now) for i, expires_at in holders.items() if expires_at > now}

    def _depth(self, instance_id: InstanceId, hashes: Sequence[int], now: float) -> int:
        low, high = 1, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            holders = self._by_hash.get(hashes[middle - 1])
            if holders is not None and holders.get(instance_id, 0.0) > now:
                low = middle
            else:
                high = middle - 1
        return low

    def _expire(self, now: float) -> None:
        # Insertions live about equally long; one that outlives those behind it only keeps them in memory a little.
        while self._insertions and self._insertions[0].expires_at <= now:
            self._drop_oldest(now)

    def _drop_oldest(self, now: float) -> None:
        insertion = self._insertions.popleft()
        self._num_inserted -= len(insertion.hashes)
        for block_hash in insertion.hashes:
            holders = self._by_hash.get(block_hash)
            # A later insertion may have prolonged it.
            if holders is not None and holders.get(insertion.instance_id, 0.0) <= max(now, insertion.expires_at):
                self._remove(insertion.instance_id, block_hash)

    def _remove(self, instance_id: InstanceId, block_hash: int) -> None:
        holders = self._by_hash.get(block_hash)
        if holders is not None:
            holders.pop(instance_id, None)
            if not holders:
                del self._by_hash[block_hash]
