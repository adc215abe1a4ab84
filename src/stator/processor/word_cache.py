"""Encoding by words that were seen before, for the tokenizers where a word's ids do not depend on what is around it.

A byte-level BPE tokenizer cuts a text at its added tokens, the rest into words by a regular expression, and encodes
each word for itself. The library does all of it anew for each prompt; here what a word became is looked up, and only a
new word is given to the library's model. Only for ASCII texts, where the usual expressions say the same in Python's
`re`, and only for settings known to mean no more than this: everything else is the library's.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

MAX_WORDS = 32_768
MAX_WORD_CHARS = 32
MAX_TEXT_CHARS = 8192
"""The look-up holds the interpreter lock, which the library does not: about 0.2 ms for that many."""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_BY_DIGITS = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN = frozenset({_GPT2, _BY_DIGITS % "{1,3}", _BY_DIGITS % ""})
"""The words of GPT-2; of Llama 3; of Qwen 2."""


class WordCache:
    """encode_word: one word, without special tokens in it, to its packed ids."""

    def __init__(self, pattern: str, added_tokens: dict[str, bytes], encode_word: Callable[[str], bytes]) -> None:
        self._words = re.compile(_in_ascii(pattern), re.ASCII).findall
        # Of several that begin at one place the library takes the longest.
        longest_first = sorted(added_tokens, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split if added_tokens else None
        self._added = added_tokens
        self._known = dict(added_tokens)
        self._encode_word = encode_word

    @classmethod
    def of(cls, settings: dict[str, Any], encode_word: Callable[[str], bytes]) -> "WordCache | None":
        """settings: tokenizer.json. None for any setting that is not known to leave words alone."""
        model, normalizer, added = settings["model"], settings["normalizer"], settings["added_tokens"]
        pattern = _word_pattern(settings["pre_tokenizer"])
        plain = model.get("type") == "BPE" and not any(
            model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        )
        # NFC leaves ASCII as it is.
        plain = plain and (normalizer is None or normalizer == {"type": "NFC"})
        for token in added:
            plain = plain and not any(token[name] for name in ("single_word", "lstrip", "rstrip", "normalized"))
        if pattern is None or not plain:
            return None
        return cls(pattern, {token["content"]: token["id"].to_bytes(4, "little") for token in added}, encode_word)

    def encode(self, text: str) -> bytes | None:
        """Packed ids, or None: then ask the library."""
        if len(text) > MAX_TEXT_CHARS or not text.isascii():
            return None
        words = self._cut(text)
        known = self._known
        try:
            return b"".join([known[word] for word in words])
        except KeyError:
            return self._learn(words)

    def _cut(self, text: str) -> list[str]:
        if self._split is None:
            return self._words(text)
        words: list[str] = []
        for index, part in enumerate(self._split(text)):
            if index % 2:
                words.append(part)
            elif part:
                words += self._words(part)
        return words

    def _learn(self, words: Sequence[str]) -> bytes:
        known = self._known
        new = {word: self._encode_word(word) for word in {*words}.difference(known)}
        packed = b"".join([new[word] if word in new else known[word] for word in words])
        kept = {word: ids for word, ids in new.items() if len(word) <= MAX_WORD_CHARS}
        if len(known) + len(kept) > MAX_WORDS:
            # Begun anew, in another dictionary: other threads may be reading this one.
            known = self._known = dict(self._added)
        known.update(kept)
        return packed


def _word_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The expression that cuts words, if it is a known one and nothing else happens before bytes are encoded."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"]:
        return _GPT2 if steps[0]["use_regex"] else None
    if kinds != ["Split", "ByteLevel"] or steps[1]["use_regex"]:
        return None
    split = steps[0]
    pattern = split["pattern"].get("Regex")
    return pattern if pattern in _KNOWN and split["behavior"] == "Isolated" and not split["invert"] else None


def _in_ascii(pattern: str) -> str:
    for classes, ascii_only in ((r"\p{L}\p{N}]", "A-Za-z0-9]"), (r"\p{L}", "[A-Za-z]"), (r"\p{N}", "[0-9]")):
        pattern = pattern.replace(classes, ascii_only)
    # Nearly all words. What begins with a letter, or a space and a letter, is the same word to each known expression;
    # said first, the others need not be tried.
    return f" ?[A-Za-z]+|{pattern}"
