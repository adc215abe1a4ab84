from typing import Any

import msgspec
import pytest

from stator.core import continuation
from stator.core.continuation import Continuation, Finish, GiveUp, Retry
from stator.errors import ERRORS, ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import FinishReason, SamplingParams

A, B, C, D = (InstanceId(name) for name in "abcd")
NOW = 100.0


def new(*, migration_limit: int = 3, **sampling: Any) -> Continuation:
    params = SamplingParams(**{"max_tokens": 10, **sampling})
    return Continuation(migration_limit=migration_limit, sampling=params, stop_ids=frozenset({99}), wait_s=30.0)


def error(code: ErrorCode, **fields: Any) -> StatorError:
    return StatorError(code, code.value, **fields)


LOST = error(ErrorCode.INSTANCE_LOST)
CRASHED = error(ErrorCode.ENGINE_CRASHED)
NOBODY = error(ErrorCode.NO_INSTANCE, retry_after_s=2.0)


@pytest.mark.parametrize("code", ErrorCode)
def test_only_failures_another_instance_may_not_repeat_are_retried(code: ErrorCode) -> None:
    effect = new().on_engine_failure(error(code), A, NOW)
    assert isinstance(effect, Retry if ERRORS[code].elsewhere else GiveUp)


def test_failed_instances_stay_excluded() -> None:
    core = new()
    assert core.on_engine_failure(LOST, A, NOW) == Retry((A,))
    assert core.on_engine_failure(error(ErrorCode.OVERLOADED), B, NOW) == Retry((A, B))


def test_the_limit_counts_further_attempts_and_ends_with_the_last_failure() -> None:
    core = new(migration_limit=1)
    assert isinstance(core.on_engine_failure(LOST, A, NOW), Retry)
    last = error(ErrorCode.ENGINE_DEAD)
    assert core.on_engine_failure(last, B, NOW) == GiveUp(last)


def test_an_instance_that_drains_does_not_count_as_one_that_failed() -> None:
    core = new(migration_limit=1)
    for number in range(5):
        core.received.append(number)
        assert isinstance(core.on_engine_failure(error(ErrorCode.DRAINING), InstanceId(f"d{number}"), NOW), Retry)
    assert isinstance(core.on_engine_failure(LOST, A, NOW), Retry)
    assert core.on_engine_failure(LOST, B, NOW) == GiveUp(LOST)


def test_no_migration_at_all() -> None:
    for code in (ErrorCode.INSTANCE_LOST, ErrorCode.DRAINING):
        assert isinstance(new(migration_limit=0).on_engine_failure(error(code), A, NOW), GiveUp)


def test_two_crashes_in_the_requests_own_first_step_are_its_own_fault() -> None:
    core = new()
    assert core.on_engine_failure(CRASHED, A, NOW) == Retry((A,))
    effect = core.on_engine_failure(CRASHED, B, NOW)
    assert isinstance(effect, GiveUp)
    assert effect.error.code is ErrorCode.POISON_REQUEST and not effect.error.info.retry_safe
    assert core.victims == [A, B]


def test_a_crash_of_a_prefill_engine_counts_and_leaves_the_decode_instance_in_play() -> None:
    core = new()
    remote = error(ErrorCode.ENGINE_CRASHED, instance_id=InstanceId("prefill-1"))
    assert core.on_engine_failure(remote, A, NOW) == Retry(())
    effect = core.on_engine_failure(CRASHED, A, NOW)
    assert isinstance(effect, GiveUp) and effect.error.code is ErrorCode.POISON_REQUEST
    assert core.victims == ["prefill-1", A]


def test_deaths_kills_drains_and_cuts_are_no_crashes() -> None:
    core = new(migration_limit=9)
    codes = [
        "engine_dead",
        "instance_lost",
        "draining",
        "stale_instance",
        "overloaded",
        "engine_crashed",
        "engine_dead",
    ]
    for number, code in enumerate(codes):
        effect = core.on_engine_failure(error(ErrorCode(code)), InstanceId(str(number)), NOW)
        assert isinstance(effect, Retry), code
    assert len(core.victims) == 1


