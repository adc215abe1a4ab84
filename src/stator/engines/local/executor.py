"""Where a local engine computes: the seam between its loop, which plans and delivers, and whatever takes time."""

from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

from stator.engines.local.runner import Chunk, Runner

P = ParamSpec("P")
T = TypeVar("T")


class StepExecutor(Protocol):
    """Computes jobs and steps one after another, in the order of the calls.

    That order is what keeps KV blocks consistent: a copy into blocks which were freed while it waited is over before
    any step that was planned after the blocks got a new owner, and that owner writes them before it reads them. An
    executor that computes at once, within the call, keeps it too. It belongs to one event loop.
    """

    async def run(self, job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Load the model, or read blocks. Raises what the job raises, and RuntimeError after close."""
        ...

    async def step(self, runner: Runner, chunks: Sequence[Chunk]) -> list[int | None]:
        """`runner.step(chunks)`; returns when the step's time is over, one token or None for each chunk."""
        ...

    async def receive(self, runner: Runner, blocks: Sequence[tuple[int, bytes]]) -> None:
        """`import_blocks`; returns when the contents are in the blocks, never writes once cancelled before it began.

        Raises ValueError for contents that do not fit.
        """
        ...

    async def close(self) -> None:
        """Wait for the jobs that were given, then leave no thread behind. Idempotent."""
        ...


ExecutorFactory = Callable[[], StepExecutor]
"""Called by `LocalEngine.start`, on its loop."""
