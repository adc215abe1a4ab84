"""What a decode worker thinks of its prefill queue must recover from anything, news or none."""

from hypothesis import given
from hypothesis import strategies as st

from stator.core.queue_outlook import QueueOutlook
from stator.ids import JobId

A, B = JobId("a"), JobId("b")


def test_own_jobs_count_until_the_queue_tells_its_size() -> None:
    outlook = QueueOutlook()
    outlook.sized(3)
    outlook.put(A)
    outlook.put(B)
    assert outlook.num_waiting == 5 and outlook.told_waiting == 3
    outlook.sized(4)
    assert outlook.num_waiting == outlook.told_waiting == 4


def test_a_job_that_is_taken_or_wanted_no_more_does_not_wait_though_no_news_came() -> None:
    outlook = QueueOutlook()
    outlook.put(A)
    outlook.put(B)
    outlook.waits_no_more(A)
    outlook.waits_no_more(A)
    assert outlook.num_waiting == 1
    outlook.waits_no_more(B)
    assert outlook.num_waiting == 0


def test_the_end_of_a_job_that_the_news_counted_takes_nothing_from_them() -> None:
    outlook = QueueOutlook()
    outlook.put(A)
    outlook.sized(1)
    outlook.waits_no_more(A)
    assert outlook.num_waiting == 1


def test_a_lost_queue_is_away_until_it_is_heard_of() -> None:
    outlook = QueueOutlook()
    assert outlook.answers(0.0)
    outlook.lost()
    assert outlook.away and not outlook.answers(1e9)
    outlook.sized(0)
    assert not outlook.away and outlook.answers(0.0)


def test_after_a_put_without_an_answer_none_is_tried_for_a_while_or_until_news() -> None:
    outlook = QueueOutlook(retry_s=5.0)
    outlook.unanswered(10.0)
    assert not outlook.answers(14.9) and outlook.answers(15.0) and not outlook.away
    outlook.unanswered(20.0)
    outlook.sized(0)
    assert outlook.answers(20.0)


@given(st.lists(st.tuples(st.sampled_from(["put", "over", "sized", "unanswered"]), st.integers(0, 5))))
def test_without_own_jobs_what_was_told_last_is_what_counts(steps: list[tuple[str, int]]) -> None:
    outlook, told, open_jobs = QueueOutlook(), 0, set[int]()
    for what, n in steps:
        match what:
            case "put":
                outlook.put(JobId(str(n)))
                open_jobs.add(n)
            case "over":
                outlook.waits_no_more(JobId(str(n)))
                open_jobs.discard(n)
            case "sized":
                outlook.sized(n)
                told = n
            case _:
                outlook.unanswered(float(n))
        assert told <= outlook.num_waiting <= told + len(open_jobs)
    for n in open_jobs:
        outlook.waits_no_more(JobId(str(n)))
    assert outlook.num_waiting == told
    assert outlook.answers(100.0)
