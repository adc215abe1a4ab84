"""What the engine is for: alone and over several engines, vLLM behind Stator says what vLLM says by itself.

Float32, greedy. Two texts could part where two tokens are as good as equal; with these prompts none do, so that every
difference fails.
"""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from stator.errors import ErrorCode
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.testing.engine_bench import BenchEngine, until
from vllm_engines.engine_process import engine_processes
from vllm_engines.warm import MODEL, NUM_TOKENS, SECTION, SIZE, Engines, given_to_vllm, signal_core, start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


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


@pytest.fixture(scope="module")
def ours() -> Iterator[Engines]:
    """Four engines with Stator's connector."""
    yield from start(4)


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


def test_death_of_the_prefill_engine_between_the_phases(offline: Offline, ours: Engines) -> None:
    one, two = ours.engines[1], ours.engines[3]

    async def scenario() -> list[list[int]]:
        requests = [make_request(ours.name(), each, max_tokens=NUM_TOKENS) for each in offline.prompts]
        results = [await one.prefill(request) for request in requests]
        beginning = await given_to_vllm(one, ours.name())
        signal_core(one, signal.SIGKILL)
        assert (await beginning.wait_error()).code is ErrorCode.ENGINE_DEAD, "killed, which is nobody's fault"
        await until(lambda: bool(one.host.dead))
        pairs = zip(requests, results, strict=True)
        sinks = [two.generate(with_transfer(request, result.transfer)) for request, result in pairs]
        return [(await sink.wait()).token_ids for sink in sinks]

    offline.check(ours.run(scenario))
    assert len(one.host.dead) == 1


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

    async def drained() -> None:
        # Every hold was fetched: a drain of either side has nothing to wait for.
        await asyncio.wait_for(asyncio.gather(one.engine.holds_ended(), two.engine.holds_ended()), 1.0)

    nixl.run(drained)


def test_nobody_comes_for_a_prefill_over_nixl(nixl: Engines) -> None:
    async def scenario() -> None:
        one = nixl.engines[0]
        released = await one.prefill(make_request(nixl.name(), [900 + n for n in range(100)]))
        await one.prefill(make_request(nixl.name(), [1900 + n for n in range(100)]))
        await until(lambda: one.engine.load().num_blocks_used >= 8)
        one.engine.release(released.transfer["transfer_id"])
        await until(lambda: one.engine.load().num_blocks_used == 0)

    nixl.run(scenario)
