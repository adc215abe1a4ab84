import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from stator.core.kv_stream import BacklogLimits
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.kv_events import (
    DIGEST_INTERVAL_S,
    KV_EVENTS_ENDPOINT,
    KvChanges,
    KvDigest,
    KvItem,
    KvSnapshot,
    KvSubscribe,
)
from stator.router.index import RECOVERY_BOUND_S, SILENCE_S, KvIndex
from stator.runtime.context import CallContext
from stator.testing.clock import run_virtual
from stator.testing.faulty import Faults, FaultyClient
from stator.testing.kv_world import CacheOnly, KvWorker, KvWorld, make_prompts, prompt_hashes
from stator.transport.base import Endpoint, StreamHandle, Target
from stator.transport.client import RequestPlaneClient
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen, TransportSettings
from stator.worker.kv_events import KvPublisher

PROMPTS = make_prompts(Random(1), 10)
SOON_S = 0.1


class Listener:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.ends: list[StatorError | None] = []
        self.changed = asyncio.Event()

    def items(self, items: Sequence[Any], /) -> None:
        self.received.extend(items)
        self.changed.set()

    def end(self, error: StatorError | None = None, /) -> None:
        self.ends.append(error)
        self.changed.set()


def subscribe(world: KvWorld, worker: KvWorker, listener: Listener, *, stride: int = 1) -> StreamHandle:
    target = Target(worker.server.addresses, KV_EVENTS_ENDPOINT, worker.instance_id)
    context = CallContext(RequestId("test"))
    return world.client.open(target, KvSubscribe(stride), listener, context=context, item_type=KvItem)


def make_index(world: KvWorld, **options: Any) -> KvIndex:
    options = {"client": world.client, "directory": world.directory, "rng": Random(2), **options}
    return KvIndex(**options)


async def started(**options: Any) -> KvWorld:
    world = KvWorld(**options)
    await world.start()
    return world


# The index.


def test_it_follows_workers_as_they_come_work_and_go() -> None:
    async def run() -> None:
        world = await started()
        early = await world.add("early")
        early.engine.run(PROMPTS[0])
        index = make_index(world)
        assert not index.settled(early.instance_id)
        await asyncio.sleep(SOON_S)
        assert index.settled(early.instance_id)
        assert index.trusted(early.instance_id)
        late = await world.add("late")
        await asyncio.sleep(SOON_S)
        late.engine.run(PROMPTS[0])
        late.engine.run(PROMPTS[1])
        await asyncio.sleep(SOON_S)
        hashes = prompt_hashes(PROMPTS[0])
        assert index.overlaps(hashes) == {"early": len(hashes), "late": len(hashes)}
        assert index.overlaps([1, 2, 3]) == {}
        late.engine.reset()
        await asyncio.sleep(SOON_S)
        assert index.overlaps(hashes) == {"early": len(hashes)}
        await world.remove(early)
        assert index.overlaps(hashes) == {}
        assert not index.settled(early.instance_id)
        assert not index.trusted(early.instance_id)
        await asyncio.sleep(1.0)
        stats = index.stats()
        assert (stats.num_instances, stats.num_trusted, stats.num_entries) == (1, 1, 0)
        index.close()
        index.close()
        await world.close()

    run_virtual(run())


def test_a_change_is_known_within_a_few_turns_of_the_loop() -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker")
        index = make_index(world)
        await asyncio.sleep(1.0)
        now = asyncio.get_running_loop().time()
        worker.engine.run(PROMPTS[0])
        for _ in range(6):
            await asyncio.sleep(0)
        assert index.overlaps(prompt_hashes(PROMPTS[0]))
        assert asyncio.get_running_loop().time() == now
        index.close()
        await world.close()

    run_virtual(run())


def test_only_instances_of_its_role_are_followed() -> None:
    async def run() -> None:
        world = await started()
        decode = await world.add("decode")
        prefill = await world.add("prefill", role="prefill")
        index, other = make_index(world), make_index(world, role="prefill")
        await asyncio.sleep(SOON_S)
        assert (index.trusted(decode.instance_id), index.trusted(prefill.instance_id)) == (True, False)
        assert (other.trusted(decode.instance_id), other.trusted(prefill.instance_id)) == (False, True)
        index.close()
        other.close()
        await world.close()

    run_virtual(run())


