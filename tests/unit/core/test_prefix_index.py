from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.core.prefix_index import NUM_SHARDS, Holder, PrefixIndex

CHAINS = [[100 * chain + block for block in range(20)] for chain in range(1, 4)]
# Two that part from the first after a while, and prompts that nobody holds to their end.
CHAINS += [CHAINS[0][:7] + [900 + block for block in range(13)], CHAINS[0][:7] + [950 + block for block in range(5)]]
PROMPTS = [*CHAINS, *(chain[:9] + [1, 2, 3] for chain in CHAINS), [5], []]
NAMES = [f"worker-{number}" for number in range(5)]


def leading(held: set[int], prompt: list[int], stride: int = 1) -> int:
    positions = prompt[stride - 1 :: stride]
    depth = next((i for i, block_hash in enumerate(positions) if block_hash not in held), len(positions))
    return depth * stride


def expected(model: dict[str, set[int]], prompt: list[int], stride: int = 1) -> dict[str, int]:
    depths = {name: leading(held, prompt, stride) for name, held in model.items()}
    return {name: depth for name, depth in depths.items() if depth}


def is_closed(held: set[int]) -> bool:
    return all(chain[i - 1] in held for chain in CHAINS for i in range(1, len(chain)) if chain[i] in held)


operations = st.tuples(
    st.sampled_from(["store", "remove", "truncate", "clear", "drop", "replace", "clean"]),
    st.sampled_from(NAMES),
    st.sampled_from(CHAINS),
    st.integers(0, 20),
    st.integers(0, 20),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(operations, max_size=60), st.sampled_from([1, 1, 3]))
def test_it_answers_like_sets(steps: list[tuple[str, str, list[int], int, int]], stride: int) -> None:
    index: PrefixIndex[str] = PrefixIndex(stride=stride)
    holders: dict[str, Holder[str]] = {}
    model: dict[str, set[int]] = {}
    for kind, name, chain, start, end in steps:
        if name not in holders:
            holders[name], model[name] = index.add(name), set()
            index.show(holders[name])
        blocks = {"store": chain[start:end], "truncate": chain[:end], "remove": chain[start:end]}.get(kind, chain)
        blocks = [block for position, block in enumerate(chain, 1) if block in blocks and position % stride == 0]
        if kind == "store" or kind == "truncate":
            index.store(holders[name], blocks)
            model[name].update(blocks)
        elif kind == "remove":
            index.remove(holders[name], blocks)
            model[name].difference_update(blocks)
        elif kind == "clear":
            index.clear(holders[name])
            model[name].clear()
        elif kind == "drop":
            index.drop(holders.pop(name))
            del model[name]
        elif kind == "replace":
            fresh = index.add(name)
            index.store(fresh, blocks)
            index.replace(holders[name], fresh)
            holders[name], model[name] = fresh, set(blocks)
        else:
            index.clean(budget=1 + end)
        if name in holders:
            # The promise is given only where it is true; everywhere else there may be holes.
            index.set_closed(holders[name], stride == 1 and is_closed(model[name]))
        for prompt in PROMPTS:
            assert index.overlaps(prompt) == expected(model, prompt, stride)
    while index.clean():
        pass
    for prompt in PROMPTS:
        assert index.overlaps(prompt) == expected(model, prompt, stride)
    assert index.num_entries == len(set().union(*model.values()))
    assert index.num_holders == len(model)


def filled(index: PrefixIndex[str], name: str, hashes: list[int], *, closed: bool = True) -> Holder[str]:
    holder = index.add(name)
    index.store(holder, hashes)
    index.set_closed(holder, closed)
    index.show(holder)
    return holder


