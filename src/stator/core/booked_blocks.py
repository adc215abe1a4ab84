"""Blocks that workers are about to hold, because a request that has them was just sent there. Pure.

Workers announce blocks when they are computed. Until then a second request with the same prefix would find them
nowhere; with this it goes to the same worker when waiting for the first one's prefill is cheapest. Entries end after a
time, or at once when the request failed before its first token.
"""

from collections import deque
from collections.abc import Mapping, Sequence
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
        self._by_instance: dict[InstanceId, dict[int, float]] = {}
        self._insertions: deque[_Insertion] = deque()
        self._num_inserted = 0

    @property
    def num_entries(self) -> int:
        return self._num_inserted

    def add(self, instance_id: InstanceId, hashes: Sequence[int], expires_at: float) -> None:
        """hashes: the request's chain from its first block on."""
        if not hashes or len(hashes) > self._max_entries:
            return
        # A whole prompt in two calls: a loop over its blocks would be the most expensive part of a decision.
        self._by_instance.setdefault(instance_id, {}).update(dict.fromkeys(hashes, expires_at))
        self._insertions.append(_Insertion(expires_at, instance_id, hashes))
        self._num_inserted += len(hashes)
        while self._num_inserted > self._max_entries:
            self._drop_oldest(expires_at)

    def revoke(self, instance_id: InstanceId, hashes: Sequence[int]) -> None:
        """They will not be computed. Takes along what another request booked there of the same blocks: too little is
        predicted then, which costs a choice and no wait."""
        blocks = self._by_instance.get(instance_id, {})
        for block_hash in hashes:
            blocks.pop(block_hash, None)

    def drop_worker(self, instance_id: InstanceId) -> None:
        self._by_instance.pop(instance_id, None)

    def overlaps(self, hashes: Sequence[int], held: Mapping[InstanceId, int], now: float) -> dict[InstanceId, int]:
        """Leading blocks of the chain that workers will hold beyond those that they hold; others are left out.

        A chain's hash commits to all before it, so whoever was sent a block was sent all blocks before: the last one
        is found by bisection.
        """
        self._expire(now)
        found: dict[InstanceId, int] = {}
        num_blocks = len(hashes)
        for instance_id, blocks in self._by_instance.items():
            depth = held.get(instance_id, 0)
            if depth < num_blocks and blocks.get(hashes[depth], 0.0) > now:
                found[instance_id] = _last_booked(blocks, hashes, depth + 1, now)
        return found

    def _expire(self, now: float) -> None:
        # Insertions live about equally long; one that outlives those behind it only keeps them in memory a little.
        while self._insertions and self._insertions[0].expires_at <= now:
            self._drop_oldest(now)

    def _drop_oldest(self, now: float) -> None:
        expires_at, instance_id, hashes = self._insertions.popleft()
        self._num_inserted -= len(hashes)
        blocks = self._by_instance.get(instance_id)
        if blocks is None:
            return
        now = max(now, expires_at)
        for block_hash in hashes:
            # A later insertion may have prolonged it.
            if blocks.get(block_hash, now + 1.0) <= now:
                del blocks[block_hash]
        if not blocks:
            del self._by_instance[instance_id]


def _last_booked(blocks: Mapping[int, float], hashes: Sequence[int], low: int, now: float) -> int:
    """low: a depth that is booked."""
    high = len(hashes)
    while low < high:
        middle = (low + high + 1) // 2
        if blocks.get(hashes[middle - 1], 0.0) > now:
            low = middle
        else:
            high = middle - 1
    return low
