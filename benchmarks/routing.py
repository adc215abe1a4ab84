"""Routing decisions per second at 10, 100 and 1,000 workers: the choice with its booking and its explanation, the end
of the booking, and the look-up in the prefix index.

python benchmarks/routing.py [--quick]

Requests have 8,192 prompt tokens in blocks of 64. `shared`: every worker holds the first quarter of the prompt (a
common system prompt) and some hold more; `cold`: no worker holds anything. Eight requests a worker are open all the
time. CPU time of one core, the best of several rounds.
"""

import argparse
import time
from collections import deque
from random import Random

from stator.core.cost import StepTime
from stator.core.prefix_index import PrefixIndex
from stator.core.routing import Candidate, RouterMode, RoutingCore
from stator.ids import InstanceId
from stator.messages.processor import RouteRequest

BLOCK_SIZE = 64
NUM_BLOCKS = 128
OPEN_PER_WORKER = 8
H200_405B = StepTime(14.6, 0.1202, 1.84e-6, 22.6, 0.0809, 1.28e-5)


class Fleet:
    def __init__(self, num_workers: int, *, shared: bool, num_open: int) -> None:
        self._rng = Random(1)
        self._core = RoutingCore(RouterMode.KV, Random(2))
        self._index: PrefixIndex[InstanceId] = PrefixIndex()
        self._candidates = [
            Candidate(InstanceId(f"worker-{n:04}"), 64, BLOCK_SIZE, H200_405B) for n in range(num_workers)
        ]
        self._open: deque[int] = deque()
        self._num_open = num_open
        self._now = 0.0
        self._step_ms = 1000.0 / num_workers
        self._prefix = list(range(1, NUM_BLOCKS // 4 + 1)) if shared else []
        self._chains = [[self._rng.getrandbits(60) for _ in range(NUM_BLOCKS)] for _ in range(64)]
        for candidate in self._candidates if shared else []:
            holder = self._index.add(candidate.instance_id)
            self._index.store(holder, self._prefix)
            self._index.store(holder, self._prompt(self._rng.choice(self._chains))[: self._rng.randint(33, 128)])
            self._index.show(holder)
        for _ in range(self._num_open):
            self.decide()

    def _prompt(self, chain: list[int]) -> list[int]:
        return (self._prefix + chain)[:NUM_BLOCKS]

    def decide(self) -> None:
        """One decision; the oldest open request gets its end, a younger one its first token."""
        self._now += self._step_ms
        hashes = self._prompt(self._rng.choice(self._chains))
        request = RouteRequest("m", NUM_BLOCKS * BLOCK_SIZE + 1, 400, hashes)
        held = self._index.overlaps(hashes)
        choice = self._core.choose(request, self._candidates, self._now, held=held)
        assert choice is not None
        self._open.append(choice.booking)
        if len(self._open) > self._num_open:
            self._core.release(self._open.popleft(), self._now)
            self._core.first_token(self._open[-max(1, self._num_open // 8)], self._now)


def microseconds(fleet: Fleet, rounds: int, repeat: int) -> float:
    best = float("inf")
    for _ in range(repeat):
        begin = time.process_time()
        for _ in range(rounds):
            fleet.decide()
        best = min(best, time.process_time() - begin)
    return best / rounds * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds and few open requests, to see that it runs")
    args = parser.parse_args()
    print(f"{'workers':>8} {'caches':>8} {'us a decision':>14} {'decisions/s':>12}")
    for num_workers in (10, 100, 1000):
        for shared in (False, True):
            rounds = max(20, (2_000 if args.quick else 40_000) // num_workers)
            # Opening eight a worker takes most of a minute with 1,000 workers.
            num_open = 20 if args.quick else OPEN_PER_WORKER * num_workers
            taken = microseconds(Fleet(num_workers, shared=shared, num_open=num_open), rounds, 2 if args.quick else 5)
            name = "shared" if shared else "cold"
            print(f"{num_workers:>8} {name:>8} {taken:>14.1f} {1e6 / taken:>12.0f}", flush=True)


if __name__ == "__main__":
    main()
