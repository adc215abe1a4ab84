"""A client that leaves, in each phase of its request: all is free within a second, on both sides of a transfer.

All components are the product's, in one process; runners are held in a step to keep a request in its phase. What
notices a lost job a second later as well is switched off where the cancel itself is the subject.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from deployment import ALWAYS, Node, run
from front import Front, fronted, seen, until

from stator.core.disagg import DisaggPolicy
from stator.ids import JobId, RequestId
from stator.messages.engine import EngineRequest, PrefillJob, SamplingParams
from stator.messages.tokens import pack
from stator.testing.fake_runner import FakeRunner
from stator.worker import DecodeWorker, prefill

LOCAL = DisaggPolicy()
LONG = [10 + n % 300 for n in range(160)]


@pytest.fixture
def cancel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "EXTEND_EVERY_S", 1000.0)


class Held:
    """Holds a runner's method until `go`; `entered` says that it is in there."""

    def __init__(self, runner: FakeRunner, method: str = "step") -> None:
        self._go = threading.Event()
        self._entered = threading.Event()
        self._runner, self._method = runner, method
        held: Callable[..., Any] = getattr(runner, method)

        self._held = held

        def hold(*arguments: Any) -> Any:
            self._entered.set()
            assert self._go.wait(30)
            return held(*arguments)

        setattr(runner, method, hold)

    async def entered(self) -> None:
        await until(self._entered.is_set)

    def go(self) -> None:
        setattr(self._runner, self._method, self._held)
        self._go.set()


def slow(node: Node, step_s: float) -> None:
    node.runner.before_step = lambda: time.sleep(step_s)


async def still_serves(front: Front) -> None:
    assert (await front.ask(LONG[:30]).wait()).error is None
    assert await front.all_free() < 1.0


def test_waiting_in_the_decode_engine() -> None:
    async def scene() -> None:
        async with fronted(max_num_seqs=1) as (d, front):
            decode = await d.add_decode(LOCAL)
            await seen(d, decode)
            held = Held(decode.runner)
            first = front.ask(LONG[:9])
            await held.entered()
            second = front.ask(LONG[:12])
            await until(lambda: decode.engine.load().num_waiting == 1)
            second.cancel()
            await until(lambda: decode.engine.load().num_waiting == 0, 1.0)
            held.go()
            assert (await first.wait()).error is None
            await front.all_free()

    run(scene)


@pytest.mark.parametrize("max_num_batched_tokens", [4, 64])
def test_prefilling_and_decoding_here(max_num_batched_tokens: int) -> None:
    async def scene() -> None:
        async with fronted(max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens) as (d, front):
            decode = await d.add_decode(LOCAL)
            await seen(d, decode)
            slow(decode, 0.02)
            asked = front.ask(LONG, 300)
            if max_num_batched_tokens == 4:
                await until(lambda: decode.engine.load().steps_total > 5)
                assert not asked.deltas
            else:
                await asked.first.wait()
            asked.cancel()
            assert await front.all_free() < 1.0
            steps = decode.engine.load().steps_total
            await asyncio.sleep(0.1)
            assert decode.engine.load().steps_total <= steps + 1, "it computes on"
            await still_serves(front)

    run(scene)


def test_in_the_prefill_queue(cancel_alone: None) -> None:
    async def scene() -> None:
        async with fronted() as (d, front):
            decode, worker = await d.add_decode(ALWAYS), await d.add_prefill(max_num_seqs=1)
            await seen(d, decode, worker)
            held = Held(worker.runner)
            first = front.ask(LONG)
            await held.entered()
            second = front.ask(LONG[1:])
            await until(lambda: decode.worker.report().queue_waiting == 1)
            second.cancel()
            async with asyncio.timeout(1.0):
                while (await d.queue.size()).waiting:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await until(lambda: front.processor.num_open == 1, 1.0)
            held.go()
            assert (await first.wait()).error is None
            await front.all_free()
            assert worker.worker.report().prefills == {"done": 1, "failed": 0, "refused": 0, "unwanted": 0}

    run(scene)


def test_in_remote_prefill_the_prefill_engine_stops_at_once(cancel_alone: None) -> None:
    async def scene() -> None:
        async with fronted() as (d, front):
            decode = await d.add_decode(ALWAYS)
            worker = await d.add_prefill(max_num_batched_tokens=4, max_num_seqs=4)
            await seen(d, decode, worker)
            slow(worker, 0.03)
            asked = front.ask(LONG)
            await until(lambda: worker.engine.load().steps_total > 3)
            asked.cancel()
            assert await front.all_free() < 0.5
            steps = worker.engine.load().steps_total
            assert steps < len(LONG) // 4
            await asyncio.sleep(0.15)
            assert worker.engine.load().steps_total <= steps + 1, "it computes on"
            await still_serves(front)

    run(scene)


