from hypothesis import given
from hypothesis import strategies as st

from stator.core.remote_prefill import (
    CancelJob,
    Completed,
    Effect,
    Event,
    GaveUp,
    RemotePrefill,
    Reply,
    RequestEnded,
    StartFetched,
    StartLocal,
    State,
)
from stator.messages.engine import PrefillResult

RESULT = PrefillResult(transfer={"transfer_id": "t1"}, num_prompt_tokens=100)


def test_the_first_completion_wins_and_a_later_one_is_not_wanted() -> None:
    prefill = RemotePrefill()
    assert prefill.handle(Completed(RESULT)) == [Reply(True), StartFetched(RESULT)]
    assert prefill.handle(Completed(RESULT)) == [Reply(False)]
    assert prefill.state is State.FETCHED


def test_a_failed_prefill_is_computed_locally() -> None:
    prefill = RemotePrefill()
    assert prefill.handle(Completed(None, "out of blocks")) == [Reply(False), StartLocal("out of blocks")]


def test_giving_up_cancels_the_job_and_a_late_completion_is_refused() -> None:
    prefill = RemotePrefill()
    assert prefill.handle(GaveUp("late")) == [CancelJob(), StartLocal("late")]
    assert prefill.handle(GaveUp("late again")) == []
    assert prefill.handle(Completed(RESULT)) == [Reply(False)]


def test_an_ended_request_starts_nothing() -> None:
    prefill = RemotePrefill()
    assert prefill.handle(RequestEnded()) == [CancelJob()]
    assert prefill.handle(GaveUp("late")) == []
    assert prefill.handle(Completed(RESULT)) == [Reply(False)]
    assert prefill.state is State.CANCELLED


events = st.one_of(
    st.just(Completed(RESULT)), st.just(Completed(None, "x")), st.just(GaveUp("late")), st.just(RequestEnded())
)


@given(st.lists(events, max_size=12))
def test_whatever_happens_the_engine_starts_at_most_once_and_every_completion_is_answered(
    sequence: list[Event],
) -> None:
    prefill = RemotePrefill()
    effects: list[Effect] = [effect for event in sequence for effect in prefill.handle(event)]
    starts = [e for e in effects if isinstance(e, StartFetched | StartLocal)]
    replies = [e for e in effects if isinstance(e, Reply)]
    assert len(starts) <= 1
    assert len(replies) == sum(isinstance(e, Completed) for e in sequence)
    # Blocks are promised to be fetched exactly when the engine is started with them.
    assert sum(r.accepted for r in replies) == sum(isinstance(s, StartFetched) for s in starts)
    ended_first = bool(sequence) and isinstance(sequence[0], RequestEnded)
    assert bool(starts) == (bool(sequence) and not ended_first)
