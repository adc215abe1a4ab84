"""Finished prefills whose blocks vLLM keeps: what `release` and a drain need to know of them.

vLLM frees the blocks itself, when they were fetched or released or their time is over; how many are still there it says
with each step. While it keeps any it makes step after step, so that the count is never old.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stator.engines.vllm.load import LoadCounter
from stator.ids import TransferId


@dataclass(frozen=True, slots=True)
class _Hold:
    """handed: `PrefillResult.transfer`. until: when it ends at the latest, in the loop's time."""

    handed: dict[str, Any]
    until: float


class Holds:
    """hold_s: how long vLLM keeps them. counter: of the engine's steps. num_blocks: held now, as vLLM said last."""

    def __init__(self, hold_s: float, counter: LoadCounter, num_blocks: Callable[[], int]) -> None:
        self._hold_s = hold_s
        self._counter = counter
        self._num_blocks = num_blocks
        self._holds: dict[TransferId, _Hold] = {}
        self._num_steps = 0

    def keep(self, transfer_id: TransferId, handed: dict[str, Any], now: float) -> None:
        for old in [key for key, hold in self._holds.items() if hold.until <= now]:
            del self._holds[old]
        self._holds[transfer_id] = _Hold(handed, now + self._hold_s)
        self._num_steps = self._counter.num_steps

    def take(self, transfer_id: TransferId) -> dict[str, Any] | None:
        """What was handed out for it; None if it is not known, or no longer."""
        hold = self._holds.pop(transfer_id, None)
        self._counter.changed.set()
        return None if hold is None else hold.handed

    def clear(self) -> None:
        """The engine has ended: nothing is there to be fetched."""
        self._holds.clear()
        self._counter.changed.set()

    async def ended(self) -> None:
        """Until none is left, or would be."""
        loop = asyncio.get_running_loop()
        while self._any_left() and (until := max((hold.until for hold in self._holds.values()), default=0.0)):
            if until <= loop.time():
                return
            self._counter.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._counter.changed.wait()

    def _any_left(self) -> bool:
        # A step's results come before its figures: the count includes the newest hold only after a record.
        return self._counter.num_steps == self._num_steps or self._num_blocks() > 0
