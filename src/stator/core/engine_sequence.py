"""In which order an engine rank's numbered batches of KV events are applied, when some get lost or come twice.

Batches come from two sources: as they are published, where any number of them may be missing, and as a replay of what
the publisher still keeps, asked for from the last batch that was applied (or from 0). Rules:

- A published number that is the next one is applied. One that a replay brought already is dropped. A higher one means
  a gap: replay. One that is not higher than the last published means that the publisher started again at 0.
- A replay must begin with the batch that was applied last, byte for byte. Otherwise the publisher is another one (an
  engine that started again and has come further), or keeps that batch no more: what lies between is lost.
- Where nothing was applied yet, a replay may begin anywhere: what is missing before it is missed for good, and only
  makes that fewer blocks are known.
"""

from enum import Enum

import xxhash


class Step(Enum):
    """APPLY: it is the next. SKIP: it was had, or is the one to compare with. GAP: batches before it are missing.
    LOST: what was applied so far is of no use any more."""

    APPLY = 0
    SKIP = 1
    GAP = 2
    LOST = 3


class BatchSequence:
    """Where one reader stands. After APPLY the batch counts as applied."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._fingerprint = 0
        self._last_published = -1
        self._confirmed = False

    @property
    def last(self) -> int | None:
        """Number of the batch applied last."""
        return self._last

    def begin_replay(self) -> int:
        """The number to ask a replay from; what comes must be compared anew."""
        self._confirmed = False
        return 0 if self._last is None else self._last

    def published(self, number: int, payload: bytes) -> Step:
        if number <= self._last_published:
            return Step.LOST
        self._last_published = number
        expected = 0 if self._last is None else self._last + 1
        if number < expected:
            return Step.SKIP
        return self._apply(number, payload) if number == expected else Step.GAP

    def replayed(self, number: int, payload: bytes) -> Step:
        if self._last is None:
            return self._apply(number, payload)
        if number == self._last:
            self._confirmed = xxhash.xxh3_64_intdigest(payload) == self._fingerprint
            return Step.SKIP if self._confirmed else Step.LOST
        if not self._confirmed:
            return Step.LOST
        return self._apply(number, payload) if number == self._last + 1 else Step.GAP

    def replay_ended(self) -> Step:
        """SKIP if the replay reached from the last applied batch to now, else LOST."""
        return Step.SKIP if self._confirmed or self._last is None else Step.LOST

    def accept(self, number: int, payload: bytes) -> None:
        """No replay can give what is before this published batch: it counts as applied."""
        self._last_published = number
        self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> Step:
        self._last = number
        self._fingerprint = xxhash.xxh3_64_intdigest(payload)
        self._confirmed = True
        return Step.APPLY
