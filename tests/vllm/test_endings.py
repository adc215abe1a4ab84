"""How requests of real vLLM end that do not finish: cancelled in each of their phases, and with engines that drain,
hang and crash. With `-o log_cli=true -o log_cli_level=INFO` it says how long each took."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from stator.engines.vllm import engine as vllm_engine
from stator.errors import ErrorCode
from stator.ids import RequestId
from stator.messages.engine import EngineRequest, PrefillResult
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.testing.engine_bench import BenchEngine, RecordingSink, until
from stator.worker.progress import ProgressWatchdog
from vllm_engines.warm import HOLD_S, SECTION, Engines, core_pids, given_to_vllm, signal_core, start

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

FREE_S = 1.0
"""After a cancel all blocks of its request are free."""

MAX_NUM_SEQS: int = SECTION["max_num_seqs"]
LONG = 900
"""Tokens of a prompt that takes several steps."""


@pytest.fixture(scope="module")
def ours() -> Iterator[Engines]:
    """Four engines with Stator's connector: one prefills, two decodes, the others may be killed."""
    yield from start(4)


class Prompts:
    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)

    def __call__(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(300, 3000) for _ in range(num_tokens)]


def is_free(one: BenchEngine) -> bool:
    load = one.engine.load()
    return load.num_blocks_used == 0 and load.num_running == load.num_waiting == load.num_blocks_held == 0


def uses_blocks(one: BenchEngine) -> bool:
    return one.engine.load().num_blocks_used > 0


async def cancelled(phase: str, one: BenchEngine, *sinks: tuple[str, RecordingSink]) -> None:
    """Abort these requests of the engine, whose blocks are then free in time. The clock starts before the first."""
    await until(lambda: uses_blocks(one))
    began = loop_time()
    for name, _ in sinks:
        one.engine.abort(RequestId(name))
    for _, sink in sinks:
        assert (await sink.wait_error()).code is ErrorCode.CANCELLED
    await freed(phase, one, began)


async def freed(phase: str, one: BenchEngine, began: float) -> None:
    await until(lambda: is_free(one))
    took = loop_time() - began
    logger.info("%s: blocks free after %.0f ms", phase, took * 1000)
    assert took < FREE_S, phase


def loop_time() -> float:
    return asyncio.get_running_loop().time()


