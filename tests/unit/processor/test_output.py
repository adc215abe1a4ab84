from collections.abc import Sequence

import pytest

from stator.core.detokenize import ByteDetokenizer
from stator.processor.output import OutputText

LETTERS = {ord(char): char.encode() for char in "abcdefgh. "}


def output(*stops: str, min_tokens: int = 0) -> OutputText:
    return OutputText(ByteDetokenizer(LETTERS), stops, min_tokens=min_tokens, stop_ids={ord(".")})


def ids(text: str) -> Sequence[int]:
    return [ord(char) for char in text]


def test_without_stop_strings_text_passes() -> None:
    out = output()
    assert out.push(ids("abc")) + out.push_last(ids("d"), stopped=False) == "abcd"
    assert (out.num_tokens, out.stopped) == (4, False)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_text_and_count_at_a_stop_do_not_depend_on_the_cut(size: int) -> None:
    out, text, shown = output("de"), "abcdefgh", ""
    for at in range(0, len(text), size):
        shown += out.push(ids(text[at : at + size]))
        if out.stopped:
            break
    assert (shown, out.num_tokens, out.stopped) == ("abc", 5, True)


def test_the_token_that_stopped_the_engine_is_counted_and_not_shown() -> None:
    out = output("zz")
    assert out.push_last(ids("ab."), stopped=True) == "ab"
    assert out.num_tokens == 3


def test_a_stop_token_in_the_middle_or_at_the_length_limit_is_text() -> None:
    out = output()
    assert out.push(ids("a.b")) + out.push_last(ids("."), stopped=False) == "a.b."


def test_a_stop_string_before_the_stop_token_wins() -> None:
    out = output("b")
    assert out.push_last(ids("abc."), stopped=True) == "a"
    assert (out.num_tokens, out.stopped) == (2, True)


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens() -> None:
    out = output("b", min_tokens=2)
    assert out.push(ids("abab")) == "aba"
    assert (out.num_tokens, out.stopped) == (4, True)


def test_what_was_held_back_comes_last() -> None:
    out = output("cdx")
    assert [out.push(ids("abc")), out.push_last(ids("d"), stopped=False)] == ["ab", "cd"]
