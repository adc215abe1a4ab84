from stator.core.engine_sequence import BatchSequence, Step


def published(sequence: BatchSequence, *numbers: int) -> list[Step]:
    return [sequence.published(number, b"%d" % number) for number in numbers]


def replayed(sequence: BatchSequence, *numbers: int) -> list[Step]:
    return [sequence.replayed(number, b"%d" % number) for number in numbers]


def test_in_order() -> None:
    sequence = BatchSequence()
    assert sequence.begin_replay() == 0
    assert sequence.replay_ended() is Step.SKIP, "nothing was published yet"
    assert published(sequence, 0, 1, 2) == [Step.APPLY] * 3
    assert sequence.last == 2


def test_a_gap_is_filled_and_what_was_replayed_is_dropped_when_it_is_published() -> None:
    sequence = BatchSequence()
    assert published(sequence, 0, 1, 4) == [Step.APPLY, Step.APPLY, Step.GAP]
    assert sequence.begin_replay() == 1
    assert replayed(sequence, 1, 2, 3, 4, 5) == [Step.SKIP] + [Step.APPLY] * 4
    assert sequence.replay_ended() is Step.SKIP
    assert published(sequence, 5, 6) == [Step.SKIP, Step.APPLY]


def test_a_late_start_takes_what_there_is() -> None:
    sequence = BatchSequence()
    assert published(sequence, 7) == [Step.GAP]
    sequence.begin_replay()
    assert replayed(sequence, 5, 6, 7) == [Step.APPLY] * 3
    assert published(sequence, 8) == [Step.APPLY]


def test_a_replay_with_holes_is_asked_for_again() -> None:
    sequence = BatchSequence()
    sequence.begin_replay()
    assert replayed(sequence, 0, 1, 3) == [Step.APPLY, Step.APPLY, Step.GAP]
    assert sequence.begin_replay() == 1
    assert replayed(sequence, 1, 2, 3) == [Step.SKIP, Step.APPLY, Step.APPLY]


def test_a_replay_that_does_not_reach_back_is_lost() -> None:
    sequence = BatchSequence()
    published(sequence, 0, 1)
    sequence.begin_replay()
    assert replayed(sequence, 5) == [Step.LOST]
    sequence.begin_replay()
    assert sequence.replay_ended() is Step.LOST, "the publisher has not come that far: it is another one"


def test_another_publisher_that_came_further_is_found_out() -> None:
    sequence = BatchSequence()
    published(sequence, 0, 1)
    sequence.begin_replay()
    assert sequence.replayed(1, b"another batch 1") is Step.LOST
    # What was confirmed once must be confirmed again.
    sequence.begin_replay()
    assert replayed(sequence, 1, 2) == [Step.SKIP, Step.APPLY]
    sequence.begin_replay()
    assert replayed(sequence, 3) == [Step.LOST]


def test_numbers_that_begin_again() -> None:
    sequence = BatchSequence()
    published(sequence, 0, 1, 2)
    assert published(sequence, 0) == [Step.LOST]


def test_what_no_replay_can_give_is_passed_over() -> None:
    sequence = BatchSequence()
    assert published(sequence, 0, 5) == [Step.APPLY, Step.GAP]
    sequence.accept(5, b"5")
    assert published(sequence, 6) == [Step.APPLY]
    assert sequence.begin_replay() == 6
    assert replayed(sequence, 6) == [Step.SKIP]
