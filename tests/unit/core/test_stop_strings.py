import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.stop_strings import StopStringMatcher


def model(stops: list[str], text: str) -> tuple[str, str | None]:
    """What may be emitted in the end, by searching the whole text."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    _, start, stop = min(found)
    return text[:start], stop


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    at = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    return [text[a:b] for a, b in zip(at, at[1:], strict=False)]


alphabet = st.text("aab^]-\\é", max_size=30)


@given(st.lists(st.text("aab^]-\\é", min_size=1, max_size=5), max_size=5), alphabet, st.lists(st.integers(0, 30)))
def test_any_chunking_agrees_with_search_on_the_whole_text(stops: list[str], text: str, cuts: list[int]) -> None:
    matcher = StopStringMatcher(stops)
    emitted = "".join(matcher.feed(piece) for piece in pieces_of(text, cuts)) + matcher.flush()
    assert (emitted, matcher.matched) == model(stops, text)


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.text("ab", max_size=20))
def test_holds_exactly_what_may_still_become_a_match(stops: list[str], text: str) -> None:
    matcher = StopStringMatcher(stops)
    emitted = ""
    for at, char in enumerate(text):
        emitted += matcher.feed(char)
        if matcher.matched is not None:
            assert matcher.held == ""
            return
        seen = text[: at + 1]
        held = max(
            (n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])),
            default=0,
        )
        assert (emitted, matcher.held) == (seen[: len(seen) - held], seen[len(seen) - held :])


def test_text_after_the_match_is_not_emitted() -> None:
    matcher = StopStringMatcher(["\n\n"])
    assert matcher.feed("one\n") == "one"
    assert matcher.feed("\ntwo") == "\n"[:0]
    assert matcher.matched == "\n\n"
    assert matcher.feed("three") == ""
    assert matcher.flush() == ""


def test_text_held_back_in_vain_comes_with_the_next_piece_or_at_the_end() -> None:
    matcher = StopStringMatcher(["<end>"])
    assert [matcher.feed("a <en"), matcher.feed("try"), matcher.feed("<e"), matcher.flush()] == [
        "a ",
        "<entry",
        "",
        "<e",
    ]
    assert matcher.matched is None


def test_of_two_that_end_together_the_longer_one_matches() -> None:
    matcher = StopStringMatcher(["b", "ab"])
    assert matcher.feed("xab") == "x"
    assert matcher.matched == "ab"


def test_no_stop_strings_pass_everything() -> None:
    matcher = StopStringMatcher([])
    assert matcher.feed("abc") == "abc"
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStringMatcher([""])
