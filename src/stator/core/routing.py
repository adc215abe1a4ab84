"""Which decode instance a request goes to. Pure: the instances, the open bookings and a random source are its state.

A booking is made with the choice, so that a burst of requests sees each other's load at once, and is released when
the Processor's call ends. Modes: `round-robin` takes the instances in turn, `random` any, `least-loaded` the one with
the smallest share of its capacity booked (ties: fewer booked prompt tokens, then random). All modes see the same
candidates: ready instances of the model, less the excluded ones; if only excluded ones are left they are used again,
since a second try on a recovered instance beats a refusal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

from stator.ids import InstanceId
from stator.messages.processor import RouteRequest


class RouterMode(StrEnum):
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    LEAST_LOADED = "least-loaded"


@dataclass(frozen=True, slots=True)
class Candidate:
    """max_num_seqs: sequences its engine runs at once, its capacity here."""

    instance_id: InstanceId
    max_num_seqs: int = 1


@dataclass(slots=True)
class Booked:
    """Load that this router has sent to an instance and that has not ended."""

    num_requests: int = 0
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """terms: what the winner was compared by, per candidate, for explaining the decision."""

    winner: InstanceId
    mode: RouterMode
    terms: dict[InstanceId, tuple[float, int]]


@dataclass(slots=True)
class Bookings:
    by_instance: dict[InstanceId, Booked] = field(default_factory=dict[InstanceId, Booked])

    def of(self, instance_id: InstanceId) -> Booked:
        return self.by_instance.get(instance_id) or Booked()

    def add(self, instance_id: InstanceId, num_prompt_tokens: int) -> None:
        booked = self.by_instance.setdefault(instance_id, Booked())
        booked.num_requests += 1
        booked.num_prompt_tokens += num_prompt_tokens

    def release(self, instance_id: InstanceId, num_prompt_tokens: int) -> None:
        booked = self.by_instance[instance_id]
        booked.num_requests -= 1
        booked.num_prompt_tokens -= num_prompt_tokens
        if not booked.num_requests:
            del self.by_instance[instance_id]




class RoutingCore:
    """One router's decisions. Not thread-safe; every method is a plain state change."""

    def __init__(self, mode: RouterMode, rng: Random) -> None:
        self.mode = mode
        self.bookings = Bookings()
        self._rng = rng
        self._last: InstanceId | None = None

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate]) -> Choice | None:
        """Pick and book. None if there is no candidate. Release with `release(winner, request)` exactly once."""
        eligible = [c for c in candidates if c.instance_id not in request.exclude] or list(candidates)
        if not eligible:
            return None
        terms = {c.instance_id: self._terms(c) for c in eligible}
        winner = self._pick(eligible, terms)
        self.bookings.add(winner, request.num_prompt_tokens)
        return Choice(winner, self.mode, terms)

    def release(self, winner: InstanceId, request: RouteRequest) -> None:
        self.bookings.release(winner, request.num_prompt_tokens)

    def _terms(self, candidate: Candidate) -> tuple[float, int]:
        booked = self.bookings.of(candidate.instance_id)
        return booked.num_requests / max(1, candidate.max_num_seqs), booked.num_prompt_tokens

    def _pick(self, eligible: Sequence[Candidate], terms: dict[InstanceId, tuple[float, int]]) -> InstanceId:
        if self.mode is RouterMode.RANDOM:
            return self._rng.choice(eligible).instance_id
        if self.mode is RouterMode.ROUND_ROBIN:
            return self._next_in_turn(sorted(c.instance_id for c in eligible))
        best = min(terms.values())
        return self._rng.choice([c.instance_id for c in eligible if terms[c.instance_id] == best])

    def _next_in_turn(self, ids: Sequence[InstanceId]) -> InstanceId:
        # By id, not by index: the turn survives instances that come and go.
        after = [i for i in ids if self._last is not None and i > self._last]
        self._last = after[0] if after else ids[0]
        return self._last