@pytest.mark.parametrize("seed", range(20))
def test_many_holders_of_a_long_prompt_at_every_depth(seed: int) -> None:
    rng = Random(seed)
    prompt = [rng.getrandbits(64) for _ in range(rng.choice([1, 2, 3, 64, 127, 400]))]
    index: PrefixIndex[str] = PrefixIndex()
    depths = {f"worker-{n}": rng.choice([0, 1, len(prompt) // 2, rng.randint(0, len(prompt))]) for n in range(300)}
    for name, depth in depths.items():
        filled(index, name, prompt[:depth], closed=rng.random() < 0.9)
    assert index.overlaps(prompt) == {name: depth for name, depth in depths.items() if depth}


def test_hidden_holders_are_not_answered() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    holder = index.add("a")
    index.store(holder, [1, 2])
    assert index.overlaps([1, 2]) == {}
    index.show(holder)
    assert index.overlaps([1, 2]) == {"a": 2}


def test_a_block_evicted_from_the_middle_ends_the_overlap_there() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    holder = filled(index, "a", list(range(64)), closed=False)
    index.remove(holder, [20])
    assert index.overlaps(list(range(64))) == {"a": 20}
    index.store(holder, [20])
    assert index.overlaps(list(range(64))) == {"a": 64}
    index.remove(holder, [0])
    assert index.overlaps(list(range(64))) == {}


def test_stride_rounds_down() -> None:
    index: PrefixIndex[str] = PrefixIndex(stride=4)
    prompt = list(range(100, 118))
    filled(index, "a", prompt[3::4][:3])
    assert index.overlaps(prompt) == {"a": 12}
    assert index.overlaps(prompt[:11]) == {"a": 8}
    assert index.overlaps(prompt[:3]) == {}


def test_a_dropped_holder_is_gone_at_once_and_its_position_is_used_again() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    blocks = list(range(1000))
    for generation in range(50):
        holder = filled(index, f"worker-{generation}", blocks)
        assert index.overlaps(blocks) == {f"worker-{generation}": 1000}
        index.drop(holder)
        index.drop(holder)
        assert index.overlaps(blocks) == {}
        assert index.needs_cleaning
        while index.clean(budget=100):
            pass
        assert index.num_entries == 0
    assert holder.bit == 0
    # Masks stay as narrow as the holders that live at a time.
    assert index.add("last").bit.bit_length() <= 3


def test_clean_does_no_more_than_its_budget() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    holder = filled(index, "a", list(range(10_000)))
    index.drop(holder)
    before = index.num_entries
    assert index.clean(budget=500)
    assert before - 500 <= index.num_entries < before


def test_bits_of_the_dead_do_not_pass_to_who_comes_after() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    first = filled(index, "first", [1, 2, 3])
    filled(index, "other", [1, 2, 3])
    index.drop(first)
    while index.clean():
        pass
    again = filled(index, "second", [])
    assert again.bit == 2
    assert index.overlaps([1, 2, 3]) == {"other": 3}


def test_a_dropped_holder_cannot_be_used() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    holder = index.add("a")
    index.drop(holder)
    for use in (lambda: index.store(holder, [1]), lambda: index.clear(holder), lambda: index.show(holder)):
        with pytest.raises(ValueError, match="a was dropped"):
            use()


@pytest.mark.parametrize("arguments", [{"stride": 0}, {"max_entries": 0}])
def test_senseless_sizes_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        PrefixIndex(**arguments)


@pytest.mark.parametrize("seed", range(10))
def test_a_full_table_answers_too_little_never_too_much(seed: int) -> None:
    rng = Random(seed)
    index: PrefixIndex[str] = PrefixIndex(max_entries=300)
    holders = {name: filled(index, name, []) for name in NAMES}
    model: dict[str, set[int]] = {name: set() for name in NAMES}
    chains = [[rng.getrandbits(64) for _ in range(rng.randint(1, 30))] for _ in range(100)]
    for _ in range(600):
        name, chain = rng.choice(NAMES), rng.choice(chains)
        if rng.random() < 0.8:
            index.store(holders[name], chain)
            model[name].update(chain)
        else:
            tail = chain[rng.randrange(len(chain)) :]
            index.remove(holders[name], tail)
            model[name].difference_update(tail)
        assert index.num_entries <= 300
        prompt = rng.choice(chains)
        truth = expected(model, prompt)
        for found, depth in index.overlaps(prompt).items():
            assert depth <= truth.get(found, 0)
    assert index.num_dropped > 0


def test_a_full_table_keeps_what_is_asked_for() -> None:
    rng = Random(1)
    index: PrefixIndex[str] = PrefixIndex(max_entries=20_000)
    popular = [rng.getrandbits(64) for _ in range(100)]
    holder = filled(index, "a", popular)
    for _ in range(2_000):
        index.store(holder, [rng.getrandbits(64) for _ in range(40)])
        index.overlaps(popular)
    assert index.num_dropped > 50_000
    assert index.overlaps(popular) == {"a": 100}


def test_a_batch_larger_than_the_table() -> None:
    index: PrefixIndex[str] = PrefixIndex(max_entries=10)
    filled(index, "a", list(range(25)))
    assert index.num_entries <= 10
    assert index.num_dropped == 15
    assert index.overlaps(list(range(25)))["a"] <= 10


def test_memory_is_reported() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    empty = index.memory_bytes
    filled(index, "a", [hash_ * 7919 for hash_ in range(100 * NUM_SHARDS)])
    assert 50 < (index.memory_bytes - empty) / index.num_entries < 250
