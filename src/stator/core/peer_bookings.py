"""What routers of one deployment tell each other of their bookings, and how old what they know is. Pure.

Times are milliseconds of one monotonic clock each; two routers' clocks have nothing to do with each other.

Rules:

- A router tells what changes in its own bookings, numbered, and at least every HEARTBEAT_MS how many are open. The
  first items of a stream are its whole state. A number that is missing, or a count that differs, makes the view
  useless: a new stream begins with the whole state again. Nothing else is ever repaired.
- A view that nothing was heard of for FORGET_MS counts for nothing: state older than that misleads more than none, and
  the workers' reports, which count everybody's requests, are younger. It is complete again with the first item, as
  long as its stream lasts. A router whose lease has ended is forgotten altogether.
- The *lag* of a view is by how much it may be behind: half a round trip, what the last items were late by beyond the
  quickest one, and how long an overdue item has been overdue.
- The more the slowest view lags, the fewer candidates a decision looks at (`draw_candidates`): routers that take the
  least of the same stale costs would all take the same worker.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from random import Random
from typing import Protocol

from stator.ids import InstanceId
from stator.messages.routing import BookingChanges, PeerBooking

HEARTBEAT_MS = 50.0
FORGET_MS = 1000.0

FRESH_MS = 20.0
"""Up to this lag every worker is looked at."""

STALE_MS = 200.0
MOST_RANDOM, LEAST_RANDOM = 8, 4
DEEPEST = 4
SMALLEST_SHARE = 4
"""Of a fleet of fewer than 16, a quarter of the workers stands for DEEPEST, and as many, two at least, for those drawn
at random: four and four of eight workers would be all of them, and no protection."""

MAX_HASHES = 2_048
"""Leading blocks of a prompt that peers are told; of a longer one they expect no more at its worker than these."""

SNAPSHOT_PART = 500
_LATE_FOR_MS = 300.0
_DRIFT = 1e-4
_NUM_ROUND_TRIPS = 8


class OthersBookings(Protocol):
    """Where a view puts them: `core.peer_load.PeersLoad`. The numbers are this router's."""

    def book_of_peer(self, booking: PeerBooking, at: float, now: float) -> int: ...

    def first_token_of_peer(self, number: int, now: float) -> None: ...

    def failed_of_peer(self, number: int) -> None: ...

    def release_of_peer(self, number: int, now: float) -> None: ...


@dataclass(slots=True)
class _Open:
    booking: PeerBooking
    at: float
    started: bool = False


