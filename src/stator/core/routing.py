"""Which decode instance a request goes to. Pure: the instances, the open bookings and a random source are its state.

A booking is made with the choice, so that a burst of requests sees each other's load at once, and is released when
the Processor's call ends. Modes: `kv` takes the least predicted cost (`core.cost`), `round-robin` the instances in
turn, `random` any, `least-loaded` the one with the smallest share of its capacity booked (ties: fewer booked prompt
tokens, then random). All modes see the same candidates: ready instances of the model, less the excluded ones; if only
excluded ones are left they are used again, since a second try on a recovered instance beats a refusal.

In `kv` mode the instance that had a session's last request is preferred by AFFINITY of what the whole prompt's prefill
costs, and a block's: enough to decide between equals, not enough to wait for. Costs that differ by less than the
prefill of a part of a block are taken as equal: the prediction is no better than that. Of equals the one with least
load is taken, then the one with least work in the last while, then any.

`admit` decides with an eye on room (`core.worker_load`): it places a request only where there is some. An instance
without is worth waiting for, in `kv` mode, when its cost and the wait for a place there come to less than the best cost
among those with room; the other modes pass over instances without room.

Other routers' bookings count like own ones. `peer_lag_ms` says how old they may be: with it, the modes that go by load
look at a part of the candidates only (`core.peer_bookings`), and at all if none of those has room.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Protocol

from stator.core.admission import FIRST, Line, Need
from stator.core.booked_blocks import BookedBlocks
from stator.core.candidates import Candidate, Overlap, Overlaps, Rooms, Row, Scores
from stator.core.instance_speed import InstanceSpeeds
from stator.core.overlap_check import OverlapCheck
from stator.core.peer_bookings import MAX_HASHES, draw_candidates
from stator.core.peer_load import PeersLoad
from stator.core.routing_memory import OutputLengths, Sessions
from stator.core.worker_load import WorkerLoad
from stator.ids import InstanceId
from stator.messages.processor import RouteRequest
from stator.messages.routing import CandidateTerms, PeerBooking

NEARLY_EQUAL = 0.5
"""Of a block's prefill: less than what one more cached block is worth, so that no overlap is given up for a tie."""

AS_PREDICTED_TOKENS = 128
"""A first token tells of an instance's speed if its prompt was cached as far as predicted, give or take so many."""

BOOKED_MS = 500.0
"""Booked blocks stay for twice the predicted time to first token and that long: events take their time."""


class RouterMode(StrEnum):
    KV = "kv"
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    LEAST_LOADED = "least-loaded"


@dataclass(slots=True)
class Choice:
    """cost_ms: the winner's, as predicted; other modes than `kv` do not decide by it. num_candidates: how many there
    were. rows: the MAX_EXPLAINED cheapest, the winner among them; `candidates` says what they cost."""

    winner: InstanceId
    mode: RouterMode
    booking: int
    overlap: Overlap
    cost_ms: float
    num_candidates: int
    expected_output_tokens: int
    rows: tuple[Row, ...]

    def candidates(self) -> list[CandidateTerms]:
        return [row.terms() for row in self.rows]


@dataclass(slots=True)
class NoRoom:
    """Nothing was booked. waits_for: where the request is expected to fit first, or what is worth waiting for.
    by_choice: there was room elsewhere."""

    waits_for: InstanceId
    need: Need
    by_choice: bool = False


@dataclass(slots=True)
class Booking:
    """An open one. first_token_ms: predicted for an instance of usual speed. cached_tokens: that it was predicted
    with."""

    winner: InstanceId
    request: RouteRequest
    at: float
    first_token_ms: float
    cached_tokens: float
    started: bool = False


class BookingListener(Protocol):
    """Told of this router's own bookings: `core.peer_bookings.BookingLog`."""

    def booked(self, booking: PeerBooking, now: float) -> None: ...

    def started(self, number: int, now: float) -> None: ...

    def failed(self, number: int, now: float) -> None: ...

    def ended(self, number: int, now: float) -> None: ...