def test_a_job_that_is_taken_after_its_request_ended_is_not_computed(cancel_alone: None) -> None:
    """The decode worker could not take it off the queue: the hub was away, or the cancel was overtaken."""

    async def scene() -> None:
        async with fronted() as (d, front):
            decode = await d.add_decode(ALWAYS)
            worker = await d.add_prefill(max_num_batched_tokens=4, max_num_seqs=4)
            await seen(d, decode, worker)
            slow(worker, 0.03)

            async def nothing(_: Any) -> bool:
                return False

            d.queue.cancel = nothing  # type: ignore[method-assign]
            asked = front.ask(LONG)
            await until(lambda: worker.engine.load().steps_total > 3)
            asked.cancel()
            assert await front.all_free() < 0.5
            assert worker.engine.load().steps_total < len(LONG) // 4

    run(scene)


def test_a_job_that_nobody_wants_any_more_is_dropped_when_it_is_taken(cancel_alone: None) -> None:
    """It was delivered again after its request had ended, or the cancel overtook it."""

    async def scene() -> None:
        async with fronted() as (d, front):
            decode = await d.add_decode(ALWAYS)
            worker = await d.add_prefill(max_num_batched_tokens=4, max_num_seqs=4)
            await seen(d, decode, worker)
            slow(worker, 0.03)
            sampling = SamplingParams(max_tokens=8, temperature=0.0)
            job = PrefillJob(
                JobId("of yesterday"),
                EngineRequest(RequestId("gone"), pack(LONG), sampling),
                decode.instance_id,
                decode.server.addresses,
                decode.info.pairing,
            )
            await d.queue.put(job.job_id, msgspec.msgpack.encode(job))
            assert await front.all_free() < 0.5
            assert worker.engine.load().steps_total < len(LONG) // 4

    run(scene)


def test_without_the_word_of_the_decode_worker_the_extension_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeWorker, "prefill_taken", lambda self, call: None)

    async def scene() -> None:
        async with fronted() as (d, front):
            decode = await d.add_decode(ALWAYS)
            worker = await d.add_prefill(max_num_batched_tokens=2, max_num_seqs=2)
            await seen(d, decode, worker)
            slow(worker, 0.04)
            asked = front.ask(LONG)
            await until(lambda: worker.engine.load().steps_total > 3)
            asked.cancel()
            assert await front.all_free(2.0) > 0.1, "somebody else noticed"
            assert worker.engine.load().steps_total < len(LONG) // 2

    run(scene)


def test_between_the_completion_and_the_fetch() -> None:
    async def scene() -> None:
        async with fronted() as (d, front):
            decode, worker = await d.add_decode(ALWAYS), await d.add_prefill()
            await seen(d, decode, worker)
            held = Held(decode.runner)
            blocker = front.ask(LONG[:6])
            await held.entered()
            asked = front.ask(LONG)
            # Accepted, but the decode engine is in a step and has not begun to fetch.
            await until(lambda: worker.worker.report().prefills["done"] == 2)
            await until(lambda: worker.engine.load().num_blocks_held > 0)
            asked.cancel()
            await until(lambda: worker.engine.load().num_blocks_used == 0, 1.0)
            held.go()
            assert (await blocker.wait()).error is None
            await front.all_free()
            assert decode.engine.load().prompt_tokens_transferred_total < len(LONG)

    run(scene)


def test_during_the_fetch() -> None:
    async def scene() -> None:
        async with fronted() as (d, front):
            decode, worker = await d.add_decode(ALWAYS), await d.add_prefill()
            await seen(d, decode, worker)
            held = Held(worker.runner, "export_block")
            asked = front.ask(LONG)
            await held.entered()
            assert decode.engine.load().num_blocks_used > 0 and worker.engine.load().num_blocks_held > 0
            asked.cancel()
            await until(lambda: decode.engine.load().num_blocks_used == 0, 1.0)
            held.go()
            assert await front.all_free() < 1.0
            await still_serves(front)

    run(scene)


def test_decoding_after_a_transfer() -> None:
    async def scene() -> None:
        async with fronted() as (d, front):
            decode, worker = await d.add_decode(ALWAYS), await d.add_prefill()
            await seen(d, decode, worker)
            slow(decode, 0.02)
            asked = front.ask(LONG, 300)
            await asked.first.wait()
            asked.cancel()
            assert await front.all_free() < 1.0
            await still_serves(front)

    run(scene)


def test_a_storm_of_cancels_in_all_phases_leaves_nothing() -> None:
    async def scene() -> None:
        async with fronted(max_num_seqs=4) as (d, front):
            decodes = [await d.add_decode(ALWAYS), await d.add_decode(LOCAL)]
            workers = [await d.add_prefill(), await d.add_prefill()]
            await seen(d, *decodes, *workers)
            for node in (*decodes, *workers):
                slow(node, 0.002)
            for number in range(12):
                asked = [front.ask([20 + number, *LONG[k:]], 40) for k in range(8)]
                await asyncio.sleep(0.004 * number)
                for each in asked:
                    each.cancel()
                for each in asked:
                    await each.wait()
            assert await front.all_free() < 1.0
            await still_serves(front)

    run(scene)
