"""A whole deployment on virtual time, under seeded faults. A failing seed says how to see it again."""

import os
import subprocess
import sys
from random import Random

import pytest

from sim.mutations import MUTATIONS, Mutation
from stator.testing.sim.faults import ALL_KINDS, Schedule
from stator.testing.sim.run import Settings, draw_layout, run_seed

SEEDS = 200
SEEDS_A_TEST = 10
UNDISTURBED_SEEDS = 10
SEEDS_A_MUTATION = 60

DIGEST = "from stator.testing.sim.run import run_seed; print(run_seed(11).digest, run_seed(12).digest)"


@pytest.mark.parametrize("first", range(1, SEEDS + 1, SEEDS_A_TEST))
@pytest.mark.timeout(180)
def test_every_request_ends_once_and_right(first: int) -> None:
    reports: list[str] = []
    num_faults = num_answers = 0
    for seed in range(first, first + SEEDS_A_TEST):
        result = run_seed(seed)
        num_faults += len(result.faults)
        num_answers += sum(request.answer.complete for request in result.requests)
        if result.violations:
            reports.append(result.report())
    assert not reports, "\n".join(reports)
    # Something went wrong in these runs, and most of it was answered all the same.
    assert num_faults > SEEDS_A_TEST
    assert num_answers > 8 * SEEDS_A_TEST


def test_without_faults_every_client_that_stays_is_served() -> None:
    settings = Settings(kinds=())
    for seed in range(1, UNDISTURBED_SEEDS + 1):
        result = run_seed(seed, settings)
        assert not result.violations, result.report()
        served = [r for r in result.requests if not r.answer.left and r.timeout_s is None]
        assert all(r.answer.status == 200 and r.answer.done for r in served), seed
        assert len(served) > len(result.requests) / 2


def test_one_seed_is_one_trace_in_any_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2", "random")
    }
    (said,) = digests
    one, other = said.split()
    assert one != other


def test_a_seed_after_others_is_what_it_is_alone() -> None:
    alone = run_seed(3)
    run_seed(4)
    again = run_seed(3)
    assert again.digest == alone.digest
    assert again.trace == alone.trace


def test_all_kinds_of_faults_are_drawn() -> None:
    rng = Random(1)
    schedules = [
        Schedule(rng, draw_layout(rng), kinds=ALL_KINDS, max_faults=4, until_s=6.0, router=True) for _ in range(60)
    ]
    assert {fault.kind for schedule in schedules for fault in schedule.faults} == set(ALL_KINDS)


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.timeout(240)
def test_a_broken_product_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation: Mutation = MUTATIONS[name]
    sound = run_seed(mutation.first, mutation.settings)
    assert not any(mutation.says in violation for violation in sound.violations), sound.report()
    mutation.make(monkeypatch)
    for seed in range(mutation.first, mutation.first + SEEDS_A_MUTATION):
        if any(mutation.says in violation for violation in run_seed(seed, mutation.settings).violations):
            return
    pytest.fail(f"{SEEDS_A_MUTATION} seeds did not notice that {name} is broken")
