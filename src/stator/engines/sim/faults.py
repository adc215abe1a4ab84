"""What a test may do to a simulated engine. A deployment has no way to ask for it."""

import asyncio
from collections.abc import Callable, Sequence

from stator.engines.local.runner import Chunk


class SimulatedCrash(Exception):
    """The engine's step failed because a test wanted it to."""


class StepFaults:
    """Faults of an engine's steps; of no effect until used, and usable at any time on the engine's loop.

    slowdown: steps take so many times longer than the timing model says, from the next on. crash_if: of a step's
    chunks, whether it fails; a poison request is one whose chunks do.
    """

    def __init__(self) -> None:
        self.slowdown = 1.0
        self.crash_if: Callable[[Sequence[Chunk]], bool] | None = None
        self._crash: str | None = None
        self._hanging = False
        self._changed: asyncio.Event = asyncio.Event()

    def crash(self, reason: str = "simulated crash") -> None:
        """The step under way fails at its end, else the next one. Ends a hang."""
        self._crash = reason
        self._changed.set()

    def hang(self) -> None:
        """The step under way, else the next one, does not return before `release`, `crash` or the engine's stop."""
        self._hanging = True
        self._changed.clear()

    def release(self) -> None:
        """Steps return again."""
        self._hanging = False
        self._changed.set()

    @property
    def is_hanging(self) -> bool:
        return self._hanging

    async def pass_or_fail(self, chunks: Sequence[Chunk]) -> None:
        """At a step's end. Raises SimulatedCrash."""
        while self._hanging and self._crash is None:
            await self._changed.wait()
        if self._crash is not None:
            reason, self._crash = self._crash, None
            raise SimulatedCrash(reason)
        if self.crash_if is not None and self.crash_if(chunks):
            raise SimulatedCrash("simulated crash of a step with a request that crashes engines")
