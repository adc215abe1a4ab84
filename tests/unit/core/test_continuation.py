import pytest

from stator.core.continuation import Continuation, Finish, GiveUp, Retry
from stator.errors import ERRORS, ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import FinishReason

A, B, C = (InstanceId(name) for name in "abc")


def new(*, migration_limit: int = 3, max_tokens: int = 10, min_tokens: int = 0) -> Continuation:
    return Continuation(
        migration_limit=migration_limit, max_tokens=max_tokens, min_tokens=min_tokens, stop_ids=frozenset({99})
    )


def error(code: ErrorCode) -> StatorError:
    return StatorError(code, code.value)


@pytest.mark.parametrize("code", ErrorCode)
def test_only_failures_another_instance_may_not_repeat_are_retried(code: ErrorCode) -> None:
    effect = new().on_engine_failure(error(code), A)
    assert isinstance(effect, Retry if ERRORS[code].elsewhere else GiveUp)


def test_failed_instances_stay_excluded() -> None:
    core = new()
    assert core.on_engine_failure(error(ErrorCode.INSTANCE_LOST), A) == Retry((A,))
    assert core.on_engine_failure(error(ErrorCode.OVERLOADED), B) == Retry((A, B))


def test_the_limit_counts_further_attempts_and_ends_with_the_last_failure() -> None:
    core = new(migration_limit=1)
    assert isinstance(core.on_engine_failure(error(ErrorCode.INSTANCE_LOST), A), Retry)
    last = error(ErrorCode.DRAINING)
    assert core.on_engine_failure(last, B) == GiveUp(last)


def test_no_migration_at_all() -> None:
    assert isinstance(new(migration_limit=0).on_engine_failure(error(ErrorCode.INSTANCE_LOST), A), GiveUp)


def test_two_crashes_before_any_token_are_the_requests_own_fault() -> None:
    core = new()
    assert isinstance(core.on_engine_failure(error(ErrorCode.ENGINE_DEAD), A), Retry)
    effect = core.on_engine_failure(error(ErrorCode.ENGINE_DEAD), B)
    assert isinstance(effect, GiveUp) and "crashed" in effect.error.message


def test_crashes_after_tokens_and_lost_instances_are_not() -> None:
    core = new()
    for instance, code in ((A, ErrorCode.ENGINE_DEAD), (B, ErrorCode.INSTANCE_LOST), (C, ErrorCode.ENGINE_DEAD)):
        if instance != B:
            core.received.append(1)
        assert isinstance(core.on_engine_failure(error(code), instance), Retry)


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
    assert core.on_engine_failure(error(ErrorCode.INSTANCE_LOST), A) == effect


def test_the_router_says_no_instance() -> None:
    refusal = error(ErrorCode.NO_INSTANCE)
    assert new().on_router_failure(refusal) == GiveUp(refusal)
    core = new()
    core.on_engine_failure(error(ErrorCode.INSTANCE_LOST), A)
    assert core.on_router_failure(refusal) == GiveUp(refusal)


def test_an_overloaded_last_instance_is_not_a_missing_one() -> None:
    core = new()
    full = error(ErrorCode.OVERLOADED)
    core.on_engine_failure(full, A)
    assert core.on_router_failure(error(ErrorCode.NO_INSTANCE)) == GiveUp(full)


def test_a_lost_router_is_asked_again_up_to_the_limit() -> None:
    core = new(migration_limit=1)
    lost = error(ErrorCode.INSTANCE_LOST)
    assert core.on_router_failure(lost) == Retry(())
    assert core.on_router_failure(lost) == GiveUp(lost)


@pytest.mark.parametrize("code", [ErrorCode.UNAUTHORIZED, ErrorCode.NOT_FOUND])
def test_what_instances_hold_against_each_other_is_not_the_clients_fault(code: ErrorCode) -> None:
    for effect in (new().on_engine_failure(error(code), A), new().on_router_failure(error(code))):
        assert isinstance(effect, GiveUp)
        assert effect.error.code is ErrorCode.INTERNAL


def test_a_refusal_by_the_engine_reaches_the_client_as_it_is() -> None:
    refusal = error(ErrorCode.INVALID_REQUEST)
    assert new().on_engine_failure(refusal, A) == GiveUp(refusal)
