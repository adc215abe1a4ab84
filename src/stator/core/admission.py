"""Which requests wait at a router, in which order, for how long, and what a refused one is told. Pure; times are in ms.

A request waits when no instance has room for it (`core.worker_load`), or when waiting for a place at the instance that
holds its prefix is predicted to cost less than going elsewhere. There is one line for each model.

- Order: requests that an instance already worked on (their client has tokens, or waits for a second attempt), then by
  priority (a smaller number first), then by arrival.
- A later request may overtake one that finds no room, so that a large prompt does not stop small ones. One that was
  overtaken MAX_OVERTAKEN times *reserves* the instance where it is expected to fit first: nothing more is placed
  there before it. A reserved instance only empties, and an empty one takes any request that it can hold at all; so
  everybody's wait is bounded by MAX_OVERTAKEN others and by the requests that run on one instance.
- Those that wait for an instance by choice count for each other: the tenth of them waits for ten places there. So a
  burst that shares a prefix goes on to others, which would have nothing to do, instead of queueing up for one.
- At most MAX_LOOKED requests that find no room are looked at in one go, and MAX_CHOOSY that wait by choice: a turn has
  a bounded cost.
- The line is bounded in requests and in prompt tokens. What comes when it is full is refused at once, as is what is
  predicted to wait longer than allowed or longer than its deadline leaves. Requests that an instance worked on are
  never refused for the line's sake; only their own deadline ends their wait.

The prediction: what a request takes of an instance that is full, in ms (prefill, and its share of each decode step),
summed over those ahead and divided by the number of instances. The cost model's constants and the expected output may
be off, so the sum is scaled by how long the line really took for its last requests. Until there were MIN_PACED of
those a prediction refuses nobody, since it was not yet seen to hold.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import NamedTuple

from stator.ids import InstanceId
from stator.messages.processor import RouteRequest

MAX_OVERTAKEN = 16
MAX_LOOKED = 8
MAX_CHOOSY = 32

MIN_PACED = 8
PACE_WEIGHT = 1 / 16
MIN_PACE, MAX_PACE = 0.05, 20.0

PATIENCE = 1.5
"""One that waits is given up only if its predicted wait is that much too long: predictions vary, and it has waited."""

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 600.0
RETRY_JITTER = 0.5
"""Refused clients are told to come back within that part more than the drain time, evenly spread, not all at once."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """max_requests, max_tokens (of prompts): in all lines together. max_wait_ms: of one request."""

    max_requests: int = 1024
    max_tokens: int = 8_000_000
    max_wait_ms: float = 600_000.0


class Need(NamedTuple):
    """work_ms: what it takes of a full instance's time. service_ms: how long it takes there itself, from its start to
    its expected last token."""

    work_ms: float
    service_ms: float


class Reason(StrEnum):
    FULL = "queue_full"
    WAIT = "queue_wait"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Refusal:
    """wait_ms: predicted for the request. retry_after_s: when the line is predicted to be empty, with jitter."""

    reason: Reason
    wait_ms: float
    retry_after_s: float


@dataclass(slots=True)
class Waiter:
    """overtaken: requests from behind that were placed before it. waits_for: where it is expected to fit first, as of
    the last look. reserved: the instance that it holds free."""

    number: int
    request: RouteRequest
    need: Need
    joined_at: float
    deadline: float
    overtaken: int = 0
    waits_for: InstanceId | None = None
    reserved: InstanceId | None = None

    @property
    def rank(self) -> tuple[bool, int, int]:
        return (not self.request.resumed, self.request.priority, self.number)


def _rank(waiter: Waiter) -> tuple[bool, int, int]:
    return waiter.rank


class Line(NamedTuple):
    """What those that wait before a request leave to it.

    reserved: instances that they hold free. num_ahead: how many of them wait for each instance.
    """

    reserved: Container[InstanceId]
    num_ahead: Mapping[InstanceId, int]


FIRST = Line((), {})


class Wait(NamedTuple):
    """by_choice: there is room elsewhere."""

    instance_id: InstanceId
    by_choice: bool = False


Place = Callable[[Waiter, Line], Wait | None]
"""Place a waiter behind those before it: None when that is done, else what it waits for."""


class _Pace:
    """How long the line takes in terms of what was predicted. Decaying sums, so that a burst counts as one."""

    __slots__ = ("_predicted", "_taken", "num_seen")

    def __init__(self) -> None:
        self.num_seen = 0
        self._predicted = self._taken = 0.0

    def add(self, predicted_ms: float, taken_ms: float) -> None:
        self.num_seen += 1
        keep = 1 - PACE_WEIGHT
        self._predicted = keep * self._predicted + predicted_ms
        self._taken = keep * self._taken + taken_ms

    @property
    def known(self) -> bool:
        return self.num_seen >= MIN_PACED

    @property
    def ratio(self) -> float:
        if not self.known or self._predicted <= 0:
            return 1.0
        return min(MAX_PACE, max(MIN_PACE, self._taken / self._predicted))


@dataclass(slots=True)
class _Line:
    """One model's. moved_at: when it last got shorter by a placement, or began."""

    waiters: list[Waiter] = field(default_factory=list[Waiter])
    work_ms: float = 0.0
    moved_at: float = 0.0
    pace: _Pace = field(default_factory=_Pace)

    def wait_ms(self, work_ms: float, num_instances: int) -> float:
        return self.pace.ratio * work_ms / max(1, num_instances)

    def ahead_ms(self, waiter: Waiter) -> float:
        """Work of those before a newcomer, without its own."""
        if not self.waiters or self.waiters[-1].rank <= waiter.rank:
            return self.work_ms
        return sum(other.need.work_ms for other in self.waiters if other.rank < waiter.rank)

    def take(self, waiter: Waiter) -> None:
        self.waiters.remove(waiter)
        # Sums of floats drift; an empty line has exactly nothing.
        self.work_ms = self.work_ms - waiter.need.work_ms if self.waiters else 0.0