def test_a_lost_connection_with_a_living_lease_keeps_the_old_view_untrusted() -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker")
        worker.engine.run(PROMPTS[0])
        index = make_index(world)
        await asyncio.sleep(SOON_S)
        await worker.hang_up()
        await asyncio.sleep(3.0)
        assert not index.trusted(worker.instance_id)
        assert index.settled(worker.instance_id)
        assert index.overlaps(prompt_hashes(PROMPTS[0])) == {"worker": len(prompt_hashes(PROMPTS[0]))}
        assert index.stats().num_resubscriptions >= 3
        await world.remove(worker)
        assert index.overlaps(prompt_hashes(PROMPTS[0])) == {}
        index.close()
        await world.close()

    run_virtual(run())


def test_a_publisher_that_begins_anew_is_followed() -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker")
        worker.engine.run(PROMPTS[0])
        index = make_index(world)
        await asyncio.sleep(SOON_S)
        await world.restart(worker)
        worker.engine.reset()
        worker.engine.run(PROMPTS[1])
        await asyncio.sleep(RECOVERY_BOUND_S)
        assert index.trusted(worker.instance_id)
        for prompt in PROMPTS[:2]:
            held = worker.engine.held()
            depth = next((i for i, h in enumerate(prompt_hashes(prompt)) if h not in held), len(prompt_hashes(prompt)))
            assert index.overlaps(prompt_hashes(prompt)).get(worker.instance_id, 0) == depth
        assert index.stats().num_stale == 0
        index.close()
        await world.close()

    run_virtual(run())


def test_a_stream_that_says_nothing_is_given_up() -> None:
    async def run() -> None:
        world = await started()
        faults = Faults()
        worker = await world.add("worker")
        index = make_index(world, client=FaultyClient(world.client, Random(3), faults))
        await asyncio.sleep(SOON_S)
        faults.drop = 1.0
        worker.engine.run(PROMPTS[0])
        await asyncio.sleep(SILENCE_S + 0.5)
        assert not index.trusted(worker.instance_id)
        assert index.stats().num_silent == 1
        faults.stop()
        await asyncio.sleep(RECOVERY_BOUND_S)
        assert index.trusted(worker.instance_id)
        assert index.overlaps(prompt_hashes(PROMPTS[0]))
        index.close()
        await world.close()

    run_virtual(run())


def test_stride_indexes_fewer_blocks() -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker", num_blocks=200)
        for prompt in PROMPTS:
            worker.engine.run(prompt)
        every, third = make_index(world), make_index(world, stride=3)
        await asyncio.sleep(SOON_S)
        for prompt in PROMPTS:
            num_blocks = len(prompt_hashes(prompt))
            assert every.overlaps(prompt_hashes(prompt)) == {"worker": num_blocks}
            assert third.overlaps(prompt_hashes(prompt)).get(worker.instance_id, 0) == num_blocks // 3 * 3
        assert 0 < third.stats().num_entries < every.stats().num_entries / 2
        assert worker.engine.num_listeners == 2
        every.close()
        third.close()
        await asyncio.sleep(SOON_S)
        assert worker.engine.num_listeners == 0
        await world.close()

    run_virtual(run())


def test_a_bounded_index_says_what_it_dropped() -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker", num_blocks=200)
        index = make_index(world, max_entries=40)
        await asyncio.sleep(SOON_S)
        for prompt in PROMPTS:
            worker.engine.run(prompt)
            await asyncio.sleep(SOON_S)
        stats = index.stats()
        assert stats.num_entries <= 40
        assert stats.num_dropped > 0
        assert stats.memory_bytes > 0
        assert index.trusted(worker.instance_id)
        await asyncio.sleep(3 * DIGEST_INTERVAL_S)
        # What was dropped here is no difference from the worker.
        assert index.stats().num_mismatches == 0
        index.close()
        await world.close()

    run_virtual(run())


def test_it_closes_whatever_is_going_on() -> None:
    async def run() -> None:
        world = await started()
        workers = [await world.add(f"worker-{number}") for number in range(3)]
        index = make_index(world)
        await asyncio.sleep(SOON_S)
        await workers[0].hang_up()
        await asyncio.sleep(0.01)
        index.close()
        await asyncio.sleep(5.0)
        assert [worker.publisher.num_subscribers for worker in workers] == [0, 0, 0]
        assert index.overlaps(prompt_hashes(PROMPTS[0])) == {}
        await world.close()

    run_virtual(run())


# The publisher.


def test_one_listener_serves_all_and_a_stream_is_in_order() -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker")
        worker.engine.run(PROMPTS[0])
        listeners = [Listener(), Listener()]
        handles = [subscribe(world, worker, listener) for listener in listeners]
        await asyncio.sleep(SOON_S)
        assert worker.engine.num_listeners == 1
        for prompt in PROMPTS:
            worker.engine.run(prompt)
        await asyncio.sleep(2.5 * DIGEST_INTERVAL_S)
        first, second = (listener.received for listener in listeners)
        assert isinstance(first[0], KvSnapshot)
        assert first[0].last
        assert isinstance(first[1], KvChanges)
        assert isinstance(first[-1], KvDigest)
        assert first[-1].sequence == first[1].sequence == first[0].digest.sequence + 1
        assert first[1] is second[1], "packed once for all"
        for handle in handles:
            handle.cancel()
        await asyncio.sleep(SOON_S)
        assert (worker.publisher.num_subscribers, worker.engine.num_listeners) == (0, 0)
        await world.close()

    run_virtual(run())


