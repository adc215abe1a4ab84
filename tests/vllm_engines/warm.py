"""Small engines that a file of tests starts once, on a loop that runs only while a test waits."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import stator
from stator.engines.vllm.engine import VllmEngine
from stator.ids import RequestId
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.testing.engine_bench import BenchEngine, RecordingSink, running_engines, until
from vllm_engines import forked

MODEL = Path(stator.__file__).parent / "models" / "tiny-llama"
SIZE = 32
NUM_TOKENS = 16
NUM_BLOCKS = 160
SECTION: dict[str, Any] = {
    "model": str(MODEL),
    "served_model_name": "tiny-llama",
    "dtype": "float32",
    "block_size": SIZE,
    "max_model_len": 1024,
    "num_gpu_blocks_override": NUM_BLOCKS + 1,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "enforce_eager": True,
}
HOLD_S = 6.0
SCENARIO_S = 240.0
_T = TypeVar("_T")


class Engines:
    """Started engines on one loop that runs only while a test waits."""

    def __init__(self, runner: asyncio.Runner, engines: list[BenchEngine]) -> None:
        self._runner = runner
        self.engines = engines
        self._serial = 0

    def run(self, scenario: Callable[[], Awaitable[_T]]) -> _T:
        async def bounded() -> _T:
            async with asyncio.timeout(SCENARIO_S):
                return await scenario()

        return self._runner.run(bounded())

    def name(self) -> str:
        self._serial += 1
        return f"r{self._serial}"

    async def aggregated(self, ids: list[int], one: BenchEngine) -> list[int]:
        return await one.text(make_request(self.name(), ids, max_tokens=NUM_TOKENS))

    async def disaggregated(self, ids: list[int], one: BenchEngine, two: BenchEngine) -> tuple[list[int], int]:
        """The text, and how many tokens were fetched."""
        request = make_request(self.name(), ids, max_tokens=NUM_TOKENS)
        result = await one.prefill(request)
        sink = await two.generate(with_transfer(request, result.transfer)).wait()
        return sink.token_ids, sink.num_transferred

    async def forget(self) -> None:
        for one in self.engines:
            await one.until_idle()
            assert await one.engine.reset_prefix_cache()


def start(count: int, connector: dict[str, Any] | None = None) -> Iterator[Engines]:
    """connector: None for Stator's, and then the engines' cores are forked."""
    forked.prepare()
    section = SECTION if connector is None else {**SECTION, "kv_transfer_config": connector}
    engines = [forked.engine(section, hold_s=HOLD_S, spawned=connector is not None) for _ in range(count)]
    with asyncio.Runner() as runner:
        world = running_engines(*engines, tcp=True)
        started = runner.run(world.__aenter__())
        try:
            yield Engines(runner, started)
        finally:
            runner.run(world.__aexit__(None, None, None))


def signal_core(one: BenchEngine, *signals: int) -> None:
    for pid in core_pids(one):
        for each in signals:
            os.kill(pid, each)


async def given_to_vllm(one: BenchEngine, name: str, *, prefill: bool = False) -> RecordingSink:
    """A request that vLLM has, and has not begun: its core stands still."""
    signal_core(one, signal.SIGSTOP)
    request, sink = make_request(name, [450] * 300), RecordingSink()
    (one.engine.prefill if prefill else one.engine.generate)(request, sink)
    assert isinstance(one.engine, VllmEngine)
    stream = one.engine._streams[RequestId(name)]
    await until(lambda: stream.core_id is not None)
    return sink


def core_pids(one: BenchEngine) -> list[int]:
    assert isinstance(one.engine, VllmEngine)
    return one.engine.core_pids()
