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
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import NamedTuple

from stator.core.booked_blocks import BookedBlocks
from stator.core.cost import Quote, StepTime
from stator.core.overlap_check import OverlapCheck
from stator.core.routing_memory import OutputLengths, Sessions
from stator.core.worker_load import WorkerLoad
from stator.ids import InstanceId
from stator.messages.processor import RouteRequest
from stator.messages.routing import CandidateTerms

AFFINITY = 0.1
NEARLY_EQUAL = 0.5
"""Of a block's prefill: less than what one more cached block is worth, so that no overlap is given up for a tie."""

STALE_TRUST = 0.5
"""What overlap counts at a worker whose event stream is interrupted: its old view is served on."""

MAX_EXPLAINED = 8
BOOKED_MS = 500.0
"""Booked blocks stay for twice the predicted time to first token and that long: events take their time."""


class RouterMode(StrEnum):
    KV = "kv"
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    LEAST_LOADED = "least-loaded"


@dataclass(frozen=True, slots=True)
class Candidate:
    """max_num_seqs: sequences its engine runs at once, its capacity here. block_size: tokens."""

    instance_id: InstanceId
    max_num_seqs: int = 1
    block_size: int = 64
    step_time: StepTime = field(default_factory=lambda: StepTime(0, 0, 0, 0, 0, 0))


class Overlap(NamedTuple):
    """blocks: held by the worker's own events. booked: with those that are being computed. tokens: what counts."""

    blocks: int
    booked: int
    tokens: float
    trust: float


@dataclass(slots=True)
class _Overlaps:
    """held, most: blocks by the workers' events, and with those that are being computed."""

    held: Mapping[InstanceId, int]
    most: Mapping[InstanceId, int]
    stale: Container[InstanceId]
    check: OverlapCheck

    def trust(self, instance_id: InstanceId) -> float:
        trust = self.check.trust(instance_id)
        return trust * STALE_TRUST if instance_id in self.stale else trust

    def of(self, candidate: Candidate) -> Overlap:
        instance_id = candidate.instance_id
        most, trust = self.most.get(instance_id, 0), self.trust(instance_id)
        return Overlap(self.held.get(instance_id, 0), most, most * candidate.block_size * trust, trust)


class _Row(NamedTuple):
    """A candidate as it was priced; its terms are worked out only if somebody asks."""

    candidate: Candidate
    quote: Quote
    overlap: tuple[int, int, float]
    ahead: tuple[float, int]
    kv_tokens: float
    local_share: float
    affinity_ms: float
    num_streams: int

    def terms(self) -> CandidateTerms:
        candidate, (blocks, booked, trust) = self.candidate, self.overlap
        queue_ms, running = self.ahead
        tokens = booked * candidate.block_size * trust
        terms = self.quote.terms(tokens, queue_ms, running, self.kv_tokens, self.local_share, self.affinity_ms)
        return CandidateTerms(
            instance_id=candidate.instance_id,
            total_ms=terms.total_ms,
            overlap_blocks=blocks,
            booked_blocks=booked,
            trust=trust,
            queue_ms=terms.queue_ms,
            prefill_ms=terms.prefill_ms,
            decode_ms=terms.decode_ms,
            harm_ms=terms.harm_ms,
            affinity_ms=terms.affinity_ms,
            num_streams=self.num_streams,
            load=self.num_streams / max(1, candidate.max_num_seqs),
        )


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
    rows: tuple[_Row, ...]

    def candidates(self) -> list[CandidateTerms]:
        return [row.terms() for row in self.rows]


@dataclass(slots=True)
class Booking:
    """An open one."""

    winner: InstanceId
    request: RouteRequest
    started: bool = False


