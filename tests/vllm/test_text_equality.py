"""What the engine is for: alone and over several engines, vLLM behind Stator says what vLLM says by itself.

Float32, greedy. Two texts could part where two tokens are as good as equal; with these prompts none do, so that every
difference fails.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest

import stator
from stator.engines.vllm.engine import VllmEngine
from stator.errors import ErrorCode
from stator.ids import RequestId
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.testing.engine_bench import BenchEngine, RecordingSink, running_engines, until
from vllm_engines import forked
from vllm_engines.engine_process import engine_processes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

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
_T = TypeVar("_T")


def prompts() -> list[list[int]]:
    """Short, at block borders, long, with shared prefixes, and multi-byte: 34 in all."""
    from stator.processor.tokenizer import ModelTokenizer

    rng = Random(7)

    def words(count: int) -> list[int]:
        return [rng.randrange(300, 3000) for _ in range(count)]

    tokenizer = ModelTokenizer.load(MODEL)
    texts = [
        "Grüße aus Köln: äöü ß €",
        "日本語のテキスト、長い文章。",
        "שלום עולם",
        "🦊🐇 naïve café",
        "In the beginning",
    ]
    shared = words(3 * SIZE + 5)
    found = [words(n) for n in (1, 2, 3, 5, 8, 13, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1)]
    found += [words(n) for n in (3 * SIZE, 4 * SIZE + 7, 200, 256, 257, 300, 400, 512, 513, 700)]
    found += [[*shared, *words(n)] for n in (1, 7, SIZE, 60)] + [shared, shared[: 2 * SIZE], shared[: 2 * SIZE + 1]]
    found += [list(memoryview(tokenizer.encode(text, add_special_tokens=True)).cast("I")) for text in texts]
    return found


class Offline:
    """vLLM's own answers, from its `LLM` in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.prompts = prompts()
        with engine_processes(1, directory) as (engine,):
            engine.start(**SECTION)
            self.answers = [engine.run(f"o{n}", ids, NUM_TOKENS)["ids"] for n, ids in enumerate(self.prompts)]

    def check(self, texts: list[list[int]]) -> None:
        different = [n for n, text in enumerate(texts) if text != self.answers[n]]
        assert not different, [(n, len(self.prompts[n]), self.answers[n], texts[n]) for n in different]
        assert [len(text) for text in texts] == [NUM_TOKENS] * len(self.prompts)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    return Offline(tmp_path_factory.mktemp("offline"))


class Engines:
    """Started engines on one loop that runs only while a test waits."""

    def __init__(self, runner: asyncio.Runner, engines: list[BenchEngine]) -> None:
        self._runner = runner
        self.engines = engines
        self._serial = 0

    def run(self, scenario: Callable[[], Awaitable[_T]]) -> _T:
        async def bounded() -> _T:
            async with asyncio.timeout(240):
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


