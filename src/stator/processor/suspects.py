"""Requests that an engine died with go on one after another.

A step computes several prompts, and when the engine dies of one, all of them are suspects. Sent on together they would
be in one step again, and the second crash would be held against all. So of a Processor's suspects only one is anywhere
between its booking and its first token; the others wait in line. The one that is to blame meets its second victim
alone.
"""

import asyncio
from collections.abc import Callable


class SuspectLine:
    """go: names a request, and is called, on the loop, when its turn has come."""

    def __init__(self) -> None:
        self._current: Callable[[], None] | None = None
        self._line: dict[Callable[[], None], None] = {}

    def may_go(self, go: Callable[[], None]) -> bool:
        """Whether it is this request's turn; otherwise it is in line now, or was."""
        if self._current is None:
            self._current = go
        if self._current == go:
            return True
        self._line[go] = None
        return False

    def leave(self, go: Callable[[], None]) -> None:
        """It has its first token, or failed, or is over. Idempotent."""
        self._line.pop(go, None)
        if self._current != go:
            return
        self._current = next(iter(self._line), None)
        if self._current is not None:
            del self._line[self._current]
            asyncio.get_running_loop().call_soon(self._current)
