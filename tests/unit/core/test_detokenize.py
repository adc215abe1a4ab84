"""The detokenizers on tables written by hand; tests/unit/processor runs them on trained tokenizers."""

from hypothesis import given
from hypothesis import strategies as st

from stator.core.detokenize import (
    REPLACEMENT,
    ByteDetokenizer,
    Detokenizer,
    PieceDetokenizer,
    WindowDetokenizer,
    whole_text,
)


def deltas(detokenizer: Detokenizer, *pushes: list[int]) -> list[str]:
    return [*(detokenizer.push(ids) for ids in pushes), detokenizer.flush()]


def test_bytes_are_shown_when_their_character_is_whole() -> None:
    table = {0: b"", 1: b"\xf0\x9f", 2: b"\x99\x82!", 3: b"a"}
    assert deltas(ByteDetokenizer(table), [3], [1], [0], [2]) == ["a", "", "", "🙂!", ""]


def test_bytes_that_cannot_become_a_character_are_replaced_at_once() -> None:
    table = {1: b"\xe2\x82", 2: b"a"}
    assert deltas(ByteDetokenizer(table), [1], [2]) == ["", REPLACEMENT + "a", ""]


def test_an_incomplete_character_is_replaced_at_the_end() -> None:
    assert deltas(ByteDetokenizer({1: b"\xe2\x82"}), [1]) == ["", REPLACEMENT]


ANY_TOKENS = st.lists(st.one_of(st.text(max_size=3).map(str.encode), st.binary(max_size=3)), min_size=1, max_size=8)


@given(ANY_TOKENS, st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=20))
def test_texts_known_beforehand_change_nothing(tokens: list[bytes], pushes: list[list[int]]) -> None:
    table = dict(enumerate(tokens))
    pushes = [[token_id % len(tokens) for token_id in ids] for ids in pushes]
    texts = {token_id: whole_text(token) for token_id, token in table.items()}
    assert deltas(ByteDetokenizer(table, texts), *pushes) == deltas(ByteDetokenizer(table), *pushes)


def test_a_run_of_byte_tokens_ends_at_the_next_text() -> None:
    pieces = {1: 0xC3, 2: 0xA9, 3: "a", 4: None}
    assert deltas(PieceDetokenizer(pieces), [1], [4], [2], [3]) == ["", "", "", "éa", ""]


def test_one_bad_byte_spoils_its_whole_run() -> None:
    assert deltas(PieceDetokenizer({1: 0xC3, 2: 0xA9, 3: 0xFF, 4: "a"}), [1, 2, 3], [4]) == [
        "",
        REPLACEMENT * 3 + "a",
        "",
    ]


def test_a_long_run_is_shown_in_parts_of_whole_characters() -> None:
    pieces = dict(enumerate("é".encode()))
    detokenizer = PieceDetokenizer(pieces)
    shown = "".join(detokenizer.push([0, 1]) for _ in range(40))
    assert len(shown) == 32
    assert shown + detokenizer.flush() == "é" * 40


def test_only_the_first_space_of_the_text_is_stripped() -> None:
    detokenizer = PieceDetokenizer({1: " ", 2: " a"}, strip_chars=1)
    assert deltas(detokenizer, [1], [2], [2]) == ["", " a", " a", ""]
    assert deltas(PieceDetokenizer({1: "", 2: " a"}, strip_chars=1), [1], [2]) == ["", "a", ""]


def test_a_text_of_nothing_but_stripped_spaces() -> None:
    assert deltas(PieceDetokenizer({1: " "}, strip_chars=2), [1], [1], [1]) == ["", "", " ", ""]


def test_the_first_piece_may_have_another_text() -> None:
    detokenizer = PieceDetokenizer({0: None, 1: " a"}, first_pieces={0: None, 1: "a"})
    assert deltas(detokenizer, [0], [1], [1]) == ["", "a", " a", ""]


def test_a_window_keeps_the_context_a_token_needs() -> None:
    words = {1: "the", 2: "heaven", 3: "s"}

    def decode(ids: list[int]) -> str:
        return " ".join(words[each] for each in ids).replace(" s", "s")

    assert deltas(WindowDetokenizer(decode, {0}), [1], [0], [2], [3]) == ["the", "", " heaven", "s", ""]


def test_a_window_waits_for_a_character_but_not_for_ever() -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    assert deltas(WindowDetokenizer(decode, ()), *([byte] for byte in "a🙂b".encode())) == [
        "a",
        "",
        "",
        "",
        "🙂",
        "b",
        "",
    ]
    shown = deltas(WindowDetokenizer(decode, ()), *([0xFF] for _ in range(20)))
    assert shown[8] and "".join(shown) == REPLACEMENT * 20