class RoutingCore:
    """One router's decisions. Not thread-safe; every method is a plain state change. Times are milliseconds of one
    monotonic clock."""

    def __init__(self, mode: RouterMode, rng: Random) -> None:
        self.mode = mode
        self.check = OverlapCheck()
        self._rng = rng
        self._last: InstanceId | None = None
        self._num_bookings = 0
        self._open: dict[int, Booking] = {}
        self._loads: dict[InstanceId, WorkerLoad] = {}
        self._booked_blocks = BookedBlocks()
        self._sessions = Sessions()
        self._lengths = OutputLengths()

    @property
    def num_bookings(self) -> int:
        return len(self._open)

    @property
    def num_booked_blocks(self) -> int:
        return self._booked_blocks.num_entries

    def load(self, instance_id: InstanceId) -> WorkerLoad:
        load = self._loads.get(instance_id)
        if load is None:
            load = self._loads[instance_id] = WorkerLoad()
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
        eligible = [c for c in candidates if c.instance_id not in request.exclude] or list(candidates)
        if not eligible:
            return None
        expected = self._lengths.expected(request.model, request.max_tokens)
        overlaps = self._overlaps(request, held or {}, stale, now)
        scores = _Scores(self, request, expected, overlaps, now)
        totals = scores.totals(eligible)
        winner = self._cheapest(eligible, totals, now) if self.mode is RouterMode.KV else self._by_mode(eligible)
        rows = scores.rows(eligible, totals, winner)
        overlap = overlaps.of(winner)
        self._book(request, winner, scores, overlap, now)
        return Choice(
            winner=winner.instance_id,
            mode=self.mode,
            booking=self._num_bookings,
            overlap=overlap,
            cost_ms=totals[eligible.index(winner)],
            num_candidates=len(eligible),
            expected_output_tokens=expected,
            rows=rows,
        )

    def first_token(self, booking: int, now: float) -> None:
        """Unknown bookings, those that were released, are ignored."""
        if (known := self._open.get(booking)) is not None:
            known.started = True
            if (load := self._loads.get(known.winner)) is not None:
                load.first_token(booking, now)

    def failed(self, booking: int) -> None:
        """The request ended there before its first token: its blocks will not come."""
        if (known := self._open.get(booking)) is not None and not known.started:
            self._booked_blocks.revoke(known.winner, known.request.block_hashes)

    def finished(self, model: str, num_output_tokens: int) -> None:
        self._lengths.add(model, num_output_tokens)

    def release(self, booking: int, now: float) -> None:
        known = self._open.pop(booking, None)
        if known is not None and (load := self._loads.get(known.winner)) is not None:
            load.release(booking, now)

    def drop_worker(self, instance_id: InstanceId) -> None:
        """It is gone. Bookings on it stay open until they are released, and count for nothing."""
        self._loads.pop(instance_id, None)
        self._booked_blocks.drop_worker(instance_id)
        self.check.drop(instance_id)

    def _overlaps(
        self, request: RouteRequest, held: Mapping[InstanceId, int], stale: Container[InstanceId], now: float
    ) -> "_Overlaps":
        booked: dict[InstanceId, int] = {}
        if self.mode is RouterMode.KV and request.block_hashes:
            booked = self._booked_blocks.overlaps(request.block_hashes, held, now)
        return _Overlaps(held, {**held, **booked} if booked else held, stale, self.check)

    # The pick

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

    def _book(self, request: RouteRequest, winner: Candidate, scores: "_Scores", overlap: Overlap, now: float) -> None:
        self._num_bookings += 1
        self._open[self._num_bookings] = Booking(winner.instance_id, request)
        load = self.load(winner.instance_id)
        quote = scores.quote(winner)
        prefill_ms = quote.prefill_ms(overlap.tokens)
        if self.mode is RouterMode.KV:
            first_token_ms = load.prefill_queue_ms(now) + prefill_ms
            self._booked_blocks.add(winner.instance_id, request.block_hashes, now + 2 * first_token_ms + BOOKED_MS)
        load.book(
            self._num_bookings,
            now,
            prefill_ms=prefill_ms,
            work_ms=prefill_ms + quote.per_stream,
            kv_tokens=request.num_prompt_tokens + scores.expected / 2,
            prompt_tokens=request.num_prompt_tokens,
        )
        if request.session_id is not None:
            self._sessions.put(request.session_id, winner.instance_id)

    def session_instance(self, request: RouteRequest) -> InstanceId | None:
        return None if request.session_id is None else self._sessions.get(request.session_id)


