"""Reading text that arrives in pieces as if it were all there.

A parser is a generator that calls the reader's steps with `yield from`; a step that needs text which has not come yet
yields, and goes on when it has. So a parser is written once, top to bottom, and cannot depend on how the text was cut:
a step decides on the text alone, waiting for as much as the decision takes.

Time is linear: text is consumed as soon as a step has decided on it, and what a step leaves unread is no longer than
the longest literal it waits for.
"""

import re
from collections.abc import Callable, Generator
from functools import cache
from typing import TypeVar

_T = TypeVar("_T")

Steps = Generator[None, None, _T]
"""A piece of a parser: yields while it waits for text, returns _T."""


class NotACall(Exception):
    """The text does not have the form that the parser expected, or is over before it."""


class Markers:
    """Several literals to look for at once. None may be the beginning of another."""

    def __init__(self, *texts: str) -> None:
        for text in texts:
            if any(other is not text and other.startswith(text) for other in texts):
                raise ValueError(f"marker {text!r} is empty, doubled, or begins another one")
        self.texts = texts
        self._found = re.compile("|".join(map(re.escape, texts)))
        # A tail of the text that may become a marker: some proper prefix, at the very end.
        self._begun = re.compile("(?:" + "|".join(_prefix_pattern(text) for text in texts) + r")\Z", re.DOTALL)
        self._reach = max(map(len, texts)) - 1

    def search(self, text: str, start: int) -> re.Match[str] | None:
        return self._found.search(text, start)

    def num_begun(self, text: str, start: int) -> int:
        """Length of the longest end of text[start:] with which some marker begins."""
        found = self._begun.search(text, max(start, len(text) - self._reach))
        return 0 if found is None else len(text) - found.start()


def _prefix_pattern(text: str) -> str:
    """Matches each proper, non-empty prefix: a, or ab, or abc, of abcd."""
    pattern = ""
    for char in reversed(text[:-1]):
        pattern = f"{re.escape(char)}(?:{pattern})?" if pattern else re.escape(char)
    return pattern or r"(?!)"


@cache
def run_of(char_class: str) -> re.Pattern[str]:
    """One or more characters of a class as regular expressions write them, without the brackets."""
    return re.compile(f"[{char_class}]+")


class TextReader:
    """max_held_chars: how much may be recorded before a step raises NotACall."""

    def __init__(self, max_held_chars: int) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._max_held = max_held_chars
        self._record: list[str] | None = None
        self._num_recorded = 0

    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    # Recording: what was consumed since `record`, so that it can be content after all.

    def record(self) -> None:
        self._record = []
        self._num_recorded = 0

    def recorded(self) -> str:
        """What was consumed since `record`. Ends the recording."""
        text = "".join(self._record or ())
        self._record = None
        return text

    def _take(self, end: int) -> str:
        if self._record is not None:
            # One past the bound and no further, so that how much is consumed does not depend on the cuts.
            end = min(end, self._at + self._max_held + 1 - self._num_recorded)
        taken = self._text[self._at : end]
        self._at = end
        if self._record is not None and taken:
            self._record.append(taken)
            self._num_recorded += len(taken)
            if self._num_recorded > self._max_held:
                raise NotACall
        return taken

    # Steps

    def _more(self) -> Steps[bool]:
        """Wait for more text; False if there is none to come."""
        if self._ended:
            return False
        num_before = len(self._text) - self._at
        while len(self._text) - self._at == num_before:
            yield
            if self._ended:
                return len(self._text) - self._at > num_before
        return True

    def peek(self) -> Steps[str]:
        """The next character, "" at the end."""
        while self._at >= len(self._text):
            if not (yield from self._more()):
                return ""
        return self._text[self._at]

    def available(self) -> Steps[tuple[str, int]]:
        """The buffer and where its unread part begins; at least one character, or NotACall at the end."""
        if not (yield from self.peek()):
            raise NotACall
        return self._text, self._at

    def take_to(self, end: int) -> str:
        """Consume up to a position of the buffer that `available` returned."""
        return self._take(end)

    def accept(self, *literals: str) -> Steps[str]:
        """Consume the longest of the literals that comes next and return it, or "" and consume nothing."""
        while True:
            num_left = len(self._text) - self._at
            waits = any(len(literal) > num_left and literal.startswith(self._text[self._at :]) for literal in literals)
            if not waits or not (yield from self._more()):
                break
        found = max((each for each in literals if self._text.startswith(each, self._at)), key=len, default="")
        self._take(self._at + len(found))
        return found

    def expect(self, *literals: str) -> Steps[str]:
        """`accept`, or NotACall."""
        found = yield from self.accept(*literals)
        if not found:
            raise NotACall
        return found

    def run(self, pattern: re.Pattern[str], max_chars: int) -> Steps[str]:
        """The longest run of characters of the class; NotACall if it is longer than max_chars."""
        pieces: list[str] = []
        num_chars = 0
        while (yield from self.peek()):
            found = pattern.match(self._text, self._at)
            if found is None:
                break
            pieces.append(self._take(min(found.end(), self._at + max_chars + 1 - num_chars)))
            num_chars += len(pieces[-1])
            if num_chars > max_chars:
                raise NotACall
        return "".join(pieces)

    def space(self) -> Steps[None]:
        """Consume white space."""
        while (yield from self.peek()):
            found = _SPACE.match(self._text, self._at)
            if found is None:
                break
            self._take(found.end())

    def until(self, markers: Markers, emit: Callable[[str], None]) -> Steps[str]:
        """Hand on text up to the first marker, as it comes, and consume the marker.

        Returns the marker, "" if the text ended without one.
        """
        while True:
            found = markers.search(self._text, self._at)
            if found is not None:
                self._hand_on(found.start(), emit)
                self._take(found.end())
                return found.group()
            self._hand_on(len(self._text) - markers.num_begun(self._text, self._at), emit)
            if not (yield from self._more()):
                self._hand_on(len(self._text), emit)
                return ""

    def text_until(self, markers: Markers, max_chars: int) -> Steps[tuple[str, str]]:
        """(text before the first marker, the marker); NotACall at the end, or past max_chars."""
        pieces: list[str] = []
        num_left = max_chars + 1
        while True:
            found = markers.search(self._text, self._at)
            end = len(self._text) - markers.num_begun(self._text, self._at) if found is None else found.start()
            pieces.append(self._take(min(end, self._at + num_left)))
            num_left -= len(pieces[-1])
            if not num_left:
                raise NotACall
            if found is not None:
                self._take(found.end())
                return "".join(pieces), found.group()
            if not (yield from self._more()):
                raise NotACall

    def _hand_on(self, end: int, emit: Callable[[str], None]) -> None:
        if end > self._at:
            emit(self._take(end))


_SPACE = re.compile(r"[ \t\r\n]+")
