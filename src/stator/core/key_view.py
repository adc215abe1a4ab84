"""What a watcher of keys takes for true while the server that told it is away, or has come back without its state.

Rules:

- The last view stays for as long as the server is away.
- A whole state (`reset`) from the server of before, the same *epoch*, replaces the view: what is missing is gone.
- A whole state from another epoch says nothing of keys that were bound to a lease: their holders live by their own and
  are about to put them again. Such a key is *kept* until it is put again, deleted, or for grace_s after the whole state
  arrived. Keys without a lease are gone with the state; nobody will put them again.
- A whole state of the new epoch that comes during the grace (the connection was lost once more) ends what it had
  confirmed and misses now, and leaves the grace of the others alone. Yet another epoch starts the grace anew.

What is put again with the same value is told to the watcher as a put: it can see for itself that nothing changed.
"""

from stator.core.key_store import KeyValue, WatchBatch


class KeyView:
    """grace_s: longer than holders need to notice another epoch and to put their keys again."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._epoch: int | None = None
        self._confirmed: dict[str, KeyValue] = {}
        self._kept: dict[str, KeyValue] = {}
        self._kept_until = 0.0

    @property
    def next_deadline(self) -> float | None:
        """When to call `tick`; None while nothing is kept."""
        return self._kept_until if self._kept else None

    def receive(self, batch: WatchBatch, epoch: int, now: float) -> WatchBatch:
        """The batch as the watcher shall see it."""
        if batch.reset:
            return self._reset(batch, epoch, now)
        for key in batch.deletes:
            self._confirmed.pop(key, None)
            self._kept.pop(key, None)
        for entry in batch.puts:
            self._confirmed[entry.key] = entry
            self._kept.pop(entry.key, None)
        return batch

    def tick(self, now: float) -> WatchBatch | None:
        """The end of what was kept for long enough, in one change."""
        if not self._kept or now < self._kept_until:
            return None
        deletes = sorted(self._kept)
        self._kept.clear()
        return WatchBatch(deletes=deletes)

    def _reset(self, batch: WatchBatch, epoch: int, now: float) -> WatchBatch:
        state = {entry.key: entry for entry in batch.puts}
        if self._epoch not in (None, epoch):
            self._kept.update((key, entry) for key, entry in self._confirmed.items() if entry.lease_id is not None)
            self._kept_until = now + self._grace_s
        self._epoch = epoch
        self._confirmed = state
        self._kept = {key: entry for key, entry in self._kept.items() if key not in state}
        if not self._kept:
            return batch
        both = {**self._kept, **state}
        return WatchBatch(puts=[both[key] for key in sorted(both)], reset=True)
