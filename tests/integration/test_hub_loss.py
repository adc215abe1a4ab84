"""Decode and prefill workers whose hub goes away, and comes back without its state."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from deployment import Deployment, Node, deployed, run

from stator.runtime.context import loop_time
from stator.testing.hub_world import HubWorld, WorldLimits
from stator.worker.decode import QUEUE_GRACE_S

LONG = list(range(10, 60))
LIMITS = WorldLimits(lease_ttl_s=3.0, return_window_s=0.2)


@asynccontextmanager
async def with_hub() -> AsyncGenerator[tuple[HubWorld, Deployment]]:
    world = HubWorld(LIMITS, tcp=True)
    await world.start()
    try:
        async with deployed(LIMITS.lease_ttl_s, await world.connect()) as deployment:
            yield world, deployment
    finally:
        await world.close()


def stall(node: Node) -> threading.Event:
    go = threading.Event()
    node.runner.before_step = lambda: go.wait(20)  # type: ignore[assignment]
    return go


def prefills(node: Node) -> tuple[int, int]:
    """(remote, done here after all)"""
    counts = node.worker.report().prefills
    return counts["remote"], counts["fallback"]


def test_a_hub_that_is_away_costs_no_request_and_no_time() -> None:
    async def scene() -> None:
        async with with_hub() as (world, d):
            decode, prefill = await d.add_decode(timeout_s=30.0), await d.add_prefill(max_num_seqs=1)
            expected = [await d.text(prompt) for prompt in (LONG, [3, *LONG])]
            go = stall(prefill)
            taken = d.generate(decode, LONG)
            await d.queue_size(lambda size: size.in_flight == 1)
            waiting = d.generate(decode, [3, *LONG])
            await d.queue_size(lambda size: size.waiting == 1)
            lost_at = loop_time()
            await world.lose()
            # What waited in the queue is done here, soon; what a prefill worker has is left to it.
            assert (await waiting.wait()).error is None
            assert QUEUE_GRACE_S * 0.9 < loop_time() - lost_at < QUEUE_GRACE_S + 2.0
            assert not taken.ended.is_set()
            # Nobody tries to reach the queue before a client's first token.
            asked_at = loop_time()
            assert (await d.generate(decode, [4, *LONG]).wait()).error is None
            assert loop_time() - asked_at < 0.5
            assert prefills(decode) == (0, 1)
            # Longer than a lease and than the prefill worker's extensions, which find nobody.
            await asyncio.sleep(LIMITS.lease_ttl_s + 1.0)
            go.set()
            assert (await taken.wait()).error is None
            assert prefills(decode) == (1, 1)
            assert [taken.token_ids, waiting.token_ids] == expected
            await d.blocks_settle(decode)
            await d.blocks_settle(prefill)

    run(scene)


def test_the_prefill_queue_works_again_after_a_restart() -> None:
    async def scene() -> None:
        async with with_hub() as (world, d):
            decode, prefill = await d.add_decode(timeout_s=30.0), await d.add_prefill(max_num_seqs=1)
            go = stall(prefill)
            taken = d.generate(decode, LONG)
            await d.queue_size(lambda size: size.in_flight == 1)
            waiting = d.generate(decode, [3, *LONG])
            await d.queue_size(lambda size: size.waiting == 1)
            await world.lose()
            await world.heal()
            assert (await waiting.wait()).error is None
            # The new hub knows nothing of the job in hand; it is finished nevertheless, past several extensions.
            await asyncio.sleep(2.5)
            go.set()
            assert (await taken.wait()).error is None
            assert prefills(decode) == (1, 1)
            # Both are in discovery again, and jobs go through the new queue.
            async with asyncio.timeout(10.0):
                assert (await d.generate(decode, [5, *LONG]).wait()).error is None
            assert prefills(decode) == (2, 1)
            keys = [entry.key for entry in await d.discovery.get_prefix("instances/")]
            assert keys == [f"instances/decode/{decode.instance_id}", f"instances/prefill/{prefill.instance_id}"]
            assert not decode.lease.lost.is_set()
            assert not prefill.lease.lost.is_set()

    run(scene)
