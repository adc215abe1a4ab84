"""The one thread on which a local engine computes and copies KV blocks."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def _nothing() -> None:
    return


class WorkerThread:
    """Runs jobs one after another, in the order of the calls to `run`.

    That order is what keeps KV blocks consistent: a copy into blocks which were freed while it waited is over before
    any step that was planned after the blocks got a new owner, and that owner writes them before it reads them.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._closed = False

    async def run(self, job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Cancelling the caller drops a job that has not begun; one that has runs to its end unwatched.

        Raises RuntimeError after close.
        """
        return await asyncio.wrap_future(self._executor.submit(job, *args, **kwargs))

    async def close(self) -> None:
        """Wait for the jobs that were given, then end the thread. Idempotent."""
        if self._closed:
            return
        await self.run(_nothing)
        self._closed = True
        # The thread is idle now, so this join takes no time.
        self._executor.shutdown(wait=True)
