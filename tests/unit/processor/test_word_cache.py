import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from stator.messages.tokens import unpack
from stator.processor import word_cache
from stator.processor.tokenizer import ModelTokenizer
from stator.processor.word_cache import WordCache

from . import tokenizers_for_tests as fixtures

LLAMA_3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
SPECIAL = ["<s>", "<s>x", "</s>", "<|im_start|>", "<|im_end|>"]


def _trained(pattern: str | None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(fixtures.TEXT, trainer)
    return tokenizer


KINDS = {
    "gpt-2": _trained(None),
    "llama-3": _trained(LLAMA_3),
    "qwen-2": _trained(QWEN_2, normalizers.NFC()),
}
PRODUCT = {name: ModelTokenizer(tokenizer, special_tokens={}) for name, tokenizer in KINDS.items()}

fragments = st.sampled_from(
    [
        *SPECIAL,
        "'s",
        "'LL",
        "n't",
        " the",
        "earth",
        "  ",
        "\n",
        " \r\n ",
        "\t",
        "1234567",
        " 42",
        "?!",
        "\x1c",
        "\x85",
        "é",
    ]
)
texts = st.lists(st.one_of(fragments, st.text(st.characters(max_codepoint=127), max_size=8)), max_size=30).map("".join)


@pytest.mark.parametrize("name", KINDS)
@given(text=texts)
@settings(max_examples=400, deadline=None)
def test_same_ids_as_the_library(name: str, text: str) -> None:
    expected = KINDS[name].encode(text, add_special_tokens=False).ids
    for _ in range(2):  # the second time from words that are known
        assert unpack(PRODUCT[name].encode(text, add_special_tokens=False)) == expected


def _cache(tokenizer: Tokenizer) -> WordCache | None:
    return WordCache.of(json.loads(tokenizer.to_str()), str.encode)


def test_every_kind_is_known() -> None:
    assert all(_cache(tokenizer) is not None for tokenizer in KINDS.values())


def _with_added(**options: Any) -> Tokenizer:
    tokenizer = _trained(None)
    tokenizer.add_tokens([AddedToken("<tool>", **options)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        fixtures.sentencepiece(True),
        fixtures.metaspace("first"),
        fixtures.wordpiece(),
        _trained(r"\p{L}+"),
        _trained(None, normalizers.Lowercase()),
        _with_added(normalized=True),
        _with_added(normalized=False, lstrip=True),
        _with_added(normalized=False, single_word=True),
    ],
)
def test_any_other_setting_is_the_librarys(tokenizer: Tokenizer) -> None:
    assert _cache(tokenizer) is None


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of many new words, one of long words, one that is long, and a cache that is full."""
    monkeypatch.setattr(word_cache, "MAX_WORDS", 40)
    monkeypatch.setattr(word_cache, "MAX_WORD_CHARS", 6)
    product, library = ModelTokenizer(_trained(None), special_tokens={}), KINDS["gpt-2"]
    for number in range(30):
        text = " ".join(f"word{number} {'abcdefgh'[number % 8]} {number * 7919}" for _ in range(number))
        assert unpack(product.encode(text, add_special_tokens=False)) == library.encode(text).ids
    long = " ".join(f"n{number}" for number in range(3000))
    assert unpack(product.encode(long, add_special_tokens=False)) == library.encode(long).ids