class RoutingCore:
    """One router's decisions. Not thread-safe; every method is a plain state change. Times are milliseconds of one
    monotonic clock.

    others: takes the bookings of other routers. peer_lag_ms: set by the caller before decisions; 0 for a router that
    has no peers. listener: see BookingListener.
    """

    def __init__(self, mode: RouterMode, rng: Random, listener: BookingListener | None = None) -> None:
        self.mode = mode
        self.peer_lag_ms = 0.0
        self._listener = listener
        self.check = OverlapCheck()
        self.speeds = InstanceSpeeds()
        self._rng = rng
        self._last: InstanceId | None = None
        self._num_bookings = 0
        self._open: dict[int, Booking] = {}
        self._loads: dict[InstanceId, WorkerLoad] = {}
        self._booked_blocks = BookedBlocks()
        self._sessions = Sessions()
        self._lengths = OutputLengths()
        blocks = self._booked_blocks if mode is RouterMode.KV else None
        self.others = PeersLoad(self._loads, blocks, self._sessions)

    def set_mode(self, mode: RouterMode) -> None:
        """Open bookings stay as they are. Booked blocks count in mode kv only, and begin anew."""
        if mode is not self.mode:
            self.mode = mode
            self._booked_blocks = BookedBlocks()
            self.others.blocks = self._booked_blocks if mode is RouterMode.KV else None

    @property
    def num_bookings(self) -> int:
        """This router's own."""
        return len(self._open)

    @property
    def num_booked_blocks(self) -> int:
        return self._booked_blocks.num_entries

    def load(self, instance_id: InstanceId) -> WorkerLoad:
        load = self._loads.get(instance_id)
        if load is None:
            load = self._loads[instance_id] = WorkerLoad()
        else:
            self.others.seen(instance_id)
        return load

    def choose(
        self,
        request: RouteRequest,
        candidates: Sequence[Candidate],
        now: float,
        *,
        held: Mapping[InstanceId, int] | None = None,
        stale: Container[InstanceId] = (),
    ) -> Choice | None:
        """Pick and book. None if there is no candidate. Call `release` with the booking exactly once.

        held: leading blocks of the prompt at each instance. stale: instances for which that may be out of date.
        """
        choice = self._choose(request, candidates, now, held or {}, stale, None)
        assert not isinstance(choice, NoRoom)
        return choice

    def admit(
        self,
        request: RouteRequest,
        candidates: Sequence[Candidate],
        now: float,
        *,
        held: Mapping[InstanceId, int] | None = None,
        stale: Container[InstanceId] = (),
        line: Line = FIRST,
    ) -> Choice | NoRoom | None:
        """As `choose`, but only where there is room. line: of those that wait before it."""
        return self._choose(request, candidates, now, held or {}, stale, line)

    def _choose(
        self,
        request: RouteRequest,
        candidates: Sequence[Candidate],
        now: float,
        held: Mapping[InstanceId, int],
        stale: Container[InstanceId],
        line: Line | None,
    ) -> Choice | NoRoom | None:
        """line: None to choose without regard to room."""
        eligible = [c for c in candidates if c.instance_id not in request.exclude] or list(candidates)
        if not eligible:
            return None
        overlaps = self._overlaps(request, held, stale, now)
        looked_at = self._drawn(request, eligible, overlaps)
        found = self._choose_among(looked_at, len(eligible), request, overlaps, now, line)
        if isinstance(found, NoRoom) and len(looked_at) < len(eligible):
            found = self._choose_among(eligible, len(eligible), request, overlaps, now, line)
        return found

    def _choose_among(
        self,
        candidates: Sequence[Candidate],
        num_eligible: int,
        request: RouteRequest,
        overlaps: Overlaps,
        now: float,
        line: Line | None,
    ) -> Choice | NoRoom:
        expected = self._lengths.expected(request.model, request.max_tokens)
        scores = Scores(request, expected, overlaps, now, load_of=self.load, session=self.session_instance(request))
        totals = scores.totals(candidates)
        if line is None:
            winner = self._pick(candidates, totals, now)
        else:
            rooms = Rooms(request, expected, overlaps, now, load_of=self.load, line=line)
            picked = self._pick_with_room(candidates, totals, scores, rooms, now)
            if not isinstance(picked, Candidate):
                return NoRoom(picked[0], scores.need(candidates[0]), picked[1])
            winner = picked
        rows = scores.rows(candidates, totals, winner)
        overlap = overlaps.of(winner)
        self._book(request, winner, scores, overlap, now)
        return Choice(
            winner=winner.instance_id,
            mode=self.mode,
            booking=self._num_bookings,
            overlap=overlap,
            cost_ms=totals[candidates.index(winner)],
            num_candidates=num_eligible,
            expected_output_tokens=expected,
            rows=rows,
        )

    def _drawn(self, request: RouteRequest, eligible: Sequence[Candidate], overlaps: Overlaps) -> Sequence[Candidate]:
        """Of the eligible, those that a view of other routers as old as this one's may choose from."""
        if not self.peer_lag_ms or self.mode not in (RouterMode.KV, RouterMode.LEAST_LOADED):
            return eligible
        drawn = draw_candidates(
            [candidate.instance_id for candidate in eligible],
            overlaps.most,
            self.peer_lag_ms,
            self._rng,
            session=self.session_instance(request),
        )
        return eligible if drawn is None else [c for c in eligible if c.instance_id in drawn]

    def book_existing(self, request: RouteRequest, candidate: Candidate, now: float) -> int:
        """Book a request that runs at the candidate already, chosen by another router. Call `release` with the booking
        exactly once. Its tokens so far count as prompt."""
        expected = self._lengths.expected(request.model, request.max_tokens)
        scores = Scores(request, expected, Overlaps({}, {}, (), self.check), now, load_of=self.load, session=None)
        # What is computed already is no work ahead; what is not is taken for uncached, since nothing else is known.
        computed = request.num_prompt_tokens if request.started else 0
        self._book(request, candidate, scores, Overlap(0, 0, computed, 1.0), now)
        if request.started:
            self.first_token(self._num_bookings, now)
        return self._num_bookings

    def need(self, request: RouteRequest, candidates: Sequence[Candidate], now: float) -> Need:
        """What it takes of an instance, without regard to caches. candidates: at least one."""
        expected = self._lengths.expected(request.model, request.max_tokens)
        overlaps = Overlaps({}, {}, (), self.check)
        scores = Scores(request, expected, overlaps, now, load_of=self.load, session=None)
        return scores.need(candidates[0])

    def first_token(self, booking: int, now: float, num_cached_tokens: int | None = None) -> None:
        """Unknown bookings, those that were released, are ignored. num_cached_tokens: that the engine found in its own
        cache, if it computed the rest; None if that is not known."""
        if (known := self._open.get(booking)) is not None and not known.started:
            known.started = True
            if (load := self._loads.get(known.winner)) is None:
                return
            load.first_token(booking, now)
            if self._listener is not None:
                self._listener.started(booking, now)
            if num_cached_tokens is not None and abs(num_cached_tokens - known.cached_tokens) <= AS_PREDICTED_TOKENS:
                model, taken_ms = known.request.model, now - known.at
                self.speeds.observe(known.winner, model, known.first_token_ms, taken_ms, now)

    def failed(self, booking: int, now: float) -> None:
        """The request ended there before its first token: its blocks will not come."""
        if (known := self._open.get(booking)) is not None and not known.started:
            self._booked_blocks.revoke(known.winner, known.request.block_hashes)
            if self._listener is not None:
                self._listener.failed(booking, now)

    def finished(self, model: str, num_output_tokens: int) -> None:
        self._lengths.add(model, num_output_tokens)

    def release(self, booking: int, now: float) -> None:
        known = self._open.pop(booking, None)
        if known is None:
            return
        if self._listener is not None:
            self._listener.ended(booking, now)
        if (load := self._loads.get(known.winner)) is not None:
            load.release(booking, now)

    def drop_worker(self, instance_id: InstanceId) -> None:
        """It is gone. Bookings on it stay open until they are released, and count for nothing."""
        self._loads.pop(instance_id, None)
        self.others.seen(instance_id)
        self._booked_blocks.drop_worker(instance_id)
        self.check.drop(instance_id)
        self.speeds.drop(instance_id)

    def _overlaps(
        self, request: RouteRequest, held: Mapping[InstanceId, int], stale: Container[InstanceId], now: float
    ) -> Overlaps:
        booked: dict[InstanceId, int] = {}
        if self.mode is RouterMode.KV and request.block_hashes:
            booked = self._booked_blocks.overlaps(request.block_hashes, held, now)
        return Overlaps(held, {**held, **booked} if booked else held, stale, self.check)

    # The pick

    def _pick(self, eligible: Sequence[Candidate], totals: list[float], now: float) -> Candidate:
        return self._cheapest(eligible, totals, now) if self.mode is RouterMode.KV else self._by_mode(eligible)

    def _pick_with_room(
        self, eligible: Sequence[Candidate], totals: list[float], scores: Scores, rooms: Rooms, now: float
    ) -> Candidate | tuple[InstanceId, bool]:
        """The pick; or the instance to wait for, and whether there was room elsewhere."""
        by_cost = self.mode is RouterMode.KV
        if by_cost and rooms.has(first := self._cheapest(eligible, totals, now)):
            return first
        have = [n for n, candidate in enumerate(eligible) if rooms.has(candidate)]
        if have and not by_cost:
            return self._by_mode([eligible[n] for n in have])
        # By queue alone where costs do not count: totals of other modes are not what they decide by.
        costs = totals if by_cost else scores.queues_ms()
        waits = rooms.with_wait(eligible, costs, scores)
        if have:
            with_room = [totals[n] for n in have]
            if min(with_room) <= min(waits.values(), default=math.inf):
                return self._cheapest([eligible[n] for n in have], with_room, now)
        return (min(waits, key=waits.__getitem__) if waits else eligible[0].instance_id), bool(have)

    def _cheapest(self, eligible: Sequence[Candidate], totals: list[float], now: float) -> Candidate:
        least = min(totals)
        first = eligible[totals.index(least)]
        bound = least + NEARLY_EQUAL * first.block_size * first.step_time.b
        equal = [c for c, total in zip(eligible, totals, strict=True) if total <= bound]
        if len(equal) == 1:
            return equal[0]
        keys = [self._load_key(c, now) for c in equal]
        best = min(keys)
        return self._rng.choice([c for c, key in zip(equal, keys, strict=True) if key == best])

    def _load_key(self, candidate: Candidate, now: float) -> tuple[float, float]:
        load = self.load(candidate.instance_id)
        return load.num_streams / max(1, candidate.max_num_seqs), load.recent_ms(now)

    def _by_mode(self, eligible: Sequence[Candidate]) -> Candidate:
        if self.mode is RouterMode.RANDOM:
            return self._rng.choice(eligible)
        if self.mode is RouterMode.ROUND_ROBIN:
            return self._next_in_turn(sorted(eligible, key=lambda c: c.instance_id))
        keys = [self._booked_share(c) for c in eligible]
        best = min(keys)
        return self._rng.choice([c for c, key in zip(eligible, keys, strict=True) if key == best])

    def _booked_share(self, candidate: Candidate) -> tuple[float, int]:
        load = self.load(candidate.instance_id)
        return load.num_streams / max(1, candidate.max_num_seqs), load.prompt_tokens

    def _next_in_turn(self, ordered: Sequence[Candidate]) -> Candidate:
        # By id, not by index: the turn survives instances that come and go.
        after = [c for c in ordered if self._last is not None and c.instance_id > self._last]
        chosen = after[0] if after else ordered[0]
        self._last = chosen.instance_id
        return chosen

    # The booking

    def _book(self, request: RouteRequest, winner: Candidate, scores: Scores, overlap: Overlap, now: float) -> None:
        self._num_bookings += 1
        load = self.load(winner.instance_id)
        quote = scores.quote(winner)
        prefill_ms = quote.prefill_ms(overlap.tokens)
        first_token_ms = load.prefill_queue_ms(now) + prefill_ms
        at_usual_speed = first_token_ms / winner.slowness
        expected_ms = 2 * first_token_ms + BOOKED_MS
        work_ms = prefill_ms + quote.per_stream
        kv_tokens = request.num_prompt_tokens + scores.expected / 2
        self._open[self._num_bookings] = Booking(winner.instance_id, request, now, at_usual_speed, overlap.tokens)
        if self.mode is RouterMode.KV:
            self._booked_blocks.add(winner.instance_id, request.block_hashes, now + expected_ms)
        load.book(
            self._num_bookings,
            now,
            prefill_ms=prefill_ms,
            work_ms=work_ms,
            kv_tokens=kv_tokens,
            prompt_tokens=request.num_prompt_tokens,
        )
        if request.session_id is not None:
            self._sessions.put(request.session_id, winner.instance_id)
        if self._listener is not None:
            told = PeerBooking(
                self._num_bookings,
                winner.instance_id,
                prefill_ms,
                work_ms,
                kv_tokens,
                request.num_prompt_tokens,
                request.block_hashes[:MAX_HASHES],
                expected_ms,
                request.session_id,
            )
            self._listener.booked(told, now)

    def session_instance(self, request: RouteRequest) -> InstanceId | None:
        return None if request.session_id is None else self._sessions.get(request.session_id)
