"""The router's index against workers whose event streams drop, double, exchange and corrupt items and break."""

import asyncio
from collections import deque
from random import Random
from typing import Any

import msgspec
import pytest

from stator.ids import InstanceId
from stator.messages.kv_events import DIGEST_INTERVAL_S, KvChange, KvChanges, pack_hashes
from stator.router.index import RECOVERY_BOUND_S, STALE_BOUND_S, KvIndex, KvIndexStats
from stator.runtime.context import loop_time
from stator.testing.clock import run_virtual
from stator.testing.faulty import Faults, FaultyClient
from stator.testing.kv_world import KvWorker, KvWorld, make_prompts, prompt_hashes

SEEDS = 200
SEEDS_A_TEST = 20
TICK_S = 0.1
FAULTS_S = 5.0
SLACK_S = 0.3
"""What flushes, ticks and the snapshot add to the bounds."""

Depths = tuple[int, ...]
"""What one worker holds of each prompt: leading blocks."""


def corrupt(item: Any, rng: Random) -> Any:
    """Other hashes in place of the right ones, in an item that is otherwise as it should be."""
    if not isinstance(item, KvChanges):
        return item
    change = item.changes[0]
    wrong = pack_hashes([rng.getrandbits(64) for _ in range(len(change.hashes) // 8)])
    changes = (KvChange(change.kind, wrong), *item.changes[1:])
    return msgspec.structs.replace(item, changes=changes)


def depth(held: set[int], hashes: list[int]) -> int:
    return next((i for i, block_hash in enumerate(hashes) if block_hash not in held), len(hashes))


class History:
    """What each worker held, and since when, as far back as a trusted view may be."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self._prompts = prompts
        self._held: dict[InstanceId, deque[tuple[float, Depths]]] = {}

    def now(self, worker: KvWorker) -> Depths:
        held = worker.engine.held()
        return tuple(depth(held, hashes) for hashes in self._prompts)

    def record(self, worker: KvWorker) -> None:
        self._held.setdefault(worker.instance_id, deque()).append((loop_time(), self.now(worker)))

    def recent(self, worker: KvWorker) -> list[Depths]:
        """All it held at any moment since the bound."""
        held = self._held[worker.instance_id]
        oldest = loop_time() - STALE_BOUND_S - SLACK_S
        while len(held) > 1 and held[1][0] <= oldest:
            held.popleft()
        return [depths for _, depths in held]


class Simulation:
    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.faults = Faults()
        self.prompts = make_prompts(self.rng, 24)
        self.hashes = [prompt_hashes(prompt) for prompt in self.prompts]
        self.history = History(self.hashes)
        self.num_added = 0
        self.num_checked = 0
        self.num_wrong = 0
        self.last_right: dict[InstanceId, float] = {}

    async def run(self, *, num_rounds: int = 2) -> tuple[KvIndexStats, int]:
        self.world = KvWorld()
        await self.world.start()
        self.client = FaultyClient(self.world.client, self.rng, self.faults, corrupt=corrupt)
        for _ in range(3):
            await self._add_worker()
        self.index = KvIndex(client=self.client, directory=self.world.directory, rng=self.rng)
        for _ in range(num_rounds):
            await self._work(FAULTS_S, faulty=True)
            self.faults.stop()
            await self._work(RECOVERY_BOUND_S + SLACK_S, faulty=False)
            await asyncio.sleep(SLACK_S)
            self._check_exact()
        stats = self.index.stats()
        self.index.close()
        await self.world.close()
        return stats, self.client.num_faults

    async def _add_worker(self) -> None:
        self.num_added += 1
        self.history.record(await self.world.add(f"worker-{self.num_added}", num_blocks=self.rng.randint(20, 80)))

    async def _work(self, duration_s: float, *, faulty: bool) -> None:
        """Requests, evictions and resets on all workers; under faults workers die, join and restart as well."""
        end = loop_time() + duration_s
        while loop_time() < end:
            for worker in list(self.world.workers.values()):
                if self.rng.random() < 0.5:
                    worker.engine.run(self.rng.choice(self.prompts))
                elif self.rng.random() < 0.02:
                    worker.engine.reset()
                self.history.record(worker)
            if faulty:
                await self._disturb()
            await asyncio.sleep(TICK_S * self.rng.random() * 2)
            self._check_bound()

    async def _disturb(self) -> None:
        rng, faults = self.rng, self.faults
        if rng.random() < 0.2:
            faults.drop, faults.duplicate, faults.reorder = rng.random() * 0.4, rng.random() * 0.3, rng.random() * 0.3
            faults.corrupt, faults.lose = rng.random() * 0.1, rng.random() * 0.1
            faults.refuse = rng.choice([0.0, 0.5])
        if rng.random() < 0.03:
            self.client.lose_all()
        if rng.random() < 0.02 and len(self.world.workers) > 1:
            await self.world.remove(rng.choice(list(self.world.workers.values())))
        if rng.random() < 0.03:
            await self.world.restart(rng.choice(list(self.world.workers.values())))
        if rng.random() < 0.02 and len(self.world.workers) < 5:
            await self._add_worker()

    def _seen(self) -> dict[InstanceId, Depths]:
        found = [self.index.overlaps(hashes) for hashes in self.hashes]
        for overlaps in found:
            assert overlaps.keys() <= self.world.workers.keys(), "an overlap with a worker whose lease is gone"
        return {i: tuple(overlaps.get(i, 0) for overlaps in found) for i in self.world.workers}

    def _check_bound(self) -> None:
        for instance_id, depths in self._seen().items():
            if self.index.trusted(instance_id):
                self.num_checked += 1
                right = depths in self.history.recent(self.world.workers[instance_id])
                wrong_for_s = loop_time() - self.last_right.get(instance_id, loop_time())
                assert right or wrong_for_s < STALE_BOUND_S + SLACK_S, "trusted, and wrong for too long"
                if not right:
                    # Corruption alone can do that; the next digest finds it.
                    self.num_wrong += 1
                    continue
            self.last_right[instance_id] = loop_time()

    def _check_exact(self) -> None:
        seen = self._seen()
        for instance_id, worker in self.world.workers.items():
            assert self.index.trusted(instance_id)
            assert seen[instance_id] == self.history.now(worker)
        held = set().union(*(worker.engine.held() for worker in self.world.workers.values()))
        while self.index._index.clean():
            pass
        assert self.index.stats().num_entries == len(held)


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_the_index_is_right_again_after_any_faults(first: int) -> None:
    num_faults = num_checked = 0
    for seed in range(first, first + SEEDS_A_TEST):
        simulation = Simulation(seed)
        try:
            _, faults = run_virtual(simulation.run())
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        num_faults += faults
        num_checked += simulation.num_checked
    # The faults happened, and there was something to check while they did.
    assert num_faults > 40 * SEEDS_A_TEST
    assert num_checked > 100 * SEEDS_A_TEST


def test_one_seed_is_one_course_of_events() -> None:
    assert run_virtual(Simulation(5).run()) == run_virtual(Simulation(5).run())


@pytest.mark.parametrize("fault", ["drop", "duplicate", "reorder", "corrupt", "lose", "refuse"])
def test_each_fault_alone_is_noticed(fault: str) -> None:
    async def run() -> KvIndexStats:
        simulation = Simulation(1)
        setattr(simulation.faults, fault, 0.9 if fault == "refuse" else 0.3)
        simulation._disturb = do_nothing  # type: ignore[method-assign]
        return (await simulation.run(num_rounds=1))[0]

    async def do_nothing() -> None:
        pass

    stats = run_virtual(run())
    noticed = {
        "drop": stats.num_gaps,
        "duplicate": stats.num_duplicates,
        "reorder": stats.num_gaps,
        "corrupt": stats.num_mismatches,
        "lose": stats.num_lost,
        "refuse": stats.num_lost,
    }
    assert noticed[fault] > 0


def test_a_silent_difference_is_repaired_within_its_bound() -> None:
    async def run() -> None:
        world = KvWorld()
        await world.start()
        faults = Faults()
        client = FaultyClient(world.client, Random(1), faults, corrupt=corrupt)
        index = KvIndex(client=client, directory=world.directory, rng=Random(2))
        worker = await world.add("worker-1")
        prompt = make_prompts(Random(3), 1)[0]
        await asyncio.sleep(0.5)
        faults.corrupt = 1.0
        worker.engine.run(prompt)
        await asyncio.sleep(0.01)
        faults.stop()
        assert index.overlaps(prompt_hashes(prompt)) == {}
        assert index.trusted(worker.instance_id)
        await asyncio.sleep(DIGEST_INTERVAL_S + SLACK_S)
        assert index.stats().num_mismatches == 1
        assert index.trusted(worker.instance_id)
        assert index.overlaps(prompt_hashes(prompt)) == {worker.instance_id: len(prompt_hashes(prompt))}
        index.close()
        await world.close()

    run_virtual(run())


def test_a_router_that_starts_again_has_twenty_workers_at_once() -> None:
    async def run() -> None:
        world = KvWorld()
        await world.start()
        rng = Random(4)
        prompts = make_prompts(rng, 100, max_blocks=100)
        for number in range(20):
            worker = await world.add(f"worker-{number}", num_blocks=2000)
            for prompt in rng.sample(prompts, 30):
                worker.engine.run(prompt)
        before = KvIndex(client=world.client, directory=world.directory, rng=Random(5))
        await asyncio.sleep(1.0)
        answers = [before.overlaps(prompt_hashes(prompt)) for prompt in prompts]
        before.close()
        index = KvIndex(client=world.client, directory=world.directory, rng=Random(6))
        await asyncio.sleep(1.0)
        assert all(map(index.trusted, world.workers))
        assert [index.overlaps(prompt_hashes(prompt)) for prompt in prompts] == answers
        assert any(answers)
        index.close()
        await world.close()

    run_virtual(run())
