"""What a router has sent to a worker and what it knows of others' load there. Pure; times are in milliseconds.

A booking counts as a stream, with its KV, until it is released; and as waiting prefill until its first token was
reported, it is released, or it is overdue. Prefills are taken in the order they were booked, and the time that the
first in line has been at it is taken off. A prefill is overdue at twice its predicted time and OVERDUE_MS more: without
a report its worker must not look busy for ever; it still counts as a stream.

Bookings and a worker's report overlap, and nothing may count twice. A report counts requests; those that were booked
are among them, at most as many as were booked at one time since the report before. Only what exceeds that is taken for
the load of others: under churn the load of others is underestimated, never counted twice.

Bookings of other routers (`core.peer_bookings`) are booked here like own ones, as of when they were made. One that is
older than the last report may have been counted there as the load of others, and is taken off that.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

from stator.messages.engine import EngineLoad

OVERDUE_MS = 1000.0
PREFILL_AHEAD_MS = 500.0
"""Predicted prefill work that waits at an instance before it has no room. An engine needs some ahead of it, or it would
idle until the Router hears of the first token; what waits here instead of there can still go elsewhere, or leave."""

KV_SHARE = 0.9
"""Of an instance's KV tokens, what is given away. Bookings count half of the output that is expected, so that some will
need more at their end; without a reserve their engine would preempt others and compute them again."""

SEQS_AHEAD_DIVISOR = 16
"""Beyond `max_num_seqs` an engine is let have a sixteenth more, at least one: a place that becomes free is taken in the
engine's next step, not a round trip later. More would wait in the engine, where nobody can send it elsewhere."""

REPORT_VALID_MS = 5000.0
RECENT_MS = 30_000.0
LOCAL_SHARE_WEIGHT = 0.5


