"""Prefill on one instance, decode on another: every way it can go."""

import asyncio
import threading
from typing import Any

import msgspec
import pytest
from deployment import ALWAYS, Deployment, Result, deployed, run

from stator.core.disagg import DisaggPolicy
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, JobId, RequestId, TransferId
from stator.messages.engine import (
    EngineRequest,
    PrefillDone,
    PrefillDoneReply,
    PrefillResult,
    SamplingParams,
    TokenDelta,
)
from stator.messages.tokens import pack
from stator.queue.memory import MemoryQueue
from stator.runtime.context import CallContext
from stator.transport import Target, call

LONG = list(range(10, 60))
CONDITIONAL = DisaggPolicy(
    remote_prefill=True, conditional_disagg=True, max_local_prefill_length=16, max_prefill_queue_size=2
)


def test_a_remote_prefill_gives_the_text_of_a_local_one_and_leaves_no_block() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode, prefill = await d.add_decode(), await d.add_prefill()
            for length in (1, 3, 4, 5, 8, 50, 130):
                prompt = [length, *range(20, 19 + length)]
                result = await d.generate(decode, prompt).wait()
                assert result.error is None
                assert result.token_ids == await d.text(prompt), length
            load = decode.engine.load()
            assert load.prompt_tokens_transferred_total > 130
            assert prefill.engine.load().generation_tokens_total == 0
            assert decode.worker.report().prefills == {"local": 0, "remote": 7, "fallback": 0}
            assert prefill.worker.report().prefills == {"done": 7, "failed": 0, "refused": 0, "unwanted": 0}
            await d.blocks_settle(prefill)
            await d.blocks_settle(decode)
            assert (await d.queue.size()).in_flight == 0

    run(scene)


def test_conditions_decide_what_is_prefilled_where() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode(CONDITIONAL)
            await d.generate(decode, LONG).wait()
            assert decode.worker.report().prefills["local"] == 1, "no prefill instance lives yet"
            await d.add_prefill()
            await d.generate(decode, LONG[:16]).wait()
            assert decode.worker.report().prefills["local"] == 2, "short"
            other = [99, *LONG]
            await d.generate(decode, other).wait()
            assert decode.worker.report().prefills["remote"] == 1, "long"
            await d.generate(decode, [*other, 5, 6, 7]).wait()
            assert decode.worker.report().prefills == {"local": 3, "remote": 1, "fallback": 0}, "cached up to the end"

    run(scene)


def test_two_prefill_workers_share_a_burst() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode()
            workers = [await d.add_prefill(), await d.add_prefill()]
            prompts = [[n, *LONG] for n in range(1, 25)]
            expected = [await d.text(p) for p in prompts[:3]]
            results = [d.generate(decode, p) for p in prompts]
            for result in results:
                assert (await result.wait()).error is None
            assert [r.token_ids for r in results[:3]] == expected
            shares = [w.worker.report().prefills["done"] for w in workers]
            assert sum(shares) == 24
            assert min(shares) >= 4, shares

    run(scene)


def stall(d: Deployment, runner: object) -> threading.Event:
    """Hold a runner in its next step until the event is set."""
    go = threading.Event()
    runner.before_step = lambda: go.wait(20)  # type: ignore[attr-defined]
    return go


async def in_flight(d: Deployment, count: int) -> None:
    await d.queue_size(lambda size: size.in_flight >= count)


def test_jobs_of_a_dead_prefill_worker_go_to_another_one() -> None:
    async def scene() -> None:
        async with deployed(lease_ttl_s=0.4) as d:
            decode, doomed = await d.add_decode(), await d.add_prefill()
            go = stall(d, doomed.runner)
            results = [d.generate(decode, [n, *LONG]) for n in range(1, 7)]
            await in_flight(d, 1)
            survivor = await d.add_prefill()
            await doomed.die()
            for n, result in enumerate(results, start=1):
                assert (await result.wait()).error is None
                assert result.token_ids == await d.text([n, *LONG])
            go.set()
            done = survivor.worker.report().prefills["done"]
            assert done + decode.worker.report().prefills["fallback"] == 6
            assert done >= 1
            await d.blocks_settle(survivor)

    run(scene)


def test_without_any_prefill_worker_left_waiting_requests_are_prefilled_here() -> None:
    async def scene() -> None:
        async with deployed(lease_ttl_s=0.4) as d:
            decode, doomed = await d.add_decode(timeout_s=60), await d.add_prefill()
            go = stall(d, doomed.runner)
            result = d.generate(decode, LONG)
            await in_flight(d, 1)
            await doomed.die()
            assert (await result.wait()).error is None
            go.set()
            assert result.token_ids == await d.text(LONG)
            assert decode.worker.report().prefills["fallback"] == 1
            assert (await d.queue.size()).waiting == 0

    run(scene)


def test_a_late_prefill_is_replaced_and_its_blocks_are_released() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode, prefill = await d.add_decode(timeout_s=0.2), await d.add_prefill()
            go = stall(d, prefill.runner)
            result = await d.generate(decode, LONG).wait()
            assert result.error is None
            assert decode.worker.report().prefills["fallback"] == 1
            go.set()
            await d.blocks_settle(prefill)
            assert result.token_ids == await d.text(LONG)

    run(scene)


def test_the_death_of_a_prefill_worker_between_its_phases_costs_a_recomputation() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode, prefill = await d.add_decode(), await d.add_prefill()
            go = stall(d, decode.runner)
            blocker = d.generate(decode, [7])
            result = d.generate(decode, LONG)
            await d.reported(prefill, lambda report: report.prefills["done"] == 2)
            await prefill.server.close()
            go.set()
            assert (await result.wait()).error is None
            await blocker.wait()
            assert result.token_ids == await d.text(LONG)
            await d.blocks_settle(decode)

    run(scene)


