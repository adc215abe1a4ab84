"""Tasks with an owner, for objects that live longer than one `async with` block."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class TaskOwner:
    """Starts tasks and answers for them: a failure is logged with the task's name, `close` cancels and awaits all.

    For tasks whose failure must stop their owner, use asyncio.TaskGroup instead.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # In the order of their start, which a set of objects would not keep: closing is part of what must repeat.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._closed = False

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Raises RuntimeError after close."""
        if self._closed:
            coroutine.close()
            raise RuntimeError(f"{self.name} is closed; cannot start {name}")
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self.name}: {name}")
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("task %s failed", task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Idempotent. Must not be called from one of the owned tasks."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