@pytest.mark.parametrize(
    ("received", "min_tokens", "effect"),
    [
        ([1] * 10, 0, Finish(FinishReason.LENGTH)),
        ([1, 99], 0, Finish(FinishReason.STOP)),
        ([1, 99], 2, Retry((A,))),
        ([99, 1], 0, Retry((A,))),
    ],
)
def test_a_complete_output_needs_no_other_instance(
    received: list[int], min_tokens: int, effect: Finish | Retry
) -> None:
    core = new(min_tokens=min_tokens)
    core.received += received
    assert core.on_engine_failure(LOST, A, NOW) == effect


def test_the_router_says_no_instance() -> None:
    assert new().on_router_failure(NOBODY, NOW) == GiveUp(NOBODY)
    core = new()
    core.on_engine_failure(LOST, A, NOW)
    assert core.on_router_failure(NOBODY, NOW) == GiveUp(NOBODY), "nothing was delivered: the client may send it again"


def waits(core: Continuation, ask: Any, *, step_s: float = 0.0) -> tuple[list[float], StatorError]:
    """Ask until it gives up, each time after the wait that it asked for: (the waits, the error)."""
    now, delays = NOW, list[float]()
    while True:
        effect = ask(core, now)
        if isinstance(effect, GiveUp):
            return delays, effect.error
        assert isinstance(effect, Retry)
        assert effect.after_s > 0 and len(delays) < 100, "spins"
        delays.append(effect.after_s)
        now += effect.after_s + step_s


def test_half_an_answer_waits_for_an_instance_less_and_less_often_and_not_for_ever() -> None:
    core = new()
    core.received.append(1)
    core.on_engine_failure(LOST, A, NOW)
    delays, end = waits(core, lambda core, now: core.on_router_failure(NOBODY, now))
    assert sum(delays) == pytest.approx(30.0)  # pyright: ignore[reportUnknownMemberType]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8] and max(delays) == continuation.MAX_DELAY_S
    assert (end.code, end.retry_after_s) == (ErrorCode.NO_INSTANCE, 2.0)
    assert "1 tokens" in end.message and "30" in end.message


def test_the_only_instance_is_tried_again_after_a_wait_and_at_its_pace() -> None:
    core = new()
    core.received.append(1)
    assert core.on_engine_failure(LOST, A, NOW) == Retry((A,))
    assert core.on_decision(A, NOW) == Retry((A,), 0.1), "the router has no other"
    assert core.on_decision(A, NOW + 0.1) is None
    delays, end = waits(core, lambda core, now: core.on_engine_failure(LOST, A, now))
    assert len(delays) < 25 and core.num_retries == 1, "second tries are bounded by time"
    assert end.code is ErrorCode.NO_INSTANCE and "instance_lost" in end.message


def test_a_request_without_a_token_gives_up_soon_and_says_when_to_come_back() -> None:
    core = new()
    core.on_engine_failure(LOST, A, NOW)
    delays, end = waits(core, lambda core, now: core.on_engine_failure(LOST, A, now))
    assert sum(delays) <= continuation.UNDELIVERED_WAIT_S
    assert (end.code, end.retry_after_s) == (ErrorCode.NO_INSTANCE, continuation.RETRY_AFTER_S)


def test_a_last_instance_that_drains_leaves_none() -> None:
    core = new()
    core.on_engine_failure(error(ErrorCode.DRAINING), A, NOW)
    _, end = waits(core, lambda core, now: core.on_engine_failure(error(ErrorCode.DRAINING), A, now))
    assert (end.code, end.retry_after_s) == (ErrorCode.NO_INSTANCE, continuation.RETRY_AFTER_S)
    assert end.message == "no worker is left that could take the request; the last one drains"


