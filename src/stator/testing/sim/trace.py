"""What happened in a run, as lines to read and as one digest to compare."""

import hashlib
import logging
from collections.abc import Callable

MAX_LINES = 200_000


class Trace:
    """now: virtual seconds, of each line. `note` is read by people; `mix` goes into the digest only."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.lines: list[str] = []
        self._now = now
        self._digest = hashlib.blake2b(digest_size=16)

    def note(self, who: str, what: str) -> None:
        line = f"{self._now():12.6f}  {who:<16}{what}"
        self._digest.update(line.encode("utf-8", "backslashreplace"))
        if len(self.lines) < MAX_LINES:
            self.lines.append(line)

    def mix(self, *values: float | str) -> None:
        self._digest.update(repr(values).encode())

    def digest(self) -> str:
        return self._digest.hexdigest()


class TraceHandler(logging.Handler):
    """Puts the product's warnings into a trace. who: the node whose code logs."""

    def __init__(self, trace: Trace, who: Callable[[], str]) -> None:
        super().__init__(logging.WARNING)
        self._trace = trace
        self._who = who

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        cause = "" if error is None else f" <- {type(error).__name__}: {error}"
        self._trace.note(self._who(), f"{record.levelname.lower()}: {record.getMessage()}{cause}")