def start(count: int, connector: dict[str, Any] | None) -> Iterator[Engines]:
    forked.prepare()
    section = SECTION if connector is None else {**SECTION, "kv_transfer_config": connector}
    engines = [forked.engine(section, hold_s=6.0, spawned=connector is not None) for _ in range(count)]
    with asyncio.Runner() as runner:
        world = running_engines(*engines, tcp=True)
        started = runner.run(world.__aenter__())
        try:
            yield Engines(runner, started)
        finally:
            runner.run(world.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def ours() -> Iterator[Engines]:
    """Four engines with Stator's connector."""
    yield from start(4, None)


def test_aggregated_text_is_vllms_own(offline: Offline, ours: Engines) -> None:
    async def scenario() -> list[list[int]]:
        one = ours.engines[0]
        return list(await asyncio.gather(*(ours.aggregated(ids, one) for ids in offline.prompts)))

    assert len(offline.prompts) >= 30
    offline.check(ours.run(scenario))
    ours.run(ours.forget)


def test_disaggregated_text_is_vllms_own_with_all_pairings(offline: Offline, ours: Engines) -> None:
    prefill, decode = ours.engines[:2], ours.engines[2:]

    async def scenario(one: BenchEngine, two: BenchEngine) -> list[tuple[list[int], int]]:
        return [await ours.disaggregated(ids, one, two) for ids in offline.prompts]

    for one in prefill:
        for two in decode:
            found = ours.run(lambda one=one, two=two: scenario(one, two))
            offline.check([text for text, _ in found])
            # What the decode engine has of an earlier prompt is not fetched again.
            assert sum(fetched for _, fetched in found) > sum(map(len, offline.prompts)) / 2
            ours.run(ours.forget)


def test_a_storm_of_cancels_leaves_no_block(ours: Engines) -> None:
    """In the prefill, between the phases, in the transfer, and while decoding."""
    one, two = ours.engines[0], ours.engines[2]
    rng = Random(3)

    async def request(number: int) -> None:
        ids = [rng.randrange(300, 3000) for _ in range(rng.randrange(20, 500))]
        request = make_request(f"storm{number}", ids, max_tokens=200)
        sink = RecordingSink()
        one.engine.prefill(request, sink)
        if number % 4 == 0:
            await turns(rng.randrange(1, 200))
            one.engine.abort(request.request_id)
            await sink.ended.wait()
            return
        result = (await sink.wait()).prefill_result
        if number % 4 == 1:
            return  # nobody comes for it: the hold expires, or is released
        sink = RecordingSink()
        two.engine.generate(with_transfer(request, result.transfer), sink)
        if number % 4 == 3:
            await asyncio.wait_for(sink.started.wait(), 60)
        await turns(rng.randrange(0, 20))
        two.engine.abort(RequestId(request.request_id))
        assert (await sink.wait_error()).code is ErrorCode.CANCELLED

    async def scenario() -> None:
        await asyncio.gather(*(request(number) for number in range(40)))
        loop = asyncio.get_running_loop()
        ended = loop.time()
        # Held blocks of the 10 that nobody fetches go after hold_s; all others must be free within 5 s.
        await until(lambda: two.engine.load().num_blocks_used == 0)
        assert loop.time() - ended < 5.0
        await until(lambda: one.engine.load().num_blocks_used == 0)
        assert loop.time() - ended < 6.0 + 5.0

    ours.run(scenario)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def kill_core(one: BenchEngine) -> None:
    assert isinstance(one.engine, VllmEngine)
    for pid in one.engine.core_pids():
        os.kill(pid, signal.SIGKILL)


def test_death_of_the_prefill_engine_between_the_phases(offline: Offline, ours: Engines) -> None:
    one, two = ours.engines[1], ours.engines[3]

    async def scenario() -> list[list[int]]:
        requests = [make_request(ours.name(), each, max_tokens=NUM_TOKENS) for each in offline.prompts]
        results = [await one.prefill(request) for request in requests]
        kill_core(one)
        await until(lambda: bool(one.host.dead))
        pairs = zip(requests, results, strict=True)
        sinks = [two.generate(with_transfer(request, result.transfer)) for request, result in pairs]
        return [(await sink.wait()).token_ids for sink in sinks]

    offline.check(ours.run(scenario))
    assert len(one.host.dead) == 1


def test_death_of_the_decode_engine_in_mid_stream(ours: Engines) -> None:
    one = ours.engines[3]

    async def scenario() -> None:
        sinks = [one.generate(make_request(ours.name(), [400 + n] * 50, max_tokens=500)) for n in range(4)]
        for sink in sinks:
            await asyncio.wait_for(sink.started.wait(), 60)
        kill_core(one)
        for sink in sinks:
            assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
        await until(lambda: bool(one.host.dead))
        late = await one.generate(make_request(ours.name(), [5])).wait_error()
        assert late.code is ErrorCode.ENGINE_DEAD

    ours.run(scenario)


@pytest.fixture(scope="module")
def nixl() -> Iterator[Engines]:
    """Two engines: each of NIXL's has a thread that takes a core even when idle."""
    yield from start(2, {"kv_connector": "NixlConnector"})


def test_disaggregated_text_over_nixl(offline: Offline, nixl: Engines) -> None:
    one, two = nixl.engines

    async def scenario() -> list[tuple[list[int], int]]:
        return [await nixl.disaggregated(ids, one, two) for ids in offline.prompts]

    found = nixl.run(scenario)
    offline.check([text for text, _ in found])
    assert sum(fetched for _, fetched in found) > sum(map(len, offline.prompts)) / 2

    async def backwards() -> tuple[list[int], int]:
        return await nixl.disaggregated(offline.prompts[-8], two, one)

    text, _ = nixl.run(backwards)
    assert text == offline.answers[-8]
    nixl.run(nixl.forget)


def test_nobody_comes_for_a_prefill_over_nixl(nixl: Engines) -> None:
    async def scenario() -> None:
        one = nixl.engines[0]
        released = await one.prefill(make_request(nixl.name(), [900 + n for n in range(100)]))
        await one.prefill(make_request(nixl.name(), [1900 + n for n in range(100)]))
        await until(lambda: one.engine.load().num_blocks_used >= 8)
        one.engine.release(released.transfer["transfer_id"])
        await until(lambda: one.engine.load().num_blocks_used == 0)

    nixl.run(scenario)
