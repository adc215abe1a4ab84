from hypothesis import given
from hypothesis import strategies as st

from stator.core.running_time import RunningTime

GAPS = st.lists(st.floats(0.0, 100.0), max_size=40)


def test_it_is_the_callers_clock_while_readings_come() -> None:
    time = RunningTime(100.0, max_gap_s=1.0)
    assert [time.read(100.0 + step / 4) for step in range(9)] == [100.0 + step / 4 for step in range(9)]
    assert time.stood_still_s == 0.0


def test_of_a_gap_no_more_than_the_longest_counts() -> None:
    time = RunningTime(100.0, max_gap_s=1.0)
    assert time.read(114.0) == 101.0
    assert time.stood_still_s == 13.0
    assert time.read(114.5) == 101.5


def test_a_clock_that_goes_back_counts_for_nothing() -> None:
    time = RunningTime(100.0, max_gap_s=1.0)
    assert time.read(90.0) == 100.0
    assert time.read(100.5) == 100.5


@given(GAPS)
def test_it_goes_on_with_every_reading_and_no_faster_than_the_caller(gaps: list[float]) -> None:
    time, now, before = RunningTime(0.0), 0.0, 0.0
    for gap in gaps:
        now += gap
        here = time.read(now)
        assert before <= here <= before + gap + 1e-6 and here <= now
        before = here
