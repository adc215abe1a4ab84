from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.routing import Candidate, RouterMode, RoutingCore
from stator.ids import InstanceId
from stator.messages.processor import RouteRequest


def candidates(*names: str, max_num_seqs: int = 4) -> list[Candidate]:
    return [Candidate(InstanceId(n), max_num_seqs) for n in names]


def request(tokens: int = 10, exclude: tuple[str, ...] = ()) -> RouteRequest:
    excluded = tuple(InstanceId(e) for e in exclude)
    return RouteRequest(model="m", num_prompt_tokens=tokens, max_tokens=16, exclude=excluded)


def winners(core: RoutingCore, who: list[Candidate], count: int) -> list[str]:
    chosen = [core.choose(request(), who) for _ in range(count)]
    return [c.winner for c in chosen if c is not None]


def test_round_robin_takes_everyone_in_turn_and_survives_comings_and_goings() -> None:
    core = RoutingCore(RouterMode.ROUND_ROBIN, Random(1))
    assert winners(core, candidates("a", "b", "c"), 4) == ["a", "b", "c", "a"]
    assert winners(core, candidates("a", "c"), 2) == ["c", "a"]
    assert winners(core, candidates("a", "b", "c"), 2) == ["b", "c"]


def test_a_burst_spreads_evenly_because_bookings_count_at_once() -> None:
    core = RoutingCore(RouterMode.LEAST_LOADED, Random(1))
    assert Counter(winners(core, candidates("a", "b", "c", "d"), 100)) == dict.fromkeys("abcd", 25)


def test_load_is_relative_to_capacity() -> None:
    core = RoutingCore(RouterMode.LEAST_LOADED, Random(1))
    who = [Candidate(InstanceId("big"), 30), Candidate(InstanceId("small"), 10)]
    assert Counter(winners(core, who, 40)) == {"big": 30, "small": 10}


def test_equal_request_counts_go_to_fewer_prompt_tokens() -> None:
    core = RoutingCore(RouterMode.LEAST_LOADED, Random(1))
    first = core.choose(request(1000), candidates("a", "b"))
    second = core.choose(request(10), candidates("a", "b"))
    third = core.choose(request(10), candidates("a", "b"))
    assert first and second and third
    assert first.winner != second.winner
    assert third.winner == second.winner


def test_an_excluded_instance_is_used_only_when_no_other_is_left() -> None:
    core = RoutingCore(RouterMode.LEAST_LOADED, Random(1))
    for _ in range(8):
        choice = core.choose(request(exclude=("a",)), candidates("a", "b"))
        assert choice and choice.winner == "b"
    choice = core.choose(request(exclude=("a",)), candidates("a"))
    assert choice and choice.winner == "a"


@pytest.mark.parametrize("mode", RouterMode)
def test_no_candidate_no_choice(mode: RouterMode) -> None:
    assert RoutingCore(mode, Random(1)).choose(request(), []) is None


@given(
    mode=st.sampled_from(RouterMode),
    seed=st.integers(0, 2**32),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=60),
)
def test_bookings_return_to_zero_and_one_seed_gives_one_history(
    mode: RouterMode, seed: int, steps: list[tuple[bool, int]]
) -> None:
    def play() -> list[str]:
        core = RoutingCore(mode, Random(seed))
        open_bookings: list[tuple[InstanceId, RouteRequest]] = []
        history: list[str] = []
        for release, tokens in steps:
            if release and open_bookings:
                core.release(*open_bookings.pop(0))
            else:
                choice = core.choose(request(tokens), candidates("a", "b", "c"))
                assert choice is not None
                open_bookings.append((choice.winner, request(tokens)))
                history.append(choice.winner)
        for booking in open_bookings:
            core.release(*booking)
        assert core.bookings.by_instance == {}
        return history

    assert play() == play()
