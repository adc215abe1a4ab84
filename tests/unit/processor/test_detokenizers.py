"""Every detokenizer against the tokenizer's own decoding, on tokenizers of every kind."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stator.core.detokenize import ByteDetokenizer, PieceDetokenizer, WindowDetokenizer
from stator.messages.tokens import unpack
from stator.processor.tokenizer import BYTE_OF_CHAR, ModelTokenizer

from . import tokenizers_for_tests as fixtures

KINDS: dict[str, tuple[Callable[[], Tokenizer], type]] = {
    "byte-level": (fixtures.byte_level, ByteDetokenizer),
    "sentencepiece-strip": (lambda: fixtures.sentencepiece(True), PieceDetokenizer),
    "sentencepiece": (lambda: fixtures.sentencepiece(False), PieceDetokenizer),
    "metaspace-always": (lambda: fixtures.metaspace("always"), PieceDetokenizer),
    "metaspace-never": (lambda: fixtures.metaspace("never"), PieceDetokenizer),
    "wordpiece": (fixtures.wordpiece, WindowDetokenizer),
    "no-decoder": (fixtures.no_decoder, WindowDetokenizer),
}


def model_of(kind: str) -> ModelTokenizer:
    return ModelTokenizer(KINDS[kind][0](), special_tokens={})


def stream(tokenizer: ModelTokenizer, ids: list[int], size: int) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    texts = [detokenizer.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    return [*texts, detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_follows_from_the_decoder(kind: str) -> None:
    assert type(model_of(kind).detokenizer()) is KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_deltas_of_random_ids_add_up_to_the_whole_text(kind: str, data: st.DataObject) -> None:
    tokenizer = model_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.num_ids + 1), max_size=40))
    size = data.draw(st.integers(1, 4))
    assert "".join(stream(tokenizer, ids, size)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 255), max_size=12))
@settings(max_examples=400, deadline=None)
def test_any_bytes_decode_as_the_library_decodes_them(values: list[int]) -> None:
    for kind in ("byte-level", "sentencepiece-strip"):
        tokenizer = model_of(kind)
        ids = [byte_token(kind, value) for value in values]
        assert "".join(stream(tokenizer, ids, 1)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-strip", "sentencepiece", "metaspace-always"])
@given(text=st.text("ab é🙂東 ", max_size=20))
@settings(max_examples=100, deadline=None)
def test_an_incomplete_character_is_never_shown(kind: str, text: str) -> None:
    tokenizer = model_of(kind)
    raw = KINDS[kind][0]()
    ids = raw.encode(text, add_special_tokens=False).ids
    if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(ids):
        return
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in stream(tokenizer, ids, 1))


def byte_token(kind: str, value: int) -> int:
    if kind == "byte-level":
        spelled = next(char for char, byte in BYTE_OF_CHAR.items() if byte == value)
        # Not token_to_id: an added token may be spelled like a byte.
        token_id = fixtures.byte_level().get_vocab(with_added_tokens=False)[spelled]
    else:
        token_id = fixtures.sentencepiece(True).token_to_id(f"<0x{value:02X}>")
    assert token_id is not None
    return token_id


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-strip"])
def test_a_character_in_four_tokens_appears_once_whole(kind: str) -> None:
    ids = [byte_token(kind, value) for value in "🙂".encode()]
    assert "".join(stream(model_of(kind), ids, 1)) == "🙂"
    deltas = stream(model_of(kind), ids, 1)
    assert [delta for delta in deltas if delta] == ["🙂"]


def test_an_unfinished_character_is_shown_as_replacement_only_at_the_end() -> None:
    ids = [byte_token("byte-level", value) for value in "a🙂".encode()[:3]]
    assert stream(model_of("byte-level"), ids, 1) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_scripts_spelled_in_bytes_do_not_wait_for_ever() -> None:
    text = "ကခဂဃငစဆဇ" * 10
    ids = [byte_token("sentencepiece-strip", value) for value in text.encode()]
    deltas = stream(model_of("sentencepiece-strip"), ids, 1)
    assert "".join(deltas) == text
    assert max(len(delta.encode()) for delta in deltas) <= PieceDetokenizer.MAX_RUN_BYTES


def test_special_tokens_show_nothing_and_do_not_break_a_character() -> None:
    end = fixtures.byte_level().token_to_id("<|im_end|>")
    first, *rest = [byte_token("byte-level", value) for value in "é".encode()]
    assert stream(model_of("byte-level"), [first, end, *rest], 1) == ["", "", "é", ""]


@given(st.lists(st.integers(0, 400), max_size=30), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_feeding_the_ids_so_far_restores_the_state(ids: list[int], cut: int) -> None:
    tokenizer = model_of("byte-level")
    straight, resumed = tokenizer.detokenizer(), tokenizer.detokenizer()
    for token_id in ids[:cut]:
        straight.push([token_id])
    resumed.push(ids[:cut])
    assert straight.push(ids[cut:]) + straight.flush() == resumed.push(ids[cut:]) + resumed.flush()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_with_special_tokens_the_text_is_the_librarys_too(kind: str, data: st.DataObject) -> None:
    tokenizer = model_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.num_ids - 1), max_size=20))
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    text = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-strip", "sentencepiece", "metaspace-always"])
def test_the_bytes_of_tokens_make_their_text(kind: str) -> None:
    tokenizer = model_of(kind)
    text = "Gr\u00fc\u00dfe \U0001f642 the earth"
    ids = unpack(tokenizer.encode(text, add_special_tokens=False))
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == shown.strip()
    assert tokenizer.token_bytes(tokenizer.num_ids + 5) == b""
    for special in tokenizer.special_ids:
        assert tokenizer.token_bytes(special).decode() == tokenizer.decode([special], skip_special_tokens=False).strip()
