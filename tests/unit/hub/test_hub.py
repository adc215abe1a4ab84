import asyncio
import logging

import pytest

from stator.core.job_queue import QueueLimits
from stator.discovery import memory
from stator.discovery.base import KeyValue, WatchBatch
from stator.discovery.hub_client import HubDiscovery
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.errors import ErrorCode, StatorError
from stator.hub import server as hub_server
from stator.hub.messages import BatchJoiner, WatchPart, split_batch
from stator.hub.server import Hub
from stator.ids import InstanceId, JobId
from stator.queue.hub_client import HubQueue
from stator.queue.memory import MemoryQueue
from stator.runtime.context import loop_time
from stator.testing.clock import run_virtual
from stator.testing.contracts.discovery import Reading, expect_error
from stator.testing.hub_world import HubWorld, WorldLimits
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

IDENTITY = Identity(namespace="test", instance_id=InstanceId("hub-1"))


def batch_of(num_keys: int, *, reset: bool) -> WatchBatch:
    puts = [KeyValue(f"k{number}", bytes(10), number) for number in range(num_keys)]
    return WatchBatch(puts=puts, deletes=[] if reset else ["gone", "went"], reset=reset)


@pytest.mark.parametrize("batch", [batch_of(0, reset=True), batch_of(1, reset=True), batch_of(9, reset=False)])
@pytest.mark.parametrize("max_part_bytes", [1, 25, 1_000])
def test_batches_are_split_and_joined(batch: WatchBatch, max_part_bytes: int) -> None:
    parts = split_batch(batch, max_part_bytes)
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    if max_part_bytes == 1:
        assert len(parts) == max(1, len(batch.puts) + len(batch.deletes))
    joiner = BatchJoiner()
    joined = [joiner.add(part) for part in parts]
    assert joined == [None] * (len(parts) - 1) + [batch]
    assert joiner.add(WatchPart(WatchBatch())) == WatchBatch()


def test_a_watcher_far_behind_gets_the_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_PENDING_BATCHES", 4)

    async def main() -> None:
        discovery = MemoryDiscovery()
        watch = discovery.watch("")
        assert (await anext(watch)).reset
        for number in range(20):
            await discovery.put(f"k{number}", b"x")
        batch = await anext(watch)
        assert batch.reset
        assert len(batch.puts) == 20
        await discovery.delete("k0")
        assert (await anext(watch)).deletes == ["k0"]
        await watch.aclose()
        await discovery.close()

    run_virtual(main())


def test_a_process_that_stood_still_for_a_ttl_has_lost_its_lease() -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        discovery = MemoryDiscovery(store)
        lease = await discovery.grant_lease(10.0)
        await discovery.close()
        other = MemoryDiscovery(store)
        async with Reading(other.watch("")) as watch:
            await watch.next()
            await watch.expect_silence(20.0)
        assert not store.has_lease(lease.lease_id)
        await other.close()
        store.close()

    run_virtual(main())


def test_names_and_numbers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_server, "MAX_QUEUES", 1)
    monkeypatch.setattr(hub_server, "MAX_NAMESPACES", 2)

    async def main() -> None:
        hub = Hub(RequestPlaneServer(IDENTITY, Listen(host=None)))
        hub.queue("one", "prefill")
        for namespace, name, code in (
            ("one", "more", ErrorCode.OVERLOADED),
            ("one", "", ErrorCode.INVALID_REQUEST),
            ("one", "q" * 257, ErrorCode.INVALID_REQUEST),
            ("", "prefill", ErrorCode.INVALID_REQUEST),
        ):
            with pytest.raises(StatorError) as caught:
                hub.queue(namespace, name)
            assert caught.value.code is code
        hub.store("two")
        with pytest.raises(StatorError, match="namespaces"):
            hub.store("three")
        await hub.close()
        await hub.close()
        with pytest.raises(StatorError, match="stopping"):
            hub.store("one")

    run_virtual(main())


def test_the_hubs_own_process_shares_its_state_with_clients() -> None:
    async def main() -> None:
        network = InProcessNetwork()
        server = RequestPlaneServer(IDENTITY, Listen(host=None, inproc_name="hub"), network=network)
        hub = Hub(server)
        await server.start()
        client = RequestPlaneClient(IDENTITY, network=network)
        far = HubDiscovery(client, server.addresses, namespace="test")
        far_queue = HubQueue(client, server.addresses, namespace="test")
        near = MemoryDiscovery(hub.store("test"))
        near_queue = hub.queue("test", "prefill")
        await near.put("k", b"v")
        assert await far.get("k") is not None
        lease = await far.grant_lease()
        await near_queue.put(JobId("j"), b"x")
        (delivery,) = await far_queue.pull(InstanceId("w"), lease.lease_id, max_jobs=1, wait_s=1.0)
        assert await near_queue.ack(delivery.job_id, delivery.attempt)
        for closing in (far_queue, far, near, hub, client, server):
            await closing.close()

    run_virtual(main())


