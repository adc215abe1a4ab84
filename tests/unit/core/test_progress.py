"""When an engine that has work and makes no step counts as stalled."""

from typing import Any

import msgspec
import pytest

from stator.core.progress import (
    BASE_TIMEOUT_S,
    FIRST_STEPS,
    FIRST_TIMEOUT_S,
    MAX_GAP_S,
    SLOW_STEP_FACTOR,
    Patience,
    ProgressWatch,
    Stall,
    has_work,
    patience_for,
)
from stator.messages.engine import EngineInfo, EngineLoad

IDLE = EngineLoad()
RUNNING = EngineLoad(num_running=2, num_waiting=1)
PERIOD_S = 0.5


class Watched:
    """An engine that is looked at every PERIOD_S."""

    def __init__(self, patience: Patience, load: EngineLoad = IDLE) -> None:
        self.now = 100.0
        self.load = load
        self.watch = ProgressWatch(patience, load, self.now)

    def for_s(self, seconds: float, **changes: Any) -> list[tuple[float, Stall]]:
        """The load changes at once, and stays so; what was told, and after how long."""
        self.load = msgspec.structs.replace(self.load, **changes)
        began, told = self.now, []
        while self.now < began + seconds:
            self.now += PERIOD_S
            if (stall := self.watch.observe(self.load, self.now)) is not None:
                told.append((self.now - began, stall))
        return told

    def steps(self, number: int, seconds_each: float = PERIOD_S) -> None:
        for _ in range(number):
            assert not self.for_s(seconds_each - PERIOD_S)
            assert not self.for_s(PERIOD_S, steps_total=self.load.steps_total + 1)


EAGER = Patience(5.0, 5.0)


def test_no_step_with_work_is_a_stall_told_once() -> None:
    engine = Watched(EAGER)
    assert not engine.for_s(60)
    ((after_s, stall),) = engine.for_s(60, num_running=2, num_waiting=1)
    assert after_s == pytest.approx(5.0)
    assert stall == Stall(5.0, 0, 2, 1, 0.0)
    assert "no step for 5.0 s with 2 requests running and 1 waiting, after 0 steps" in str(stall)


def test_steps_and_idleness_are_progress() -> None:
    engine = Watched(EAGER, RUNNING)
    for _ in range(10):
        assert not engine.for_s(4.5)
        assert not engine.for_s(0.5, steps_total=engine.load.steps_total + 1)
    # The wait begins anew when work comes, however long ago the last step was.
    assert not engine.for_s(60, num_running=0, num_waiting=0)
    assert not engine.for_s(4.5, num_running=1)
    assert engine.for_s(60)


def test_a_new_engine_gets_more_time() -> None:
    patience = Patience(8.0, 90.0)
    assert [round(at) for at, _ in Watched(patience, RUNNING).for_s(200)] == [90]
    engine = Watched(patience, RUNNING)
    engine.steps(FIRST_STEPS - 1)
    assert engine.watch.patience_s == 90.0
    engine.steps(1)
    assert engine.watch.patience_s == 8.0
    assert [round(at) for at, _ in engine.for_s(200)] == [8]


def test_what_an_engine_is_first_asked_for_gets_as_much() -> None:
    engine = Watched(Patience(8.0, 90.0), RUNNING)
    engine.steps(FIRST_STEPS)
    assert [round(at) for at, _ in engine.for_s(200, num_first_uses=1)] == [90]
    engine = Watched(Patience(8.0, 90.0), RUNNING)
    engine.steps(FIRST_STEPS)
    assert not engine.for_s(60, num_first_uses=1)
    # The step that it took is the longest one now.
    engine.steps(1)
    assert not engine.for_s(100, num_first_uses=0)
    assert engine.for_s(100)