class BookingLog:
    """Own bookings as others are told of them: what is open, and, while somebody follows, what has changed since the
    last `take`. on_change: called at the first change after it."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._followed = False
        self._open: dict[int, _Open] = {}
        self._booked: dict[int, None] = {}
        self._started: dict[int, None] = {}
        self._failed: dict[int, None] = {}
        self._ended: dict[int, None] = {}
        self._oldest: float | None = None
        self._sequence = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    def follow(self, followed: bool) -> None:
        """Whether anybody takes the changes. Without, only what is open is kept."""
        self._followed = followed
        self._clear()

    def booked(self, booking: PeerBooking, now: float) -> None:
        self._open[booking.number] = _Open(booking, now)
        self._changed(self._booked, booking.number, now)

    def started(self, number: int, now: float) -> None:
        if (known := self._open.get(number)) is not None and not known.started:
            known.started = True
            self._changed(self._started, number, now)

    def failed(self, number: int, now: float) -> None:
        if number in self._open:
            self._changed(self._failed, number, now)

    def ended(self, number: int, now: float) -> None:
        if self._open.pop(number, None) is None:
            return
        if number in self._booked:
            # Nobody has heard of it.
            for changes in (self._booked, self._started, self._failed):
                changes.pop(number, None)
            return
        self._started.pop(number, None)
        self._changed(self._ended, number, now)

    def take(self, now: float) -> BookingChanges:
        """What has changed, as the next item for every subscriber; perhaps nothing but the count."""
        self._sequence += 1
        changes = BookingChanges(
            sequence=self._sequence,
            at_ms=now if self._oldest is None else self._oldest,
            num_open=len(self._open),
            booked=[self._told(self._open[number], now) for number in self._booked],
            started=[number for number in self._started if number not in self._booked],
            failed=list(self._failed),
            ended=list(self._ended),
        )
        self._clear()
        return changes

    def snapshot(self, now: float) -> list[BookingChanges]:
        """The whole state, for one subscriber, as of the last `take`: call it when nothing has changed since."""
        assert self._oldest is None
        told = [self._told(known, now) for known in self._open.values()]
        parts = [told[first : first + SNAPSHOT_PART] for first in range(0, len(told), SNAPSHOT_PART)] or [[]]
        return [
            BookingChanges(
                sequence=self._sequence,
                at_ms=now,
                num_open=min(len(told), (number + 1) * SNAPSHOT_PART),
                booked=part,
                reset=number == 0,
                part=True,
            )
            for number, part in enumerate(parts)
        ]

    def _changed(self, changes: dict[int, None], number: int, now: float) -> None:
        if not self._followed:
            return
        changes[number] = None
        if self._oldest is None:
            self._oldest = now
            self.on_change()

    def _clear(self) -> None:
        for changes in (self._booked, self._started, self._failed, self._ended):
            changes.clear()
        self._oldest = None

    @staticmethod
    def _told(known: _Open, now: float) -> PeerBooking:
        booking = known.booking
        return PeerBooking(
            number=booking.number,
            instance_id=booking.instance_id,
            prefill_ms=booking.prefill_ms,
            work_ms=booking.work_ms,
            kv_tokens=booking.kv_tokens,
            prompt_tokens=booking.prompt_tokens,
            # Of a prompt that is computed the worker tells itself.
            block_hashes=[] if known.started else booking.block_hashes,
            expected_ms=booking.expected_ms,
            session_id=booking.session_id,
            age_ms=now - known.at,
            started=known.started,
        )


@dataclass(slots=True)
class _Lag:
    """Of one peer's items. offset: between the clocks, with the quickest delivery in it."""

    offset: float | None = None
    heard_at: float | None = None
    late_ms: float = 0.0
    late_at: float = 0.0
    round_trips: list[float] = field(default_factory=list[float])

    def heard(self, at_ms: float, now: float) -> float:
        """How late the item is beyond the quickest one."""
        delay = now - at_ms
        if self.offset is None or self.heard_at is None:
            self.offset = delay
        else:
            self.offset = min(delay, self.offset + _DRIFT * (now - self.heard_at))
        self.heard_at = now
        late = delay - self.offset
        self.late_ms, self.late_at = max(late, self._late(now)), now
        return late + self.half_round_trip_ms

    @property
    def half_round_trip_ms(self) -> float:
        return min(self.round_trips) / 2 if self.round_trips else 0.0

    def _late(self, now: float) -> float:
        return self.late_ms * math.exp((self.late_at - now) / _LATE_FOR_MS)

    def ms(self, now: float) -> float:
        if self.heard_at is None:
            return math.inf
        return self.half_round_trip_ms + max(self._late(now), now - self.heard_at - HEARTBEAT_MS)


