"""Prompts of hot_path.py: a few words in random order, or natural text that never repeats."""

import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random

WORDS = re.findall(
    r"\w+",
    "the red blue quick old stone river table light wind holds every small garden letter green winter music under "
    "bridge open window silver paper morning against market nothing question forest between seven",
)


@cache
def documentation() -> str:
    """Docstrings of Python's standard library, in a fixed order: about two million characters of English and some code,
    with 12,000 different words."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"}.isdisjoint(path.parts):
            source = path.read_text(encoding="utf-8", errors="ignore")
            texts += [" ".join(text.split()) for text in re.findall(r'"""(.+?)"""', source, re.DOTALL)]
    return "\n".join(texts)


def word_prompts(rng: Random, num_words: int) -> Iterator[str]:
    while True:
        yield " ".join(rng.choices(WORDS, k=num_words))


def text_prompts(rng: Random, num_chars: int) -> Iterator[str]:
    """Consecutive pieces from a random place on: no piece comes twice before all have come."""
    text = documentation()
    at = rng.randrange(len(text))
    while True:
        yield text[at : at + num_chars]
        at += num_chars
        if at > len(text):
            at = rng.randrange(num_chars)


PROMPTS: dict[str, Callable[[Random, int], Iterator[str]]] = {"words": word_prompts, "text": text_prompts}
"""By kind: an endless iterator of prompts of a length in the kind's own unit."""
