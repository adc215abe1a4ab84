import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.pairing import Difference, Left, Paired, Pairing, PrefillPeers, Refused, differences, in_words
from stator.ids import InstanceId

MINE = {"block_size": "64", "connector": "a"}
SMALL = {"block_size": "32", "connector": "a"}
P, Q = InstanceId("p"), InstanceId("q")
REFUSED = Refused(P, (Difference("block_size", "64", "32"),))


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        (MINE, dict(reversed(MINE.items())), ""),
        ({}, {}, ""),
        (MINE, SMALL, "block_size is 64 here and 32 there"),
        (
            {"model": "x", "block_size": "64"},
            {"block_size": "32", "kv_dtype": "fp8"},
            "block_size is 64 here and 32 there, kv_dtype is not given here and fp8 there, "
            "model is x here and not given there",
        ),
        ({"connector": ""}, {}, "connector is  here and not given there"),
    ],
)
def test_differences_in_words(here: Pairing, there: Pairing, words: str) -> None:
    assert in_words(differences(here, there)) == words


def test_the_sides_have_names() -> None:
    words = differences(MINE, SMALL)[0].words("on d", "on p")
    assert words == "block_size is 64 on d and 32 on p"


def test_a_refusal_is_told_once() -> None:
    peers = PrefillPeers(MINE)
    assert peers.update({P: SMALL}) == [REFUSED]
    assert (peers.num_paired, set(peers.refused)) == (0, {P})
    assert peers.update({P: SMALL, Q: MINE}) == [], "another instance came"
    assert (peers.num_paired, set(peers.refused)) == (1, {P})
    assert peers.update({P: dict(SMALL)}) == [], "another instance left"


def test_another_difference_is_told() -> None:
    peers = PrefillPeers(MINE)
    peers.update({P: SMALL})
    changed = peers.update({P: {**SMALL, "connector": "b"}})
    assert changed == [Refused(P, (*REFUSED.found, Difference("connector", "a", "b")))]


def test_its_end_is_told() -> None:
    peers = PrefillPeers(MINE)
    peers.update({P: SMALL, Q: SMALL})
    assert peers.update({P: MINE}) == [Paired(P), Left(Q)]
    assert peers.update({P: MINE}) == []
    assert peers.update({}) == [], "a paired instance that leaves is nothing of ours"
    assert peers.update({P: SMALL}) == [REFUSED]


@given(
    st.lists(
        st.dictionaries(st.sampled_from([P, Q, InstanceId("r")]), st.sampled_from([MINE, SMALL, {}]), max_size=3),
        max_size=8,
    )
)
def test_what_is_told_adds_up_to_what_is(views: list[dict[InstanceId, Pairing]]) -> None:
    peers = PrefillPeers(MINE)
    told: dict[InstanceId, tuple[Difference, ...]] = {}
    for view in views:
        for new in peers.update(view):
            if isinstance(new, Refused):
                assert told.get(new.instance_id) != new.found, "told twice"
                told[new.instance_id] = new.found
            else:
                del told[new.instance_id]
                assert isinstance(new, Paired) == (new.instance_id in view)
        assert told == peers.refused
        assert set(told) == {instance_id for instance_id, theirs in view.items() if theirs != MINE}
        assert peers.num_paired + len(told) == len(view)
