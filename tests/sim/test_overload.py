"""Overload and unequal workers: the product's Router, Processor, workers and request plane with sim engines in them, on
a virtual clock: every run says the same."""

import pytest

from stator.engines.sim.engine import SimEngine
from stator.testing.overload import TTFT_BOUND_S, Result, offer, offered, play
from stator.testing.routing_world import RoutingWorld

CAPACITY_RPS = 6.9
"""Of two workers, by `overload.capacity`."""


@pytest.fixture(scope="module")
def peak() -> Result:
    return offered(1.0, CAPACITY_RPS, num_workers=2, seconds=20)


def test_the_load_is_handled_without_refusals_up_to_the_capacity(peak: Result) -> None:
    assert not peak.refused
    assert peak.num_good == peak.offered


def test_goodput_at_three_times_the_capacity_stays_near_the_peak(peak: Result) -> None:
    result = offered(3.0, CAPACITY_RPS, num_workers=2, seconds=20)
    assert result.offered > 2.5 * peak.offered
    assert result.goodput >= 0.8 * peak.goodput
    assert result.num_good >= 0.95 * len(result.answers), "what is admitted is good: nothing is computed in vain"
    assert len(result.answers) + result.refused.total() == result.offered
    assert set(result.refused) == {"overloaded"}
    assert len(result.retry_after_s) == result.refused.total(), "each is told when to come back"
    assert min(result.retry_after_s) >= 1.0
    assert max(result.retry_after_s) < 6 * TTFT_BOUND_S


def test_without_refusals_all_would_be_late(peak: Result) -> None:
    """What the bound on the wait is for, and that the figure of merit tells."""
    result = offered(3.0, CAPACITY_RPS, num_workers=2, seconds=10, queue_wait_s=1e6)
    assert not result.refused
    assert result.num_good < 0.5 * result.offered


SLOW, RATE_RPS = 0, 7.0


def set_slowdown(world: RoutingWorld, slowdown: float) -> str:
    worker = world.workers[SLOW]
    assert isinstance(worker.engine, SimEngine)
    worker.engine.faults.slowdown = slowdown
    return worker.instance.instance_id


def test_a_worker_ten_times_slower_gets_less_and_its_share_back_when_it_is_well() -> None:
    async def scene(world: RoutingWorld) -> tuple[str, list[Result]]:
        name = set_slowdown(world, 10.0)
        results = [await offer(world, RATE_RPS, seconds, seed) for seed, seconds in ((1, 12), (2, 15))]
        set_slowdown(world, 1.0)
        return name, [*results, *[await offer(world, RATE_RPS, 15, seed) for seed in (3, 4, 5)]]

    name, (learning, known, _, _, well) = play(scene, num_workers=4, queue_wait_s=60.0)
    without = play(lambda world: offer(world, RATE_RPS, 15, 2), num_workers=3, queue_wait_s=60.0)
    assert all(not result.refused for result in (learning, known, well, without))
    assert learning.by_instance[name] < 0.10 * len(learning.answers)
    assert known.by_instance[name] < 0.02 * len(known.answers), "a quarter would be its share"
    assert known.mean_ttft_s < 1.2 * without.mean_ttft_s
    assert well.by_instance[name] > 0.15 * len(well.answers)