@pytest.mark.parametrize("phase", ["queued", "prefilling", "decoding"])
def test_a_cancelled_request_frees_everything_in_every_phase(phase: str) -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode, prefill = await d.add_decode(), await d.add_prefill(max_num_seqs=1)
            go = stall(d, decode.runner if phase == "decoding" else prefill.runner)
            ahead = d.generate(decode, [3, *LONG]) if phase == "queued" else None
            if ahead:
                await in_flight(d, 1)
            result = d.generate(decode, LONG, max_tokens=200)
            if phase == "queued":
                await d.queue_size(lambda size: size.waiting == 1)
            else:
                await in_flight(d, 1)
            assert result.handle is not None
            result.handle.cancel()
            await result.wait()
            if phase == "queued":
                await d.queue_size(lambda size: size.waiting == 0)
            go.set()
            if ahead:
                assert (await ahead.wait()).error is None
            await d.blocks_settle(decode)
            await d.blocks_settle(prefill)

    run(scene)


def test_the_loss_of_the_queue_means_local_prefill() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode, _ = await d.add_decode(), await d.add_prefill()
            await d.queue.close()
            result = await d.generate(decode, LONG).wait()
            assert result.error is None
            assert result.token_ids == await d.text(LONG)
            assert decode.worker.report().prefills["fallback"] == 1

    run(scene)


def test_jobs_that_came_and_went_without_news_of_the_queue_keep_no_later_one_from_it() -> None:
    """A queue tells its size when that has changed: a refused job changes none, nor one put and cancelled at once."""

    class Refusing(MemoryQueue):
        """Refuses its next puts."""

        num_refused = 0

        async def put(self, *args: Any, **options: Any) -> None:
            if self.num_refused:
                self.num_refused -= 1
                raise StatorError(ErrorCode.OVERLOADED, "the queue is full")
            await super().put(*args, **options)

    async def scene() -> None:
        async with deployed() as d:
            d.queue = queue = Refusing(d.store)
            decode, _ = await d.add_decode(CONDITIONAL), await d.add_prefill()
            queue.num_refused = CONDITIONAL.max_prefill_queue_size
            for number in range(queue.num_refused):
                assert (await d.generate(decode, [number, *LONG]).wait()).error is None
            assert not queue.num_refused and decode.worker.report().prefills["fallback"] == 2
            await d.generate(decode, [9, *LONG]).wait()
            assert decode.worker.report().prefills == {"local": 0, "remote": 1, "fallback": 2}

    run(scene)


def test_a_completion_nobody_waits_for_is_refused() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode()
            done = PrefillDone(
                JobId("unknown"), 1, InstanceId("p"), result=PrefillResult({"transfer_id": "t"}, num_prompt_tokens=4)
            )
            reply = await call(
                d.client,
                Target(decode.server.addresses, "prefill_done", decode.instance_id),
                done,
                context=CallContext(RequestId("x")),
                item_type=PrefillDoneReply,
            )
            assert reply == PrefillDoneReply(accepted=False)

    run(scene)


def test_a_draining_decode_worker_refuses_new_requests_and_finishes_the_old() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode(ALWAYS)
            go = stall(d, decode.runner)
            running = d.generate(decode, LONG)
            await d.reported(decode, lambda report: report.load.num_running == 1)
            drained = asyncio.ensure_future(decode.worker.drain())
            refused = await d.generate(decode, LONG).wait()
            assert refused.error is not None
            assert refused.error.code == "draining"
            assert not drained.done()
            go.set()
            assert (await running.wait()).error is None
            await drained

    run(scene)


def test_a_draining_prefill_worker_keeps_its_blocks_until_they_are_fetched_or_released() -> None:
    async def scene() -> None:
        async with deployed() as d:
            prefill = await d.add_prefill()
            sampling = SamplingParams(max_tokens=8, temperature=0.0)
            requests = [EngineRequest(RequestId(f"r{n}"), pack([n, *LONG]), sampling) for n in (1, 2)]
            held = [await d.hold(prefill, request) for request in requests]
            drained = asyncio.ensure_future(prefill.worker.drain())
            assert prefill.worker.num_open == prefill.engine.load().num_blocks_held > 0
            # One is fetched by the decode engine that is given it, the other one nobody wants.
            decode = await d.add_decode(DisaggPolicy(remote_prefill=False))
            fetched = msgspec.structs.replace(requests[0], transfer=held[0].transfer)
            result, target = Result(), Target(decode.server.addresses, "generate", decode.instance_id)
            context = CallContext(fetched.request_id)
            result.handle = d.client.open(target, fetched, result, context=context, item_type=TokenDelta)
            both = prefill.engine.load().num_blocks_held
            assert (await result.wait()).error is None
            assert decode.engine.load().prompt_tokens_transferred_total > 0
            await d.reported(prefill, lambda report: report.load.num_blocks_held == both // 2)
            assert not drained.done()
            prefill.engine.release(TransferId(held[1].transfer["transfer_id"]))
            await asyncio.wait_for(drained, 5)
            assert prefill.engine.load().num_blocks_held == prefill.worker.num_open == 0

    run(scene)


def test_a_draining_prefill_worker_waits_no_longer_than_a_hold_lasts() -> None:
    async def scene() -> None:
        async with deployed() as d:
            prefill = await d.add_prefill(transfer_hold_s=0.2)
            sampling = SamplingParams(max_tokens=8, temperature=0.0)
            await d.hold(prefill, EngineRequest(RequestId("r"), pack(LONG), sampling))
            assert prefill.worker.num_open > 0
            await asyncio.wait_for(prefill.worker.drain(), 5)
            assert prefill.worker.num_open == 0

    run(scene)
