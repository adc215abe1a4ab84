"""Block hashes: the documented definition, and what they depend on."""

import struct

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from stator.core.hashing import block_hashes, chain_root, extend_hashes
from stator.messages.tokens import pack

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_the_documented_definition_gives_the_same_hashes() -> None:
    def field(text: str | None) -> bytes:
        return b"\xff" * 4 if text is None else struct.pack("<I", len(text.encode())) + text.encode()

    root = xxhash.xxh3_64_intdigest(b"stator-kv-1" + field("llama") + field(None) + field("sält"))
    first = xxhash.xxh3_64_intdigest(struct.pack("<Q3I", root, 1, 2, 3))
    second = xxhash.xxh3_64_intdigest(struct.pack("<Q3I", first, 4, 5, 6))
    assert block_hashes(pack([1, 2, 3, 4, 5, 6, 7]), 3, model="llama", cache_salt="sält") == [first, second]


def test_known_values_do_not_change_between_versions() -> None:
    assert block_hashes(pack(range(8)), 4, model="m") == [5425417877661163446, 11082256964255842995]


@given(TOKENS, st.integers(1, 8), st.integers(0, 40))
def test_extending_a_chain_equals_hashing_at_once(token_ids: list[int], block_size: int, cut: int) -> None:
    hashes: list[int] = []
    extend_hashes(hashes, pack(token_ids[:cut]), block_size, chain_root("m"))
    extend_hashes(hashes, bytearray(pack(token_ids)), block_size, chain_root("m"))
    whole = block_hashes(pack(token_ids), block_size, model="m")
    assert hashes == whole
    assert len(whole) == len(token_ids) // block_size


@given(TOKENS, TOKENS)
def test_equal_hashes_mean_equal_prefixes(left: list[int], right: list[int]) -> None:
    a, b = (block_hashes(pack(tokens), 2, model="m") for tokens in (left, right))
    for index in range(min(len(a), len(b))):
        assert (a[index] == b[index]) == (left[: 2 * index + 2] == right[: 2 * index + 2])


def test_model_lora_and_salt_separate_and_none_is_not_the_empty_string() -> None:
    roots = [
        chain_root("m"),
        chain_root("n"),
        chain_root("m", "x"),
        chain_root("m", None, "x"),
        chain_root("m", "", None),
        chain_root("m", None, ""),
        chain_root("mx", "", ""),
        chain_root("m", "x", ""),
    ]
    assert len(set(roots)) == len(roots)


def test_a_lone_surrogate_in_a_salt_hashes() -> None:
    assert chain_root("m", None, "\ud800") != chain_root("m", None, "\ud801")