def test_a_subscriber_that_does_not_read_is_dropped_alone() -> None:
    async def run() -> None:
        settings = TransportSettings(window_items=2, max_buffered_items=64)
        world = await started(settings=settings, limits=BacklogLimits(max_items=8, max_hashes=100_000))
        worker = await world.add("worker", num_blocks=40)
        index = make_index(world)
        slow = Listener()
        handle = subscribe(world, worker, slow)
        await asyncio.sleep(SOON_S)
        handle.pause()
        for step in range(100):
            worker.engine.run(PROMPTS[step % len(PROMPTS)])
            await asyncio.sleep(0.01)
        handle.resume()
        await asyncio.sleep(SOON_S)
        assert [error and error.code for error in slow.ends] == [ErrorCode.SLOW_READER]
        assert worker.publisher.num_dropped == 1
        assert worker.publisher.num_subscribers == 1
        assert index.stats().num_resubscriptions == 0
        assert index.trusted(worker.instance_id)
        index.close()
        await world.close()

    run_virtual(run())


@pytest.mark.parametrize("stride", [0, -1, 5000])
def test_a_senseless_stride_is_refused(stride: int) -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker")
        listener = Listener()
        subscribe(world, worker, listener, stride=stride)
        await asyncio.sleep(SOON_S)
        (error,) = listener.ends
        assert error is not None
        assert error.code is ErrorCode.INVALID_REQUEST
        await world.close()

    run_virtual(run())


def test_strides_at_a_time_are_bounded() -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker")
        listeners = [Listener() for _ in range(5)]
        handles = [subscribe(world, worker, listener, stride=n) for n, listener in enumerate(listeners, 1)]
        await asyncio.sleep(SOON_S)
        assert [len(listener.ends) for listener in listeners] == [0, 0, 0, 0, 1]
        assert "1, 2, 3, 4" in str(listeners[-1].ends[0])
        handles[0].cancel()
        await asyncio.sleep(SOON_S)
        again = Listener()
        subscribe(world, worker, again, stride=5)
        await asyncio.sleep(SOON_S)
        assert not again.ends
        await world.close()

    run_virtual(run())


def test_a_closed_publisher_refuses() -> None:
    async def run() -> None:
        world = await started()
        worker = await world.add("worker")
        open_before, opened_after = Listener(), Listener()
        subscribe(world, worker, open_before)
        await asyncio.sleep(SOON_S)
        await worker.publisher.close()
        subscribe(world, worker, opened_after)
        await asyncio.sleep(SOON_S)
        assert open_before.ends == [None]
        assert [error and error.code for error in opened_after.ends] == [ErrorCode.DRAINING]
        assert worker.engine.num_listeners == 0
        await world.close()

    run_virtual(run())


# Over a socket.


def test_a_large_cache_arrives_over_tcp() -> None:
    async def run() -> None:
        engine = CacheOnly(20_000)
        rng = Random(4)
        prompts = make_prompts(rng, 60, max_blocks=400)
        for prompt in prompts:
            engine.run(prompt)
        publisher = KvPublisher(engine)
        identity = Identity(instance_id=InstanceId("worker"), token="the token")
        server = RequestPlaneServer(identity, Listen())
        server.register(Endpoint(KV_EVENTS_ENDPOINT, KvSubscribe, publisher.kv_events))
        await server.start()
        client = RequestPlaneClient(Identity(token="the token"))
        listener = Listener()
        target = Target(server.addresses, KV_EVENTS_ENDPOINT, InstanceId("worker"))
        context = CallContext(RequestId("test"))
        client.open(target, KvSubscribe(), listener, context=context, item_type=KvItem)
        async with asyncio.timeout(20):
            while not any(isinstance(item, KvDigest) for item in listener.received):
                listener.changed.clear()
                await listener.changed.wait()
        chunks = [item for item in listener.received if isinstance(item, KvSnapshot)]
        assert len(chunks) > 1
        assert sum(len(chunk.hashes) // 8 for chunk in chunks) == len(engine.held())
        assert chunks[-1].last
        await publisher.close()
        await client.close()
        await server.close()

    asyncio.run(run())
