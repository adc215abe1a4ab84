"""Engines for tests without the ten seconds that each spawned vLLM process imports: their cores are forked from the
process of the tests, which imports vLLM once."""

import asyncio
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from stator.engines.base import Engine
from stator.engines.vllm import started
from stator.engines.vllm.args import settings_from_section
from stator.engines.vllm.engine import VllmEngine
from stator.testing.contracts.engine_suite import EngineSettings, Scenario
from stator.testing.engine_bench import BenchEngine, running_engines

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def prepare() -> None:
    """Before vLLM is imported anywhere in this process."""
    os.environ.update(ENVIRONMENT)
    import vllm.v1.engine.async_llm
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401


class ForkLaunch:
    """Implements engines.vllm.started.Launch. From the main thread, since a fork takes along no other."""

    def has_gpu(self) -> bool:
        return False

    async def start(self, arguments: list[str], record: started.Record) -> started.StartedVllm:
        patch = pytest.MonkeyPatch()
        for name, module in list(sys.modules.items()):
            if name.startswith("vllm.") and hasattr(module, "get_mp_context"):
                patch.setattr(module, "get_mp_context", lambda: multiprocessing.get_context("fork"))
        try:
            return started.StartedVllm(started.build(arguments, record))
        finally:
            patch.undo()


def engine(section: dict[str, Any], *, hold_s: float = 30.0, spawned: bool = False) -> VllmEngine:
    """section: as a worker's, with engine keys only. spawned: as in production."""
    settings = settings_from_section(section)
    if spawned:
        return VllmEngine(settings, hold_s=hold_s)
    return VllmEngine(settings, hold_s=hold_s, launcher=ForkLaunch())


class EnginePool:
    """Pairs of engines that scenarios share, by their settings, on a loop that runs only while one waits."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None
        self._pairs: dict[EngineSettings, tuple[Any, list[BenchEngine]]] = {}

    def run(self, scenario: Scenario, settings: EngineSettings, make: Callable[[], Engine], *, bound_s: float) -> None:
        self._runner = runner = self._runner or asyncio.Runner()

        async def main() -> None:
            if settings not in self._pairs:
                world = running_engines(make(), make(), tcp=True)
                self._pairs[settings] = (world, await world.__aenter__())
            one, two = self._pairs[settings][1]
            await scenario(one, two)
            for each in (one, two):
                await each.until_idle()
                assert await each.engine.reset_prefix_cache()

        try:
            runner.run(asyncio.wait_for(main(), bound_s))
        except BaseException:
            # Whatever it left behind is nobody else's.
            self._end(settings)
            raise

    def close(self) -> None:
        for settings in list(self._pairs):
            self._end(settings)
        if self._runner is not None:
            self._runner.close()

    def _end(self, settings: EngineSettings) -> None:
        world, _ = self._pairs.pop(settings, (None, []))
        if world is not None and self._runner is not None:
            self._runner.run(world.__aexit__(None, None, None))