class PeerView:
    """What this router knows of one other router's bookings, from the first item to `close`."""

    def __init__(self, into: OthersBookings) -> None:
        self._into = into
        self._lag = _Lag()
        self._sequence: int | None = None
        self._known: dict[int, tuple[int | None, PeerBooking, float]] = {}
        """By the peer's number: ours, unless it counts for nothing now; what it is; since when."""
        self._hidden = False

    @property
    def num_bookings(self) -> int:
        """That count."""
        return 0 if self._hidden else len(self._known)

    @property
    def whole(self) -> bool:
        """Whether a whole state was received, and nothing of it is missing."""
        return self._sequence is not None

    def lag_ms(self, now: float) -> float:
        """Infinite while nothing is known, or what is known is too old."""
        lag = self._lag.ms(now)
        return math.inf if lag >= FORGET_MS else lag

    def round_trip(self, ms: float) -> None:
        self._lag.round_trips.append(ms)
        del self._lag.round_trips[:-_NUM_ROUND_TRIPS]

    def receive(self, changes: BookingChanges, now: float) -> float | None:
        """How late its oldest change is known here, in ms; None: something is missing, and a new stream is needed."""
        if changes.reset:
            self._forget_all(now)
            self._sequence = changes.sequence
        elif self._sequence is None or changes.sequence != self._sequence + (0 if changes.part else 1):
            return self._useless(now)
        late = self._lag.heard(changes.at_ms, now)
        self._sequence = changes.sequence
        self._show(now)
        for booking in changes.booked:
            at = now - booking.age_ms - late
            self._known[booking.number] = (self._into.book_of_peer(booking, at, now), booking, at)
        for number in changes.started:
            self._started(number, now)
        for number in changes.failed:
            if (known := self._known.get(number)) is not None and known[0] is not None:
                self._into.failed_of_peer(known[0])
        for number in changes.ended:
            ours = self._known.pop(number, (None, None, 0.0))[0]
            if ours is not None:
                self._into.release_of_peer(ours, now)
        if changes.num_open != len(self._known):
            return self._useless(now)
        return late

    def lost(self) -> None:
        """Its stream has ended; what is known stays until it is too old, or the next stream's state replaces it."""
        self._sequence = None

    def tick(self, now: float) -> None:
        """Call it now and then."""
        heard_at = self._lag.heard_at
        if not self._hidden and heard_at is not None and now - heard_at >= FORGET_MS:
            self._hidden = True
            for number, (ours, booking, at) in self._known.items():
                if ours is not None:
                    self._into.release_of_peer(ours, now)
                self._known[number] = (None, booking, at)

    def close(self, now: float) -> None:
        """The peer is gone."""
        self._forget_all(now)
        self._sequence = None

    def _started(self, number: int, now: float) -> None:
        known = self._known.get(number)
        if known is None:
            return
        ours, booking, at = known
        if ours is not None:
            self._into.first_token_of_peer(ours, now)
        self._known[number] = (ours, started_booking(booking), at)

    def _show(self, now: float) -> None:
        if not self._hidden:
            return
        self._hidden = False
        for number, (_, booking, at) in self._known.items():
            self._known[number] = (self._into.book_of_peer(booking, at, now), booking, at)

    def _useless(self, now: float) -> None:
        self._sequence = None
        self.tick(now)

    def _forget_all(self, now: float) -> None:
        for ours, _, _ in self._known.values():
            if ours is not None:
                self._into.release_of_peer(ours, now)
        self._known.clear()
        self._hidden = False


def started_booking(booking: PeerBooking) -> PeerBooking:
    return PeerBooking(
        number=booking.number,
        instance_id=booking.instance_id,
        prefill_ms=booking.prefill_ms,
        work_ms=booking.work_ms,
        kv_tokens=booking.kv_tokens,
        prompt_tokens=booking.prompt_tokens,
        session_id=booking.session_id,
        started=True,
    )


def num_drawn(num_workers: int, lag_ms: float) -> tuple[int, int] | None:
    """(with the deepest overlaps, at random) of the workers that a decision looks at; None: all of them."""
    if lag_ms <= FRESH_MS:
        return None
    share = num_workers // SMALLEST_SHARE
    staleness = min(1.0, (lag_ms - FRESH_MS) / (STALE_MS - FRESH_MS))
    at_random = round(MOST_RANDOM - (MOST_RANDOM - LEAST_RANDOM) * staleness)
    return min(DEEPEST, max(1, share)), min(at_random, max(2, share))


def draw_candidates(
    workers: Sequence[InstanceId],
    overlaps: Mapping[InstanceId, int],
    lag_ms: float,
    rng: Random,
    *,
    session: InstanceId | None = None,
) -> set[InstanceId] | None:
    """The workers to look at with a view that lags so far, the session's among them; None: all of them.

    overlaps: leading blocks of the prompt at each.
    """
    drawn = num_drawn(len(workers), lag_ms)
    if drawn is None or sum(drawn) >= len(workers):
        return None
    deepest, at_random = drawn
    holding = [worker for worker in workers if overlaps.get(worker)]
    chosen = nlargest(deepest, holding, key=overlaps.__getitem__)
    taken = set(chosen)
    rest = [worker for worker in workers if worker not in taken]
    taken.update(rng.sample(rest, min(at_random, len(rest))))
    if session is not None and session in workers:
        taken.add(session)
    return taken
