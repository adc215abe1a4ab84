"""What a router counts, for its reports."""

from bisect import bisect_left
from collections import Counter

from stator.messages.reports import DECISION_S, DIFFERENCE_BLOCKS, WAIT_S, IndexStats, PeerStats, RouterStats


class RouterCounters:
    def __init__(self) -> None:
        self._decisions: Counter[str] = Counter()
        self._predictions: dict[str, Counter[str]] = {}
        self._differences = [0] * (len(DIFFERENCE_BLOCKS) + 1)
        self._difference_sum = 0.0
        self._seconds = [0] * (len(DECISION_S) + 1)
        self._seconds_sum = 0.0
        self._waits = [0] * (len(WAIT_S) + 1)
        self._waits_sum = 0.0
        self._refusals: Counter[str] = Counter()

    def decided(self, mode: str, seconds: float, waited_s: float = 0.0) -> None:
        self._decisions[mode] += 1
        self._waits[bisect_left(WAIT_S, waited_s)] += 1
        self._waits_sum += waited_s
        self._seconds[bisect_left(DECISION_S, seconds)] += 1
        self._seconds_sum += seconds

    def refused(self, reason: str) -> None:
        self._refusals[reason] += 1

    def predicted(self, outcome: str, basis: str, difference: int) -> None:
        """difference: in blocks, of either sign."""
        self._predictions.setdefault(outcome, Counter())[basis] += 1
        self._differences[bisect_left(DIFFERENCE_BLOCKS, abs(difference))] += 1
        self._difference_sum += abs(difference)

    def stats(
        self,
        *,
        num_bookings: int,
        index: IndexStats | None,
        num_waiting: int = 0,
        num_waiting_tokens: int = 0,
        peers: PeerStats | None = None,
    ) -> RouterStats:
        return RouterStats(
            decisions=dict(self._decisions),
            predictions={outcome: dict(by_basis) for outcome, by_basis in self._predictions.items()},
            difference_counts=list(self._differences),
            difference_sum=self._difference_sum,
            decision_counts=list(self._seconds),
            decision_sum_s=self._seconds_sum,
            num_bookings=num_bookings,
            num_waiting=num_waiting,
            num_waiting_tokens=num_waiting_tokens,
            wait_counts=list(self._waits),
            wait_sum_s=self._waits_sum,
            refusals=dict(self._refusals),
            index=index,
            peers=peers,
        )