def test_a_wait_begins_anew_when_tokens_came() -> None:
    core = new(migration_limit=9)
    core.received.append(1)
    core.on_engine_failure(LOST, A, NOW)
    core.on_router_failure(NOBODY, NOW)
    core.received.append(2)
    assert core.on_engine_failure(LOST, B, NOW + 100) == Retry((A, B))
    assert core.on_router_failure(NOBODY, NOW + 100) == Retry((A, B), 0.1)


def test_a_stale_router_is_told_once_and_then_asked_slowly() -> None:
    core = new()
    assert core.on_gone(A, NOW) == Retry((A,))
    assert core.on_gone(A, NOW) == Retry((A,), 0.1)
    assert core.num_retries == 0
    _, end = waits(core, lambda core, now: core.on_gone(A, now))
    assert end.code is ErrorCode.NO_INSTANCE


def test_an_instance_that_is_new_to_the_request_is_taken_at_once() -> None:
    core = new()
    core.on_engine_failure(LOST, A, NOW)
    assert core.on_decision(B, NOW) is None


def test_an_overloaded_last_instance_is_not_a_missing_one() -> None:
    core = new()
    full = error(ErrorCode.OVERLOADED)
    core.on_engine_failure(full, A, NOW)
    assert core.on_router_failure(NOBODY, NOW) == GiveUp(full)


def test_a_router_that_has_no_room_is_not_asked_again_before_there_can_be_any() -> None:
    full = error(ErrorCode.OVERLOADED, retry_after_s=4.0)
    assert new().on_router_failure(full, NOW) == GiveUp(full), "it said when to come back"
    core = new()
    core.received.append(1)
    delays, end = waits(core, lambda core, now: core.on_router_failure(full, now))
    assert sum(delays) == pytest.approx(30.0)  # pyright: ignore[reportUnknownMemberType]
    assert (end.code, end.retry_after_s) == (ErrorCode.OVERLOADED, 4.0)


def test_a_lost_router_is_asked_again_up_to_the_limit() -> None:
    core = new(migration_limit=1)
    assert core.on_router_failure(LOST, NOW) == Retry(())
    assert core.on_router_failure(LOST, NOW) == GiveUp(LOST)


@pytest.mark.parametrize("code", [ErrorCode.UNAUTHORIZED, ErrorCode.NOT_FOUND])
def test_what_instances_hold_against_each_other_is_not_the_clients_fault(code: ErrorCode) -> None:
    for effect in (new().on_engine_failure(error(code), A, NOW), new().on_router_failure(error(code), NOW)):
        assert isinstance(effect, GiveUp)
        assert effect.error.code is ErrorCode.INTERNAL


def test_a_refusal_by_the_engine_reaches_the_client_as_it_is() -> None:
    refusal = error(ErrorCode.INVALID_REQUEST)
    assert new().on_engine_failure(refusal, A, NOW) == GiveUp(refusal)


class WithChoices(SamplingParams, frozen=True):
    n: int = 1


def test_what_no_engine_resumes_ends_after_the_first_token_and_not_before() -> None:
    params = msgspec.convert({"max_tokens": 10, "n": 2}, WithChoices)
    core = Continuation(migration_limit=3, sampling=params, stop_ids=())
    assert isinstance(core.on_engine_failure(LOST, A, NOW), Retry)
    core.received.append(1)
    effect = core.on_engine_failure(LOST, B, NOW)
    assert isinstance(effect, GiveUp)
    assert (effect.error.code, effect.error.param) == (ErrorCode.NOT_RESUMABLE, "n")
    assert "Nothing else was wrong" in effect.error.message


def test_a_router_that_has_not_seen_the_instances_yet_is_asked_again_for_a_while() -> None:
    """It was started while a hub came back empty, and we know better."""
    none = error(ErrorCode.NO_INSTANCE)
    core = new()
    delays, end = waits(core, lambda core, now: core.on_router_failure(none, now, instance_known=True))
    assert sum(delays) == pytest.approx(5.0)  # pyright: ignore[reportUnknownMemberType]
    assert end.code is ErrorCode.NO_INSTANCE
    assert new().on_router_failure(none, NOW) == GiveUp(none)