def test_who_asked_first_may_be_gone_before_the_kernel_is_there() -> None:
    engine = Watched(Patience(8.0, 90.0), RUNNING)
    engine.steps(FIRST_STEPS)
    assert not engine.for_s(10, num_first_uses=1)
    assert not engine.for_s(70, num_first_uses=0)
    engine.load = msgspec.structs.replace(engine.load, steps_total=engine.load.steps_total + 1)
    assert not engine.for_s(0.5)
    assert engine.watch.patience_s == pytest.approx(80.5 * SLOW_STEP_FACTOR)


def test_an_engine_with_slow_steps_gets_a_multiple_of_its_longest() -> None:
    engine = Watched(Patience(8.0, 90.0), RUNNING)
    engine.steps(FIRST_STEPS)
    engine.steps(1, seconds_each=6.0)
    engine.steps(FIRST_STEPS)
    assert engine.watch.patience_s == pytest.approx(6.0 * SLOW_STEP_FACTOR)
    assert not engine.for_s(17.0)
    ((_, stall),) = engine.for_s(10.0)
    assert stall.longest_step_s == pytest.approx(6.0)


def test_several_steps_between_two_looks_are_short_ones() -> None:
    watch = ProgressWatch(EAGER, RUNNING, 0.0)
    watch.observe(msgspec.structs.replace(RUNNING, steps_total=100), 1.0)
    assert watch.patience_s == 5.0


def test_time_in_which_nobody_looked_does_not_count() -> None:
    watch = ProgressWatch(EAGER, RUNNING, 0.0)
    assert watch.observe(RUNNING, 1.0) is None
    assert watch.observe(RUNNING, 3600.0) is None  # SIGSTOP, an hour ago
    assert watch.observe(RUNNING, 3601.5) is None
    assert MAX_GAP_S == 2.0
    assert watch.observe(RUNNING, 3602.0) is not None


@pytest.mark.parametrize(
    ("load", "work"),
    [
        (EngineLoad(), False),
        (EngineLoad(num_running=1), True),
        (EngineLoad(num_waiting=1), True),
        (EngineLoad(num_waiting=3, num_fetching=1), False),
        (EngineLoad(num_running=1, num_waiting=3, num_fetching=3, num_blocks_held=2), True),
        (EngineLoad(num_waiting=3, num_blocks_held=2), False),
    ],
)
def test_what_counts_as_work(load: EngineLoad, work: bool) -> None:
    assert has_work(load) is work
    # An engine that makes steps while it waits has work whenever it has requests.
    assert has_work(load, steps_while_waiting=True) is (load.num_running + load.num_waiting > 0)


def test_an_engine_that_steps_while_it_waits_stalls_also_while_it_fetches() -> None:
    fetching = EngineLoad(num_waiting=2, num_fetching=2, num_blocks_held=3)
    patient = ProgressWatch(EAGER, fetching, 0.0)
    watch = ProgressWatch(EAGER, fetching, 0.0, steps_while_waiting=True)
    looks = [0.5 * number for number in range(1, 20)]
    assert not any(patient.observe(fetching, now) for now in looks)
    (stall,) = [stall for now in looks if (stall := watch.observe(fetching, now))]
    assert (stall.seconds, stall.num_waiting) == (5.0, 2)


def test_patience() -> None:
    info = EngineInfo("vllm", "1", "m", 16, 100, 8, 2048, 4096, device="1 x NVIDIA H100 80GB HBM3")
    assert patience_for(info, None) == Patience(BASE_TIMEOUT_S, FIRST_TIMEOUT_S)
    assert BASE_TIMEOUT_S + 1 < 10, "out before a lease would end"
    large = msgspec.structs.replace(info, max_num_batched_tokens=131_072)
    assert patience_for(large, None) == Patience(131.072, 3 * 131.072)
    slow = msgspec.structs.replace(info, device="cpu", max_num_batched_tokens=4096)
    assert patience_for(slow, None) == Patience(40.96, 122.88)
    assert patience_for(large, 2.0) == Patience(2.0, 2.0)
    assert patience_for(info, 0.0) is None
