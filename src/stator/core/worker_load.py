"""What a router has sent to a worker and what it knows of others' load there. Pure; times are in milliseconds.

A booking counts as a stream, with its KV, until it is released; and as waiting prefill until its first token was
reported, it is released, or it is overdue. Prefills are taken in the order they were booked, and the time that the
first in line has been at it is taken off. A prefill is overdue at twice its predicted time and OVERDUE_MS more: without
a report its worker must not look busy for ever; it still counts as a stream.

Own bookings and a worker's report overlap, and nothing may count twice. A report counts requests; those of this router
are among them, at most as many as were booked at one time since the report before. Only what exceeds that is taken for
the load of others: under churn the load of others is underestimated, never counted twice.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

from stator.messages.engine import EngineLoad

OVERDUE_MS = 1000.0
REPORT_VALID_MS = 5000.0
RECENT_MS = 30_000.0
LOCAL_SHARE_WEIGHT = 0.5


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
    """num_streams: own bookings. prompt_tokens: theirs. kv_tokens: what they hold, prompt and half the expected output.

    local_share: the part of its recent prefills that the worker computed itself. prefill_mean_ms: of the bookings,
    the recent ones more.
    """

    __slots__ = (
        "_head_since",
        "_others",
        "_peak",
        "_pending_ms",
        "_prefills",
        "_prefills_seen",
        "_recent",
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

    # Own bookings

    def book(
        self, booking: int, now: float, *, prefill_ms: float, work_ms: float, kv_tokens: float, prompt_tokens: int
    ) -> None:
        """prefill_ms: of the part that is not cached. work_ms: all that the request will take of the worker."""
        self._streams[booking] = _Stream(kv_tokens, prompt_tokens)
        self.prompt_tokens += prompt_tokens
        self.num_streams += 1
        self._peak = max(self._peak, self.num_streams)
        self.kv_tokens += kv_tokens
        self._recent = (now, self.recent_ms(now) + work_ms)
        self.prefill_mean_ms += 0.1 * (prefill_ms - self.prefill_mean_ms) if self.prefill_mean_ms else prefill_ms
        ms = prefill_ms * self.local_share
        predicted_ms = self.prefill_queue_ms(now) + prefill_ms
        if not self._prefills:
            self._head_since = now
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

    def recent_ms(self, now: float) -> float:
        """Work booked here, that of RECENT_MS ago counted at 1/e."""
        at, work_ms = self._recent
        return work_ms * math.exp((at - now) / RECENT_MS)

    # The load of others

    def report(self, load: EngineLoad, prefills: dict[str, int], now: float) -> None:
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
        """(running, waiting) requests there that this router did not send."""
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
