"""The one thread on which a local engine computes and copies KV blocks."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from stator.engines.local.runner import Chunk, Runner, import_blocks

P = ParamSpec("P")
T = TypeVar("T")


def _nothing() -> None:
    return


class WorkerThread:
    """A StepExecutor: runs jobs one after another on a thread, so that the loop goes on while numpy computes."""

    def __init__(self, name: str = "stator-engine") -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._closed = False

    async def run(self, job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Cancelling the caller drops a job that has not begun; one that has runs to its end unwatched.

        Raises RuntimeError after close.
        """
        return await asyncio.wrap_future(self._executor.submit(job, *args, **kwargs))

    async def step(self, runner: Runner, chunks: Sequence[Chunk]) -> list[int | None]:
        return await self.run(runner.step, chunks)

    async def receive(self, runner: Runner, blocks: Sequence[tuple[int, bytes]]) -> None:
        await self.run(import_blocks, runner, blocks)

    async def close(self) -> None:
        """Wait for the jobs that were given, then end the thread. Idempotent."""
        if self._closed:
            return
        await self.run(_nothing)
        self._closed = True
        # The thread is idle now, so this join takes no time.
        self._executor.shutdown(wait=True)