class WaitingLines:
    """The requests that wait at one router."""

    def __init__(self, limits: QueueLimits, rng: Random) -> None:
        self.limits = limits
        self.num_tokens = 0
        self._rng = rng
        self._lines: dict[str, _Line] = {}
        self._waiters: dict[int, Waiter] = {}
        self._last_number = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    def models(self) -> list[str]:
        """Those that somebody waits for."""
        return [model for model, line in self._lines.items() if line.waiters]

    def waits(self, model: str) -> bool:
        line = self._lines.get(model)
        return line is not None and bool(line.waiters)

    def predicted_wait_ms(self, model: str, num_instances: int) -> float:
        """Until all that wait now are placed."""
        line = self._lines.get(model)
        return 0.0 if line is None else line.wait_ms(line.work_ms, num_instances)

    def join(
        self, request: RouteRequest, need: Need, now: float, *, deadline: float, num_instances: int
    ) -> Waiter | Refusal:
        """Wait, or be refused. `leave` or a placement by `serve` ends it. deadline: infinite for none."""
        line = self._lines.setdefault(request.model, _Line())
        self._last_number += 1
        waiter = Waiter(self._last_number, request, need, now, deadline)
        if not request.resumed and (refusal := self._refusal(line, waiter, now, num_instances)) is not None:
            return refusal
        if not line.waiters:
            line.moved_at = now
        insort(line.waiters, waiter, key=_rank)
        line.work_ms += need.work_ms
        self.num_tokens += request.num_prompt_tokens
        self._waiters[waiter.number] = waiter
        return waiter

    def _refusal(self, line: _Line, waiter: Waiter, now: float, num_instances: int) -> Refusal | None:
        limits, num_tokens = self.limits, waiter.request.num_prompt_tokens
        wait_ms = line.wait_ms(line.ahead_ms(waiter) + waiter.need.work_ms, num_instances)
        reason: Reason | None = None
        over = self.num_waiting and self.num_tokens + num_tokens > limits.max_tokens
        if self.num_waiting >= limits.max_requests or over:
            reason = Reason.FULL
        elif line.pace.known:
            reason = self._too_long(waiter, now, wait_ms)
        return None if reason is None else Refusal(reason, wait_ms, self._retry_after_s(line, num_instances))

    def _too_long(self, waiter: Waiter, now: float, wait_ms: float) -> Reason | None:
        if now + wait_ms > waiter.joined_at + self.limits.max_wait_ms:
            return Reason.WAIT
        if now + wait_ms + waiter.need.service_ms > waiter.deadline:
            return Reason.DEADLINE
        return None

    def _retry_after_s(self, line: _Line, num_instances: int) -> float:
        drain_s = line.wait_ms(line.work_ms, num_instances) / 1e3
        bounded = min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, drain_s))
        return bounded * (1 + RETRY_JITTER * self._rng.random())

    def leave(self, waiter: Waiter) -> None:
        """It is not placed any more. Those that are not there (any more) are ignored."""
        if self._waiters.pop(waiter.number, None) is not None:
            self._lines[waiter.request.model].take(waiter)
            self.num_tokens -= waiter.request.num_prompt_tokens

    def serve(self, model: str, place: Place, now: float, num_instances: int) -> None:
        """Offer what room there is to those that wait, in order. `place` may not change the lines."""
        line = self._lines.get(model)
        if line is None:
            return
        stuck: list[Waiter] = []
        reserved: set[InstanceId] = set()
        before = Line(reserved, ahead := Counter[InstanceId]())
        num_choosy = 0
        for waiter in list(line.waiters):
            wait = place(waiter, before)
            if wait is None:
                self._placed(line, waiter, now, num_instances)
                for passed in stuck:
                    self._overtaken(passed, reserved)
                continue
            waiter.waits_for = wait.instance_id
            ahead[wait.instance_id] += 1
            num_choosy += wait.by_choice
            if waiter.reserved is not None:
                reserved.add(waiter.reserved)
            stuck.append(waiter)
            if num_choosy >= MAX_CHOOSY or len(stuck) - num_choosy >= MAX_LOOKED:
                return

    def forget_instance(self, instance_id: InstanceId) -> None:
        """It is gone: who reserved it reserves another at the next look."""
        for waiter in self._waiters.values():
            if waiter.reserved == instance_id:
                waiter.reserved = None

    def _overtaken(self, waiter: Waiter, reserved: set[InstanceId]) -> None:
        waiter.overtaken += 1
        if waiter.overtaken < MAX_OVERTAKEN or waiter.reserved is not None or waiter.waits_for is None:
            return
        if waiter.waits_for not in reserved:
            waiter.reserved = waiter.waits_for
            reserved.add(waiter.waits_for)

    def _placed(self, line: _Line, waiter: Waiter, now: float, num_instances: int) -> None:
        line.pace.add(waiter.need.work_ms / max(1, num_instances), now - line.moved_at)
        line.moved_at = now
        self.leave(waiter)

    def give_up(self, model: str, now: float, num_instances: int) -> list[tuple[Waiter, Refusal]]:
        """Takes out those that have waited too long, or will have."""
        line = self._lines.get(model)
        if line is None:
            return []
        given_up: list[tuple[Waiter, Refusal]] = []
        ahead_ms = 0.0
        for waiter in list(line.waiters):
            wait_ms = line.wait_ms(ahead_ms + waiter.need.work_ms, num_instances)
            reason = None if waiter.request.resumed else self._hopeless(line, waiter, now, wait_ms)
            if reason is None:
                ahead_ms += waiter.need.work_ms
                continue
            self.leave(waiter)
            given_up.append((waiter, Refusal(reason, wait_ms, self._retry_after_s(line, num_instances))))
        return given_up

    def _hopeless(self, line: _Line, waiter: Waiter, now: float, wait_ms: float) -> Reason | None:
        if now - waiter.joined_at >= self.limits.max_wait_ms:
            return Reason.WAIT
        return self._too_long(waiter, now, wait_ms / PATIENCE) if line.pace.known else None
