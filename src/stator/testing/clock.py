"""An event loop whose time jumps: where a real loop would sleep until the next timer, this one moves its clock there.

For tests and simulations that have no real IO to wait for (in-process carriers, memory, pure cores in shells). What
takes ten minutes of timeouts runs in milliseconds, and always in the same order.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

STUCK_AFTER_REAL_S = 10.0


class _JumpingSelector(selectors.DefaultSelector):
    """Reports what is ready now; where it should wait, it moves the loop's clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout is not None and timeout <= 0:
            return ready
        if timeout is not None:
            self.now += timeout
            return []
        # No timer at all: only another thread or a socket can still wake the loop.
        ready = super().select(STUCK_AFTER_REAL_S)
        if not ready:
            raise RuntimeError("every task waits and no timer is set: this program would never continue")
        return ready


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Starts at 0.0. Waiting for a socket or a thread beside a timer is a race with a clock that jumps: avoid it."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def advance(self, seconds: float) -> None:
        """As if the callback that runs now took so long."""
        self._jumping.now += seconds

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Without a timeout: on a clock that jumps it would pass before any thread could end."""
        await super().shutdown_default_executor()


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on a VirtualClockLoop."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)
