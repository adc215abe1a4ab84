"""The candidates of one request: what it would cost at each, and which of them has room for it. Pure."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stator.core.admission import Line, Need
from stator.core.cost import Quote, StepTime
from stator.core.overlap_check import OverlapCheck
from stator.core.worker_load import WorkerLoad
from stator.ids import InstanceId
from stator.messages.processor import RouteRequest
from stator.messages.routing import CandidateTerms

AFFINITY = 0.1
"""Of the whole prompt's prefill: what the instance of a session's last request is preferred by."""

STALE_TRUST = 0.5
"""What overlap counts at a worker whose event stream is interrupted: its old view is served on."""

MAX_EXPLAINED = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """max_num_seqs: sequences its engine runs at once, its capacity here. block_size: tokens. max_seqs, num_kv_tokens:
    what has room there at one time (core.worker_load); 0 for no bound. slowness: how much slower it is than others of
    its kind; step_time has it in it."""

    instance_id: InstanceId
    max_num_seqs: int = 1
    block_size: int = 64
    step_time: StepTime = field(default_factory=lambda: StepTime(0, 0, 0, 0, 0, 0))
    max_seqs: int = 0
    num_kv_tokens: int = 0
    slowness: float = 1.0


class Overlap(NamedTuple):
    """blocks: held by the worker's own events. booked: with those that are being computed. tokens: what counts."""

    blocks: int
    booked: int
    tokens: float
    trust: float


@dataclass(slots=True)
class Overlaps:
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


class Row(NamedTuple):
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


LoadOf = Callable[[InstanceId], WorkerLoad]


class Scores:
    """The candidates of one request, priced. Quotes are shared by the workers of one step time."""

    __slots__ = ("_ahead", "_load_of", "_now", "_overlaps", "_quotes", "_request", "_session", "expected")

    def __init__(
        self,
        request: RouteRequest,
        expected: int,
        overlaps: Overlaps,
        now: float,
        *,
        load_of: LoadOf,
        session: InstanceId | None,
    ) -> None:
        """expected: output tokens. session: the instance that had the session's last request."""
        self.expected = expected
        self._load_of = load_of
        self._request = request
        self._overlaps = overlaps
        self._now = now
        self._quotes: dict[int, tuple[StepTime, Quote]] = {}
        self._session = session
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
        load_of, now, session, overlaps = self._load_of, self._now, self._session, self._overlaps
        most = overlaps.most
        step_time, quote, stream_ms = None, self.quote(eligible[0]), 0.0
        totals: list[float] = []
        ahead = self._ahead
        for candidate in eligible:
            instance_id = candidate.instance_id
            if candidate.step_time is not step_time:
                step_time, quote = candidate.step_time, self.quote(candidate)
                stream_ms = self.expected * quote.step_ms
            load = load_of(instance_id)
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

    def queues_ms(self) -> list[float]:
        """Predicted until a prefill starts, of each candidate of `totals`."""
        return [queue_ms for queue_ms, _ in self._ahead]

    def need(self, candidate: Candidate) -> Need:
        """At an instance like this one, when it is full; with the longest overlap that any has."""
        quote, step = self.quote(candidate), candidate.step_time
        most = self._overlaps.most
        prefill_ms = quote.prefill_ms(max(most.values(), default=0) * candidate.block_size)
        shared_ms = self.expected * (step.d0 / self.batch(candidate) + step.d1 + step.d2 * self._held)
        local_ms = prefill_ms * self._load_of(candidate.instance_id).local_share
        return Need(local_ms + shared_ms, prefill_ms + self.expected * quote.step_ms)

    @property
    def _held(self) -> float:
        return self._request.num_prompt_tokens + self.expected / 2

    def batch(self, candidate: Candidate) -> float:
        """Requests like this one that run there at one time, at least one."""
        batch = float(max(1, candidate.max_num_seqs))
        return max(1.0, min(batch, candidate.num_kv_tokens / self._held)) if candidate.num_kv_tokens else batch

    def rows(self, eligible: Sequence[Candidate], totals: list[float], winner: Candidate) -> tuple[Row, ...]:
        """The MAX_EXPLAINED cheapest, the winner among them, cheapest first. After `totals` of the same ones."""
        shown = sorted(range(len(eligible)), key=totals.__getitem__)[:MAX_EXPLAINED]
        index = eligible.index(winner)
        if index not in shown:
            shown[-1] = index
        return tuple([self._row(eligible[index], self._ahead[index]) for index in shown])

    def _row(self, candidate: Candidate, ahead: tuple[float, int]) -> Row:
        instance_id, quote, overlaps = candidate.instance_id, self.quote(candidate), self._overlaps
        load = self._load_of(instance_id)
        return Row(
            candidate,
            quote,
            (overlaps.held.get(instance_id, 0), overlaps.most.get(instance_id, 0), overlaps.trust(instance_id)),
            ahead,
            load.kv_tokens,
            load.local_share,
            self._affinity_ms(candidate, quote) if instance_id == self._session else 0.0,
            load.num_streams,
        )


class Rooms:
    """Who has room for one request."""

    __slots__ = ("_expected", "_line", "_load_of", "_most", "_now", "_request")

    def __init__(
        self,
        request: RouteRequest,
        expected: int,
        overlaps: Overlaps,
        now: float,
        *,
        load_of: LoadOf,
        line: Line,
    ) -> None:
        self._line = line
        self._load_of = load_of
        self._request = request
        self._expected = expected
        self._most = overlaps.most
        self._now = now

    def has(self, candidate: Candidate) -> bool:
        instance_id, num_kv_tokens = candidate.instance_id, candidate.num_kv_tokens
        if instance_id in self._line.reserved or not self._can_hold(candidate):
            return False
        load = self._load_of(instance_id)
        return load.has_room(self._now, candidate.max_seqs, num_kv_tokens, self._needed(candidate))

    def _needed(self, candidate: Candidate) -> float:
        """KV tokens that it will hold beyond those in use: what is cached there others may use already."""
        cached = self._most.get(candidate.instance_id, 0) * candidate.block_size
        return max(0.0, self._request.num_prompt_tokens - cached) + self._expected / 2

    def _can_hold(self, candidate: Candidate) -> bool:
        request = self._request
        return not 0 < candidate.num_kv_tokens < request.num_prompt_tokens + request.max_tokens - 1

    def with_wait(self, eligible: Sequence[Candidate], costs: list[float], scores: Scores) -> dict[InstanceId, float]:
        """Cost of each that has no room but will have, with the wait that `costs` lacks: for KV, and for those ahead in
        line, who take the next places."""
        found: dict[InstanceId, float] = {}
        for candidate, cost in zip(eligible, costs, strict=True):
            instance_id = candidate.instance_id
            if instance_id in self._line.reserved or not self._can_hold(candidate) or self.has(candidate):
                continue
            load = self._load_of(instance_id)
            stream_ms = self._expected * scores.quote(candidate).step_ms
            needed = self._needed(candidate)
            wait_ms = load.kv_wait_ms(self._now, candidate.num_kv_tokens, needed, stream_ms)
            if num_ahead := self._line.num_ahead.get(instance_id, 0):
                wait_ms += num_ahead * stream_ms / scores.batch(candidate)
            found[instance_id] = cost + wait_ms
        return found
