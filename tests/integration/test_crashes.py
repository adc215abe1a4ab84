"""Engines that die of a request, or beside it; workers that close with requests open."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from deployment import ALWAYS, Deployment, Node, run
from front import fronted, seen, until
from test_cancellation import Held

from stator.core.disagg import DisaggPolicy
from stator.engines.local.runner import Chunk
from stator.errors import ErrorCode
from stator.worker import DecodeWorker

LOCAL = DisaggPolicy()
LONG = [10 + n % 300 for n in range(60)]
POISON = 377


def allergic(node: Node) -> None:
    """Its engine dies of a prompt with the token POISON. The worker's process then closes, as the product's does."""
    step = node.runner.step

    def poisoned(chunks: Sequence[Chunk]) -> Any:
        if any(POISON in chunk.token_ids for chunk in chunks):
            raise MemoryError("an illegal access")
        return step(chunks)

    node.runner.step = poisoned  # type: ignore[method-assign]


async def closes_when_dead(d: Deployment, node: Node) -> None:
    await until(lambda: node.engine._ended is not None)
    await node.close()
    d.nodes.remove(node)


def watch(d: Deployment, *nodes: Node) -> list["asyncio.Task[None]"]:
    return [asyncio.get_running_loop().create_task(closes_when_dead(d, node)) for node in nodes]


async def settle(tasks: list["asyncio.Task[None]"]) -> int:
    """How many of the nodes have died."""
    dead = [task for task in tasks if task.done() or (await asyncio.wait([task], timeout=0.3))[0]]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return len(dead)


@pytest.mark.parametrize("where", ["decode", "prefill"])
def test_a_poison_request_has_two_victims_and_no_third(where: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with fronted() as (d, front):
            remote = where == "prefill"
            decodes = [await d.add_decode(ALWAYS if remote else LOCAL) for _ in range(1 if remote else 3)]
            workers = [await d.add_prefill() for _ in range(3)] if remote else []
            await seen(d, *decodes, *workers)
            for node in (*decodes, *workers):
                allergic(node)
            tasks = watch(d, *(workers or decodes))
            asked = await front.ask([*LONG, POISON]).wait()
            assert asked.error is not None and asked.error.code is ErrorCode.POISON_REQUEST
            assert await settle(tasks) == 2, "a third engine died of it"
            (record,) = [r for r in caplog.records if r.levelno == logging.ERROR and "is refused" in r.getMessage()]
            message = record.getMessage()
            victims = [name for name in (n.instance_id for n in (workers or decodes)) if name in message]
            assert len(victims) == 2 and "request-1" in message
            good = await front.ask(LONG).wait()
            assert good.error is None, "the rest serves on"
            await front.all_free()

    run(scene)


def test_beside_a_poison_request_others_go_on() -> None:
    async def scene() -> None:
        async with fronted(max_num_seqs=4) as (d, front):
            decodes = [await d.add_decode(LOCAL) for _ in range(3)]
            await seen(d, *decodes)
            expected = [await d.text([n, *LONG], 60) for n in range(10, 16)]
            d.nodes[-6:], extra = [], d.nodes[-6:]
            for node in extra:
                await node.close()
            for node in decodes:
                allergic(node)
            running = [front.ask([n, *LONG], 60) for n in range(10, 16)]
            for each in running:
                await each.first.wait()
            tasks = watch(d, *decodes)
            poison = await front.ask([*LONG, POISON]).wait()
            assert poison.error is not None and poison.error.code is ErrorCode.POISON_REQUEST
            for each, ids in zip(running, expected, strict=True):
                await each.wait()
                assert each.error is None
                assert each.text == front.processor._tokenizer.decode(ids)
            assert await settle(tasks) == 2
            await front.all_free()

    run(scene)


def test_neighbours_of_a_poison_request_in_its_step_are_not_refused_with_it() -> None:
    """All of them are suspects of the first crash; together in a second step they would be of the second as well."""

    async def scene() -> None:
        async with fronted(max_num_seqs=16, max_num_batched_tokens=512) as (d, front):
            first = await d.add_decode(LOCAL)
            await seen(d, first)
            allergic(first)
            held = Held(first.runner)
            blocker = front.ask(LONG[:5], 3)
            await held.entered()
            prompts = [[n, *LONG[:20]] for n in range(10, 20)]
            before = [front.ask(prompt) for prompt in prompts[:5]]
            poison = front.ask([*LONG[:20], POISON])
            after = [front.ask(prompt) for prompt in prompts[5:]]
            await until(lambda: first.engine.load().num_waiting == 11)
            others = [await d.add_decode(LOCAL) for _ in range(2)]
            await seen(d, *others)
            for node in others:
                allergic(node)
            tasks = watch(d, first, *others)
            held.go()
            await poison.wait()
            assert poison.error is not None and poison.error.code is ErrorCode.POISON_REQUEST
            for each in (blocker, *before, *after):
                assert (await each.wait()).error is None
            assert await settle(tasks) == 2
            assert front.processor._instances.suspects._current is None
            await front.all_free()

    run(scene)


def test_a_crashed_prefill_job_is_given_to_nobody_and_its_neighbours_are() -> None:
    async def scene() -> None:
        async with fronted() as (d, front):
            decode = await d.add_decode(ALWAYS)
            doomed = await d.add_prefill(max_num_batched_tokens=64, max_num_seqs=8)
            await seen(d, decode, doomed)
            allergic(doomed)
            held = Held(doomed.runner)
            # One in the step under way, one to be in the next, and one for which that has no room.
            first = front.ask(LONG[:8])
            await held.entered()
            poison = d.generate(decode, [*LONG[:59], POISON, *LONG[:30]])
            waiting = d.generate(decode, [77, *LONG])
            await until(lambda: len(doomed.worker._in_hand) == 3)  # type: ignore[union-attr]
            other = await d.add_prefill()
            tasks = watch(d, doomed)
            held.go()
            await poison.wait()
            assert poison.error is not None
            assert (poison.error.code, poison.error.instance_id) == (ErrorCode.ENGINE_CRASHED, doomed.instance_id)
            assert (await waiting.wait()).error is None
            assert (await first.wait()).error is None
            assert await settle(tasks) == 1
            assert other.worker.report().prefills["done"] == 1, "the neighbour alone"
            assert await d.queue.dead_letters() == []
            await front.all_free()

    run(scene)


def test_a_dead_prefill_engine_pulls_no_more() -> None:
    """It would refuse job after job, and each refusal counts as a delivery: jobs would be dead letters in no time."""

    async def scene() -> None:
        async with fronted() as (d, front):
            decode, doomed = await d.add_decode(ALWAYS), await d.add_prefill()
            await seen(d, decode, doomed)
            allergic(doomed)
            crashed = await d.generate(decode, [*LONG, POISON]).wait()
            assert crashed.error is not None and crashed.error.code is ErrorCode.ENGINE_CRASHED
            later = d.generate(decode, LONG)
            await until(lambda: len(decode.worker._pending) == 1)  # type: ignore[union-attr]
            await asyncio.sleep(0.2)
            size = await d.queue.size()
            assert (size.waiting, size.in_flight) == (1, 0), "it took the job"
            other = await d.add_prefill()
            assert (await later.wait()).error is None
            assert other.worker.report().prefills["done"] == 1
            assert await d.queue.dead_letters() == []

    run(scene)


@pytest.mark.parametrize("phase", ["decoding", "queued", "prefilling"])
def test_a_worker_that_closes_lets_its_requests_go_on_elsewhere(phase: str) -> None:
    """At the end of the time that a drain has. DRAINING, not a death: it counts against nobody."""

    async def scene() -> None:
        async with fronted() as (d, front):
            leaving = await d.add_decode(ALWAYS if phase != "decoding" else LOCAL)
            worker = await d.add_prefill(max_num_seqs=1)
            await seen(d, leaving, worker)
            expected = await d.text(LONG, 60)
            alone = d.nodes.pop()
            await alone.close()
            await until(lambda: len(d.directory.instances(role="decode")) == 1)
            held = Held((leaving if phase == "decoding" else worker).runner) if phase != "decoding" else None
            ahead = d.generate(leaving, LONG[5:]) if phase == "queued" else None
            if phase == "queued":
                assert held is not None
                await held.entered()
            asked = front.ask(LONG, 60)
            if phase == "decoding":
                await until(lambda: len(asked.deltas) > 3)
            elif phase == "prefilling":
                assert held is not None
                await held.entered()
            else:
                await until(lambda: isinstance(leaving.worker, DecodeWorker) and len(leaving.worker._pending) == 2)
            direct = d.generate(leaving, [5, *LONG], 200)
            await until(lambda: isinstance(leaving.worker, DecodeWorker) and leaving.worker._num_open >= 2)
            other = await d.add_decode(LOCAL)
            await seen(d, other)
            d.nodes.remove(leaving)
            await leaving.close()
            await direct.wait()
            assert direct.error is not None and direct.error.code is ErrorCode.DRAINING
            await asked.wait()
            assert asked.error is None
            assert asked.text == front.processor._tokenizer.decode(expected)
            if held is not None:
                held.go()
            if ahead is not None:
                await ahead.wait()
            await front.all_free()

    run(scene)


def test_a_decode_worker_cut_off_without_a_word_is_left_when_its_lease_ends() -> None:
    """Nothing closes a connection: only discovery tells. What still arrives from there is nobody's business."""

    async def scene() -> None:
        async with fronted(lease_ttl_s=0.5) as (d, front):
            silent = await d.add_decode(LOCAL)
            await seen(d, silent)
            asked = front.ask(LONG, 40)
            await until(lambda: len(asked.deltas) > 2)
            held = Held(silent.runner)
            await held.entered()
            other = await d.add_decode(LOCAL)
            await seen(d, other)
            silent.lease.stop_renewal()  # type: ignore[attr-defined]
            await asked.wait()
            assert asked.error is None
            assert asked.text == front.processor._tokenizer.decode(await d.text(LONG, 40))
            held.go()
            await front.all_free()

    run(scene)