def seqs_let_in(max_num_seqs: int) -> int:
    """Sequences that an engine of so many places may have, running and waiting."""
    return max_num_seqs + max(1, max_num_seqs // SEQS_AHEAD_DIVISOR)


@dataclass(slots=True)
class _Prefill:
    ms: float
    overdue_at: float


@dataclass(slots=True)
class _Stream:
    kv_tokens: float
    prompt_tokens: int


@dataclass(slots=True)
class _Others:
    num_running: int = 0
    num_waiting: int = 0
    until: float = 0.0


class WorkerLoad:
    """num_streams: bookings. prompt_tokens: theirs. kv_tokens: what they hold, prompt and half the expected output;
    blocks that sequences share count for each of them.

    local_share: the part of its recent prefills that the worker computed itself. prefill_mean_ms: of the bookings,
    the recent ones more.
    """

    __slots__ = (
        "_head_since",
        "_kv_reported",
        "_others",
        "_peak",
        "_pending_ms",
        "_prefills",
        "_prefills_seen",
        "_recent",
        "_reported_at",
        "_streams",
        "kv_tokens",
        "local_share",
        "num_streams",
        "prefill_mean_ms",
        "prompt_tokens",
    )

    def __init__(self) -> None:
        self.num_streams = 0
        self.kv_tokens = 0.0
        self.prompt_tokens = 0
        self.local_share = 1.0
        self.prefill_mean_ms = 0.0
        self._recent = (0.0, 0.0)
        self._streams: dict[int, _Stream] = {}
        self._prefills: OrderedDict[int, _Prefill] = OrderedDict()
        self._pending_ms = 0.0
        self._head_since = 0.0
        self._peak = 0
        self._others = _Others()
        self._prefills_seen = (0, 0)
        self._reported_at = -math.inf
        # Tokens in use by the last report, with what was booked and released since; and until when that holds.
        self._kv_reported = (0.0, 0.0)

    # Bookings

    def book(
        self,
        booking: int,
        now: float,
        *,
        prefill_ms: float,
        work_ms: float,
        kv_tokens: float,
        prompt_tokens: int,
        at: float | None = None,
    ) -> None:
        """prefill_ms: of the part that is not cached. work_ms: all that the request will take of the worker. at: when
        another router booked it, at most now."""
        if at is not None and at < self._reported_at:
            self._take_off_others()
        self._streams[booking] = _Stream(kv_tokens, prompt_tokens)
        self.prompt_tokens += prompt_tokens
        self.num_streams += 1
        self._peak = max(self._peak, self.num_streams)
        self.kv_tokens += kv_tokens
        self._add_kv(kv_tokens)
        self._recent = (now, self.recent_ms(now) + work_ms)
        self.prefill_mean_ms += 0.1 * (prefill_ms - self.prefill_mean_ms) if self.prefill_mean_ms else prefill_ms
        ms = prefill_ms * self.local_share
        predicted_ms = self.prefill_queue_ms(now) + prefill_ms
        if not self._prefills:
            self._head_since = now if at is None else max(at, now - ms)
        self._prefills[booking] = _Prefill(ms, now + 2 * predicted_ms + OVERDUE_MS)
        self._pending_ms += ms

    def first_token(self, booking: int, now: float) -> None:
        """Its prefill is done. Unknown bookings are ignored, here and below."""
        self._end_prefill(booking, now)

    def release(self, booking: int, now: float) -> None:
        stream = self._streams.pop(booking, None)
        if stream is None:
            return
        self._end_prefill(booking, now)
        self.num_streams -= 1
        self.prompt_tokens -= stream.prompt_tokens
        # Sums of floats drift; an empty worker has exactly nothing.
        self.kv_tokens = self.kv_tokens - stream.kv_tokens if self._streams else 0.0
        self._add_kv(-stream.kv_tokens)

    def _add_kv(self, kv_tokens: float) -> None:
        used, until = self._kv_reported
        self._kv_reported = (max(0.0, used + kv_tokens), until)

    def _end_prefill(self, booking: int, now: float) -> None:
        prefill = self._prefills.get(booking)
        if prefill is None:
            return
        if next(iter(self._prefills)) == booking:
            self._head_since = now
        del self._prefills[booking]
        self._pending_ms = self._pending_ms - prefill.ms if self._prefills else 0.0

    def prefill_queue_ms(self, now: float) -> float:
        """Booked prefill work that is not done."""
        prefills = self._prefills
        while prefills:
            booking, head = next(iter(prefills.items()))
            if head.overdue_at > now:
                return max(0.0, self._pending_ms - min(head.ms, now - self._head_since))
            self._end_prefill(booking, now)
        return 0.0

    # Room

    def kv_used(self, now: float) -> float:
        """KV tokens in use. A worker's own count knows what sequences share and what others sent; between two counts,
        and without any, it is what was booked."""
        used, until = self._kv_reported
        if now >= until:
            return self.kv_tokens
        others = self._others
        return used if others.num_running or others.num_waiting else min(used, self.kv_tokens)

    def has_room(self, now: float, max_seqs: int, num_kv_tokens: int, needed_tokens: float) -> bool:
        """For one more request. max_seqs: `seqs_let_in` of it, 0 for no bound. num_kv_tokens: what its engine holds, 0
        for no bound. An instance with nothing to do has room for whatever it can hold at all."""
        others = self._others
        streams = self.num_streams
        if others.until > now:
            streams += others.num_running + others.num_waiting
        if not streams:
            return True
        if max_seqs and streams - min(max_seqs / 2, self._prefilled_elsewhere()) >= max_seqs:
            return False
        if num_kv_tokens and self.kv_used(now) + needed_tokens > KV_SHARE * num_kv_tokens:
            return False
        return not self._prefills or self.prefill_queue_ms(now) < PREFILL_AHEAD_MS

    def _prefilled_elsewhere(self) -> float:
        """Streams whose prompt a prefill worker has yet to compute, by the share of recent ones: they take no place."""
        return (1 - self.local_share) * len(self._prefills)

    def kv_wait_ms(self, now: float, num_kv_tokens: int, needed_tokens: float, stream_ms: float) -> float:
        """Until enough KV tokens are free, when each is held for stream_ms and they are freed evenly."""
        used = self.kv_used(now)
        missing = used + needed_tokens - KV_SHARE * num_kv_tokens
        return stream_ms * min(1.0, missing / used) if num_kv_tokens and missing > 0 and used else 0.0

    def recent_ms(self, now: float) -> float:
        """Work booked here, that of RECENT_MS ago counted at 1/e."""
        at, work_ms = self._recent
        return work_ms * math.exp((at - now) / RECENT_MS)

    # The load of others

    def _take_off_others(self) -> None:
        others = self._others
        if others.num_waiting:
            others.num_waiting -= 1
        elif others.num_running:
            others.num_running -= 1

    def report(self, load: EngineLoad, prefills: dict[str, int], now: float, *, block_size: int = 0) -> None:
        """block_size: tokens; 0 if it is not known, then the report says nothing of KV."""
        self._reported_at = now
        if block_size and load.num_blocks:
            # What was booked but has no token yet may not have its blocks yet.
            coming = sum(self._streams[booking].kv_tokens for booking in self._prefills)
            self._kv_reported = (load.num_blocks_used * block_size + coming, now + REPORT_VALID_MS)
        others = max(0, load.num_running + load.num_waiting - self._peak)
        self._peak = self.num_streams
        waiting = min(others, load.num_waiting)
        self._others = _Others(others - waiting, waiting, now + REPORT_VALID_MS)
        remote = prefills.get("remote", 0)
        local = prefills.get("local", 0) + prefills.get("fallback", 0)
        seen_remote, seen_local = self._prefills_seen
        self._prefills_seen = (remote, local)
        new_remote, new_local = remote - seen_remote, local - seen_local
        if new_remote >= 0 and new_local >= 0 and new_remote + new_local:
            share = new_local / (new_remote + new_local)
            self.local_share += LOCAL_SHARE_WEIGHT * (share - self.local_share)

    def others(self, now: float) -> tuple[int, int]:
        """(running, waiting) requests there that no known router sent."""
        others = self._others
        return (others.num_running, others.num_waiting) if now < others.until else (0, 0)

    def ahead(self, now: float, max_num_seqs: int, stream_ms: float) -> tuple[float, int]:
        """(ms until a newcomer's prefill starts, streams that run there). The wait is for prefills ahead, those of
        others at this router's mean, and, when all of max_num_seqs places are taken, for one of them. stream_ms: how
        long a stream keeps its place."""
        queue_ms = self.prefill_queue_ms(now) if self._prefills else 0.0
        running = streams = self.num_streams
        others = self._others
        if others.until > now:
            running += others.num_running
            streams = running + others.num_waiting
            queue_ms += others.num_waiting * self.prefill_mean_ms
        if streams >= max_num_seqs:
            queue_ms += (streams + 1 - max_num_seqs) * stream_ms / max_num_seqs
        return queue_ms, running