def test_a_pull_whose_caller_vanishes_without_a_word_leaves_the_jobs_to_the_lease() -> None:
    async def main() -> None:
        world = HubWorld(WorldLimits(queue=QueueLimits(ack_wait_s=1_000.0)))
        await world.start()
        vanishing, other = await world.connect(), await world.connect()
        lease, own = await vanishing.discovery.grant_lease(), await other.discovery.grant_lease()
        await other.queue.put(JobId("j"), b"x")
        await vanishing.queue.pull(InstanceId("v"), lease.lease_id, max_jobs=1, wait_s=1.0)
        vanished_at = loop_time()
        await vanishing.close()
        (again,) = await other.queue.pull(InstanceId("o"), own.lease_id, max_jobs=1, wait_s=60.0)
        assert again.attempt == 2
        assert loop_time() - vanished_at <= lease.ttl_s
        await world.close()

    run_virtual(main())


def test_a_wrong_transport_namespace_is_said_at_once_and_not_retried() -> None:
    async def main() -> None:
        network = InProcessNetwork()
        server = RequestPlaneServer(IDENTITY, Listen(host=None, inproc_name="hub"), network=network)
        hub = Hub(server)
        await server.start()
        client = RequestPlaneClient(Identity(namespace="other"), network=network)
        discovery = HubDiscovery(client, server.addresses, namespace="other")
        with pytest.raises(StatorError, match="inproc://hub") as caught:
            await discovery.get("k")
        watch = discovery.watch("")
        with pytest.raises(StatorError) as watched:
            await anext(watch)
        assert watched.value.code is caught.value.code
        for closing in (discovery, hub, client, server):
            await closing.close()

    run_virtual(main())


def test_a_hub_that_does_not_answer_is_given_up_after_the_timeout() -> None:
    async def main() -> None:
        network = InProcessNetwork()
        server = RequestPlaneServer(IDENTITY, Listen(host=None, inproc_name="hub"), network=network)
        server.register(hub_server.Endpoint("hub.key.get", hub_server.m.GetKeys, lambda call: None))
        await server.start()
        client = RequestPlaneClient(IDENTITY, network=network)
        discovery = HubDiscovery(client, server.addresses, namespace="test", timeout_s=3.0)
        error = await expect_error(ErrorCode.INSTANCE_LOST, discovery.get("k"))
        assert "inproc://hub did not answer hub.key.get within 3 s" in error.message
        assert loop_time() == pytest.approx(3.0)
        for closing in (discovery, client, server):
            await closing.close()

    run_virtual(main())


def test_a_closed_queue_ends_its_pulls_and_watches() -> None:
    async def main() -> None:
        discovery = MemoryDiscovery()
        lease = await discovery.grant_lease()
        queue = MemoryQueue(discovery.store)

        async def watch() -> None:
            async for _ in queue.watch_size():
                pass

        async with asyncio.timeout(5.0), asyncio.TaskGroup() as group:
            group.create_task(watch())
            pull = queue.pull(InstanceId("w"), lease.lease_id, max_jobs=1, wait_s=60.0)
            group.create_task(expect_error(ErrorCode.INSTANCE_LOST, pull))
            await asyncio.sleep(0)
            await queue.close()
        await queue.close()
        await expect_error(ErrorCode.INSTANCE_LOST, queue.size())
        await expect_error(ErrorCode.INSTANCE_LOST, queue.put(JobId("j"), b"x"))
        await discovery.close()

    run_virtual(main())


def test_what_becomes_of_jobs_is_logged_without_their_payload(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        discovery = MemoryDiscovery()
        lease = await discovery.grant_lease()
        queue = MemoryQueue(discovery.store, QueueLimits(max_deliveries=1))
        await queue.put(JobId("job-7"), b"secret words")
        await queue.pull(InstanceId("w"), lease.lease_id, max_jobs=1, wait_s=0.0)
        await lease.revoke()
        assert [letter.job_id for letter in await queue.dead_letters()] == ["job-7"]
        await queue.close()
        await discovery.close()

    with caplog.at_level(logging.INFO):
        run_virtual(main())
    assert "job job-7 is a dead letter after 1 attempts: its consumer's lease ended" in caplog.text
    assert "secret" not in caplog.text
