"""Text with the white space at its end held back, since it may be markup that goes with what follows."""

MAX_SPACE_CHARS = 1 << 16
"""Of one run; a longer one is text, all of it."""


class TrailingSpace:
    def __init__(self) -> None:
        self._held: list[str] = []
        self._num_held = 0
        self._too_long = False

    def add(self, text: str) -> str:
        """What may be shown now: what was held, and the text up to the white space at its end."""
        shown = text.rstrip()
        space = text[len(shown) :]
        if shown:
            shown = self.take() + shown
            self._too_long = False
        if self._too_long:
            return shown + space
        self._held.append(space)
        self._num_held += len(space)
        if self._num_held <= MAX_SPACE_CHARS:
            return shown
        self._too_long = True
        return shown + self.take()

    def take(self) -> str:
        """What is held, which then is not any more."""
        held = "".join(self._held)
        self._held.clear()
        self._num_held = 0
        return held