def test_a_cancel_while_waiting_computing_or_decoding_frees_all_blocks(ours: Engines) -> None:
    two, prompt = ours.engines[2], Prompts(1)

    def submit(num: int, num_tokens: int) -> list[tuple[str, RecordingSink]]:
        names = [ours.name() for _ in range(num)]
        return [(name, two.generate(make_request(name, prompt(num_tokens), max_tokens=100))) for name in names]

    async def scenario() -> None:
        running = submit(MAX_NUM_SEQS, 40)
        for _, sink in running:
            await asyncio.wait_for(sink.started.wait(), 60)
        waiting = submit(3, 40)
        await until(lambda: two.engine.load().num_waiting == 3)
        for name, sink in waiting:
            two.engine.abort(RequestId(name))
            assert (await sink.wait_error()).code is ErrorCode.CANCELLED
        assert not any(sink.received for _, sink in waiting), "they had no place in the batch"
        assert two.engine.load().num_waiting == 0
        await cancelled("decoding", two, *running)

        before = two.engine.load().prompt_tokens_total
        computing = submit(MAX_NUM_SEQS, LONG // 2)
        await until(lambda: uses_blocks(two))
        assert not all(sink.received for _, sink in computing), "their prompts take a step each"
        await cancelled("computing the prompt", two, *computing)
        assert two.engine.load().prompt_tokens_total - before < MAX_NUM_SEQS * (LONG // 2), "not all were computed"

    ours.run(scenario)


def test_a_cancel_while_the_prefill_engine_computes(ours: Engines) -> None:
    one, prompt = ours.engines[0], Prompts(2)

    async def scenario() -> None:
        sinks = [(ours.name(), RecordingSink()) for _ in range(4)]
        for name, sink in sinks:
            one.engine.prefill(make_request(name, prompt(LONG)), sink)
        await until(lambda: uses_blocks(one))
        assert not any(sink.received for _, sink in sinks)
        await cancelled("remote prefill", one, *sinks)

    ours.run(scenario)


def test_a_cancel_before_and_during_the_transfer(ours: Engines) -> None:
    one, two, prompt = ours.engines[0], ours.engines[2], Prompts(3)

    async def prefilled() -> tuple[EngineRequest, PrefillResult]:
        request = make_request(ours.name(), prompt(LONG), max_tokens=50)
        return request, await one.prefill(request)

    async def scenario() -> None:
        _, result = await prefilled()
        await until(lambda: uses_blocks(one))
        began = loop_time()
        one.engine.release(result.transfer["transfer_id"])
        await freed("before the transfer, at the prefill engine", one, began)

        request, result = await prefilled()
        try:
            # The peer stands still, so that nothing of the transfer comes.
            signal_core(one, signal.SIGSTOP)
            sink = two.generate(with_transfer(request, result.transfer))
            await until(lambda: two.engine.load().num_fetching == 1)
            await cancelled("in the transfer, at the decode engine", two, (request.request_id, sink))
            assert uses_blocks(one)
        finally:
            signal_core(one, signal.SIGCONT)
        await freed("in the transfer, at the prefill engine", one, loop_time())

    ours.run(scenario)


def test_a_storm_of_cancels_leaves_no_block(ours: Engines) -> None:
    """In the prefill, between the phases, in the transfer, and while decoding."""
    one, two = ours.engines[0], ours.engines[2]
    rng = Random(3)
    last_cancel = 0.0

    async def request(number: int) -> None:
        nonlocal last_cancel
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
        last_cancel = loop_time()
        two.engine.abort(RequestId(request.request_id))
        assert (await sink.wait_error()).code is ErrorCode.CANCELLED

    async def scenario() -> None:
        await asyncio.gather(*(request(number) for number in range(40)))
        await freed("a storm, at the decode engine", two, last_cancel)
        # Those of the 10 that nobody fetches go with their time.
        await until(lambda: not uses_blocks(one))
        assert loop_time() - last_cancel < HOLD_S + FREE_S

    ours.run(scenario)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_drain_waits_for_the_held_blocks_and_not_longer(ours: Engines) -> None:
    """Of an engine that has nothing else to do."""
    one, two, prompt = ours.engines[0], ours.engines[2], Prompts(4)

    async def scenario() -> None:
        requests = [make_request(ours.name(), prompt(100), max_tokens=2) for _ in range(4)]
        results = [await one.prefill(request) for request in requests]
        began = loop_time()
        drained = asyncio.ensure_future(one.engine.holds_ended())
        for request, result in zip(requests[1:], results[1:], strict=True):
            sink = await two.generate(with_transfer(request, result.transfer)).wait()
            assert sink.num_transferred > 64
            assert not drained.done(), "the first one's blocks are still held"
        released = loop_time()
        one.engine.release(results[0].transfer["transfer_id"])
        await asyncio.wait_for(drained, 10)
        logger.info("drain: over %.0f ms after the last release", (loop_time() - released) * 1000)
        assert loop_time() - released < FREE_S

        # And each of them fetched, none released.
        request = make_request(ours.name(), prompt(100), max_tokens=2)
        result = await one.prefill(request)
        drained = asyncio.ensure_future(one.engine.holds_ended())
        await two.generate(with_transfer(request, result.transfer)).wait()
        fetched = loop_time()
        await asyncio.wait_for(drained, 10)
        logger.info("drain: over %.0f ms after the last fetch", (loop_time() - fetched) * 1000)
        assert loop_time() - fetched < FREE_S
        assert loop_time() - began < HOLD_S, "or the holds have ended by their time"

    ours.run(scenario)


def test_death_of_the_decode_engine_in_mid_stream(ours: Engines) -> None:
    one = ours.engines[3]

    async def scenario() -> None:
        sinks = [one.generate(make_request(ours.name(), [400 + n] * 50, max_tokens=500)) for n in range(4)]
        for sink in sinks:
            await asyncio.wait_for(sink.started.wait(), 60)
        beginning = await given_to_vllm(one, ours.name())
        signal_core(one, signal.SIGABRT, signal.SIGCONT)
        assert (await beginning.wait_error()).code is ErrorCode.ENGINE_CRASHED, "its own end, in this one's first step"
        for sink in sinks:
            assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
        await until(lambda: bool(one.host.dead))
        late = await one.generate(make_request(ours.name(), [5])).wait_error()
        assert late.code is ErrorCode.ENGINE_DEAD

    ours.run(scenario)


def test_a_crash_of_the_prefill_engine_is_laid_to_the_prompt_it_computed(ours: Engines) -> None:
    one = ours.engines[1]

    async def scenario() -> None:
        await one.prefill(make_request(ours.name(), [500] * 100))
        drained = asyncio.ensure_future(one.engine.holds_ended())
        beginning = await given_to_vllm(one, ours.name(), prefill=True)
        assert not drained.done()
        died = loop_time()
        signal_core(one, signal.SIGABRT, signal.SIGCONT)
        assert (await beginning.wait_error()).code is ErrorCode.ENGINE_CRASHED
        await asyncio.wait_for(drained, 10)
        assert loop_time() - died < HOLD_S / 2, "blocks of an engine that is gone are not waited for"

    ours.run(scenario)


def watched(one: BenchEngine) -> tuple[ProgressWatchdog, list[str]]:
    stalls: list[str] = []
    watchdog = ProgressWatchdog(one.engine.load, one.info, timeout_s=1.5, on_stall=stalls.append)
    watchdog.start()
    return watchdog, stalls


def test_an_engine_whose_core_hangs_is_noticed_and_can_be_stopped(
    ours: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this file: no engine is left after it."""
    monkeypatch.setattr(vllm_engine, "SHUTDOWN_S", 1.0)
    one, two, prompt = ours.engines[0], ours.engines[2], Prompts(5)

    async def hung(what: BenchEngine, stalls: list[str], *sinks: RecordingSink) -> None:
        stopped = loop_time()
        await until(lambda: bool(stalls))
        logger.info("hung core, noticed after %.1f s: %s", loop_time() - stopped, stalls[0])
        pids = core_pids(what)
        await what.engine.stop()
        for sink in sinks:
            assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD, "a hang is laid to nobody"
        assert not [pid for pid in pids if is_alive(pid)]

    async def scenario() -> None:
        request = make_request(ours.name(), prompt(LONG), max_tokens=100)
        result = await one.prefill(request)
        watchdog, stalls = watched(two)
        # The prefill engine stands still; the decode engine waits for it, which is no hang.
        signal_core(one, signal.SIGSTOP)
        fetching = two.generate(with_transfer(request, result.transfer))
        await until(lambda: two.engine.load().num_fetching == 1)
        began, steps = loop_time(), two.engine.load().steps_total
        await until(lambda: loop_time() > began + 2.5)
        assert not stalls and two.engine.load().steps_total > steps
        signal_core(two, signal.SIGSTOP)
        await hung(two, stalls, fetching)
        watchdog.close()

        # What waits at an engine with held blocks is not moved either.
        watchdog, stalls = watched(one)
        assert one.engine.load().num_blocks_held > 0
        sink = one.generate(make_request(ours.name(), prompt(50)))
        await hung(one, stalls, sink)
        watchdog.close()

    ours.run(scenario)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