class _Scores:
    """The candidates of one request, priced. Quotes are shared by the workers of one step time."""

    __slots__ = ("_ahead", "_core", "_now", "_overlaps", "_quotes", "_request", "_session", "expected")

    def __init__(
        self,
        core: RoutingCore,
        request: RouteRequest,
        expected: int,
        overlaps: _Overlaps,
        now: float,
    ) -> None:
        self.expected = expected
        self._core = core
        self._request = request
        self._overlaps = overlaps
        self._now = now
        self._quotes: dict[int, tuple[StepTime, Quote]] = {}
        self._session = core.session_instance(request)
        self._ahead: list[tuple[float, int]] = []

    def quote(self, candidate: Candidate) -> Quote:
        # By identity: hashing six floats for each of a thousand candidates costs more than the rest. The step time is
        # kept beside its quote, so that an id stays taken.
        step_time = candidate.step_time
        known = self._quotes.get(id(step_time))
        if known is None:
            known = (step_time, Quote(step_time, self._request.num_prompt_tokens, self.expected))
            self._quotes[id(step_time)] = known
        return known[1]

    def totals(self, eligible: Sequence[Candidate]) -> list[float]:
        """The hot loop: at a thousand workers nearly all of a decision's time."""
        core, now, session, overlaps = self._core, self._now, self._session, self._overlaps
        most = overlaps.most
        step_time, quote, stream_ms = None, self.quote(eligible[0]), 0.0
        totals: list[float] = []
        ahead = self._ahead
        for candidate in eligible:
            instance_id = candidate.instance_id
            if candidate.step_time is not step_time:
                step_time, quote = candidate.step_time, self.quote(candidate)
                stream_ms = self.expected * quote.step_ms
            load = core.load(instance_id)
            waits = load.ahead(now, candidate.max_num_seqs, stream_ms)
            ahead.append(waits)
            queue_ms, num_streams = waits
            blocks = most.get(instance_id)
            tokens = blocks * candidate.block_size * overlaps.trust(instance_id) if blocks else 0.0
            total = quote.total_ms(tokens, queue_ms, num_streams, load.kv_tokens, load.local_share)
            totals.append(total + self._affinity_ms(candidate, quote) if instance_id == session else total)
        return totals

    @staticmethod
    def _affinity_ms(candidate: Candidate, quote: Quote) -> float:
        return -AFFINITY * quote.prefill_ms(0.0) - candidate.block_size * candidate.step_time.b

    def rows(self, eligible: Sequence[Candidate], totals: list[float], winner: Candidate) -> tuple[_Row, ...]:
        """The MAX_EXPLAINED cheapest, the winner among them, cheapest first. After `totals` of the same ones."""
        shown = sorted(range(len(eligible)), key=totals.__getitem__)[:MAX_EXPLAINED]
        index = eligible.index(winner)
        if index not in shown:
            shown[-1] = index
        return tuple([self._row(eligible[index], self._ahead[index]) for index in shown])

    def _row(self, candidate: Candidate, ahead: tuple[float, int]) -> _Row:
        instance_id, quote, overlaps = candidate.instance_id, self.quote(candidate), self._overlaps
        load = self._core.load(instance_id)
        return _Row(
            candidate,
            quote,
            (overlaps.held.get(instance_id, 0), overlaps.most.get(instance_id, 0), overlaps.trust(instance_id)),
            ahead,
            load.kv_tokens,
            load.local_share,
            self._affinity_ms(candidate, quote) if instance_id == self._session else 0.0,
            load.num_streams,
        )
