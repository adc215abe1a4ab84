"""What every implementation of the queue seam does. Subclass, and give a world to run the scenarios in."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from stator.discovery.base import Lease
from stator.errors import ErrorCode
from stator.ids import InstanceId, JobId, LeaseId
from stator.queue.base import Delivery, JobQueue, QueueLoss, QueueSize
from stator.runtime.context import loop_time
from stator.testing.contracts.discovery import PATIENCE_S, Reading, expect_error
from stator.testing.hub_world import LosableWorld, Party, World


class Consumer:
    """A puller with a lease of its own."""

    def __init__(self, party: Party, name: str, lease: Lease) -> None:
        self.party = party
        self.name = InstanceId(name)
        self.lease = lease
        self.queue: JobQueue = party.queue

    async def pull(self, max_jobs: int = 1, wait_s: float = PATIENCE_S) -> list[Delivery]:
        return await self.queue.pull(self.name, self.lease.lease_id, max_jobs=max_jobs, wait_s=wait_s)

    async def pull_ids(self, max_jobs: int = 1, wait_s: float = PATIENCE_S) -> list[JobId]:
        return [delivery.job_id for delivery in await self.pull(max_jobs, wait_s)]

    async def pull_one(self, wait_s: float = PATIENCE_S) -> Delivery:
        (delivery,) = await self.pull(1, wait_s)
        return delivery


async def consumer(world: World, name: str, namespace: str = "test") -> Consumer:
    party = await world.connect(namespace)
    return Consumer(party, name, await party.discovery.grant_lease(world.limits.lease_ttl_s))


async def put_all(queue: JobQueue, *job_ids: str, preferred: str | None = None) -> None:
    for job_id in job_ids:
        await queue.put(JobId(job_id), job_id.encode(), preferred=None if preferred is None else InstanceId(preferred))


async def until_size(queue: JobQueue, size: QueueSize, within_s: float) -> None:
    """At once, if nothing may take a while."""
    if within_s:
        async with asyncio.timeout(within_s), aclosing(queue.watch_size()) as sizes:
            async for news in sizes:
                if news == size:
                    break
    assert await queue.size() == size


async def begin(group: asyncio.TaskGroup, consumer: Consumer, max_jobs: int = 1) -> asyncio.Task[list[Delivery]]:
    """A pull that has reached the queue: a call made later on the same connection has been answered."""
    task = group.create_task(consumer.pull(max_jobs))
    await asyncio.sleep(0)
    await consumer.queue.size()
    return task


class QueueContract:
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        raise NotImplementedError

    def test_a_job_is_put_pulled_and_acked(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            producer = (await world.connect()).queue
            await producer.put(JobId("j"), b"payload", deadline_s=60.0)
            assert await producer.size() == QueueSize(waiting=1, in_flight=0)
            delivery = await worker.pull_one()
            assert (delivery.job_id, delivery.attempt, delivery.payload) == ("j", 1, b"payload")
            assert delivery.seconds_left is not None
            assert 50.0 < delivery.seconds_left <= 60.0
            assert await producer.size() == QueueSize(waiting=0, in_flight=1)
            assert await worker.queue.ack(delivery.job_id, 1)
            assert await producer.size() == QueueSize(waiting=0, in_flight=0)

        self.run(scenario)

    def test_a_line_is_first_in_first_out(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            await put_all(worker.queue, "1", "2", "3", "4", "5")
            assert await worker.pull_ids(2) == ["1", "2"]
            assert await worker.pull_ids(1) == ["3"]
            assert await worker.pull_ids(9) == ["4", "5"]

        self.run(scenario)

    def test_the_own_line_comes_before_the_shared_one(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            await put_all(worker.queue, "s1", "s2")
            await put_all(worker.queue, "w1", "w2", preferred="w")
            assert await worker.pull_ids(3) == ["w1", "w2", "s1"]

        self.run(scenario)

    def test_anothers_job_is_taken_after_a_while(self) -> None:
        async def scenario(world: World) -> None:
            steal_after_s = world.limits.queue.steal_after_s
            worker = await consumer(world, "w")
            put_at = loop_time()
            await put_all(worker.queue, "o1", "o2", preferred="other")
            assert await worker.pull(2, wait_s=0.0) == []
            assert (await worker.pull_ids(2))[0] == "o1"
            assert loop_time() - put_at >= steal_after_s * 0.99
            assert loop_time() - put_at < steal_after_s + 2.0

        self.run(scenario)

    def test_a_preferred_job_goes_to_its_waiting_consumer(self) -> None:
        async def scenario(world: World) -> None:
            first, second = await consumer(world, "first"), await consumer(world, "second")
            async with asyncio.TaskGroup() as group:
                other = await begin(group, first)
                own = await begin(group, second)
                await put_all(first.queue, "j", preferred="second")
                assert [delivery.job_id for delivery in await own] == ["j"]
                assert not other.done()
                other.cancel()

        self.run(scenario)

    def test_waiting_pulls_are_served_in_turn(self) -> None:
        async def scenario(world: World) -> None:
            workers = [await consumer(world, f"w{number}") for number in range(3)]
            holder = await consumer(world, "holder")
            async with asyncio.TaskGroup() as group:
                pulls = [await begin(group, worker, 4) for worker in workers]
                await put_all(holder.queue, "1")
                assert [delivery.job_id for delivery in await pulls[0]] == ["1"]
                await put_all(holder.queue, "2")
                assert [delivery.job_id for delivery in await pulls[1]] == ["2"]
                pulls[2].cancel()
            await put_all(holder.queue, "3", "4", "5")
            assert len(await holder.pull(3)) == 3
            async with asyncio.TaskGroup() as group:
                pulls = [await begin(group, worker, 4) for worker in workers]
                await holder.lease.revoke()
                got = [[delivery.job_id for delivery in await pull] for pull in pulls]
            assert got == [["3"], ["4"], ["5"]]

        self.run(scenario)

    def test_a_pull_that_gets_nothing_ends_empty(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            started = loop_time()
            assert await worker.pull(1, wait_s=0.2) == []
            assert 0.19 <= loop_time() - started < 2.0
            assert await worker.pull(1, wait_s=0.0) == []

        self.run(scenario)

    def test_only_the_current_attempt_can_be_settled(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            queue, job = worker.queue, JobId("j")
            await put_all(queue, "j")
            assert not await queue.ack(job, 1)
            await worker.pull_one()
            assert await queue.nack(job, 1)
            assert (await worker.pull_one()).attempt == 2
            assert not await queue.extend(job, 1)
            assert not await queue.ack(job, 1)
            assert not await queue.nack(job, 1)
            assert await queue.extend(job, 2)
            assert await queue.ack(job, 2)
            assert await queue.ack(job, 2), "an ack whose answer was lost may be sent again"
            assert not await queue.ack(job, 1)
            assert not await queue.extend(job, 2)
            assert not await queue.nack(job, 2)

        self.run(scenario)

    def test_a_job_that_is_neither_acked_nor_extended_comes_back(self) -> None:
        async def scenario(world: World) -> None:
            ack_wait_s = world.limits.queue.ack_wait_s
            slow, other = await consumer(world, "slow"), await consumer(world, "other")
            await put_all(slow.queue, "j", "k")
            await slow.pull_one()
            pulled_at = loop_time()
            assert await other.pull_ids() == ["k"]
            assert await other.queue.ack(JobId("k"), 1)
            again = await other.pull_one(wait_s=ack_wait_s + PATIENCE_S)
            assert loop_time() - pulled_at >= ack_wait_s * 0.9
            assert (again.job_id, again.attempt) == ("j", 2)
            assert not await slow.queue.ack(JobId("j"), 1)
            assert await other.queue.ack(JobId("j"), 2)

        self.run(scenario)

    def test_an_extended_job_stays(self) -> None:
        async def scenario(world: World) -> None:
            ack_wait_s = world.limits.queue.ack_wait_s
            worker, other = await consumer(world, "w"), await consumer(world, "other")
            await put_all(worker.queue, "j")
            await worker.pull_one()
            for _ in range(4):
                assert await other.pull(1, wait_s=ack_wait_s / 2) == []
                assert await worker.queue.extend(JobId("j"), 1)
            assert await worker.queue.ack(JobId("j"), 1)

        self.run(scenario)

    def test_a_nacked_job_is_taken_at_once_at_the_head_of_its_line(self) -> None:
        async def scenario(world: World) -> None:
            worker, other = await consumer(world, "w"), await consumer(world, "other")
            await put_all(worker.queue, "1", "2", "3")
            assert await worker.pull_ids(2) == ["1", "2"]
            await worker.queue.nack(JobId("1"), 1)
            assert await other.pull_ids(2) == ["1", "3"]
            await put_all(worker.queue, "mine", preferred="w")
            await worker.pull_one()
            await worker.queue.nack(JobId("mine"), 1)
            assert await other.pull_ids(1, wait_s=0.0) == ["mine"]

        self.run(scenario)

    def test_jobs_come_back_at_once_when_the_consumers_lease_ends(self) -> None:
        async def scenario(world: World) -> None:
            holder, other = await consumer(world, "holder"), await consumer(world, "other")
            await put_all(holder.queue, "1", "2", "3")
            await put_all(holder.queue, "own", preferred="holder")
            assert await holder.pull_ids(3) == ["own", "1", "2"]
            await holder.lease.revoke()
            await until_size(other.queue, QueueSize(waiting=4, in_flight=0), world.limits.lease_end_s)
            back = [await other.pull_one(wait_s=0.0) for _ in range(4)]
            assert [(delivery.job_id, delivery.attempt) for delivery in back] == [
                ("1", 2),
                ("2", 2),
                ("3", 1),
                ("own", 2),
            ]
            await expect_error(ErrorCode.NOT_FOUND, holder.pull())

        self.run(scenario)

    def test_jobs_of_a_dead_consumer_come_back_with_its_lease(self) -> None:
        async def scenario(world: World) -> None:
            holder, other = await consumer(world, "holder"), await consumer(world, "other")
            await put_all(holder.queue, "j")
            await holder.pull_one()
            await holder.party.close()
            again = await other.pull_one(wait_s=world.limits.lease_ttl_s + PATIENCE_S)
            assert (again.job_id, again.attempt) == ("j", 2)

        self.run(scenario)

    def test_a_waiting_pull_ends_with_its_lease(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")

            async def pull() -> None:
                await expect_error(ErrorCode.NOT_FOUND, worker.pull())

            async with asyncio.TaskGroup() as group:
                group.create_task(pull())
                await asyncio.sleep(0)
                await worker.queue.size()
                await worker.lease.revoke()
            unknown = LeaseId(12345)
            await expect_error(
                ErrorCode.NOT_FOUND, worker.queue.pull(worker.name, unknown, max_jobs=1, wait_s=PATIENCE_S)
            )

        self.run(scenario)

    def test_expired_jobs_are_dropped_at_the_pull(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            await worker.queue.put(JobId("late"), b"x", deadline_s=0.1)
            await worker.queue.put(JobId("own"), b"x", deadline_s=0.1, preferred=worker.name)
            # Lets the deadlines pass: nothing else is in the queue that this pull could get.
            elsewhere = await consumer(world, "elsewhere", "elsewhere")
            assert await elsewhere.pull(1, wait_s=0.2) == []
            await put_all(worker.queue, "good")
            assert await worker.queue.size() == QueueSize(waiting=3, in_flight=0)
            assert await worker.pull_ids(3) == ["good"]
            assert await worker.queue.size() == QueueSize(waiting=0, in_flight=1)
            await worker.queue.put(JobId("late"), b"x")
            assert await worker.pull(1, wait_s=0.0) == []

        self.run(scenario)

    def test_a_job_nobody_finishes_becomes_a_dead_letter(self) -> None:
        async def scenario(world: World) -> None:
            limits = world.limits.queue
            worker = await consumer(world, "w")
            names = [f"j{number}" for number in range(limits.max_dead_letters + 1)]
            for name in names:
                await put_all(worker.queue, name)
                for attempt in range(1, limits.max_deliveries + 1):
                    delivery = await worker.pull_one()
                    assert (delivery.job_id, delivery.attempt) == (name, attempt)
                    assert await worker.queue.nack(delivery.job_id, attempt)
            assert await worker.queue.size() == QueueSize(waiting=0, in_flight=0)
            letters = await worker.queue.dead_letters()
            assert [letter.job_id for letter in letters] == names[1:]
            assert letters[0].attempts == limits.max_deliveries
            assert letters[0].payload == b"j1"
            assert letters[0].reason

        self.run(scenario)

    def test_a_job_is_cancelled_wherever_it_is(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            queue = worker.queue
            await put_all(queue, "flies", "waits")
            await worker.pull_one()
            assert await queue.cancel(JobId("waits"))
            assert not await queue.cancel(JobId("flies"))
            assert await queue.size() == QueueSize(waiting=0, in_flight=0)
            assert not await queue.extend(JobId("flies"), 1)
            assert not await queue.ack(JobId("flies"), 1)
            assert not await queue.cancel(JobId("unknown"))
            # A put that its cancel overtook, and one that was sent again, add nothing.
            await put_all(queue, "unknown", "waits", "flies")
            assert await queue.size() == QueueSize(waiting=0, in_flight=0)

        self.run(scenario)

    def test_a_job_id_is_added_once(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            await put_all(worker.queue, "j", "j")
            assert await worker.queue.size() == QueueSize(waiting=1, in_flight=0)
            await worker.pull_one()
            await put_all(worker.queue, "j")
            assert await worker.queue.size() == QueueSize(waiting=0, in_flight=1)
            await worker.queue.ack(JobId("j"), 1)
            await put_all(worker.queue, "j")
            assert await worker.queue.size() == QueueSize(waiting=0, in_flight=0)

        self.run(scenario)

    def test_a_full_queue_says_so(self) -> None:
        async def scenario(world: World) -> None:
            worker = await consumer(world, "w")
            most = world.limits.queue.max_waiting
            await put_all(worker.queue, *(f"j{number}" for number in range(most)))
            await expect_error(ErrorCode.OVERLOADED, put_all(worker.queue, "more"))
            await put_all(worker.queue, "j0")
            assert await worker.pull_ids() == ["j0"]
            await put_all(worker.queue, "more")
            # A job that comes back finds its place even then.
            assert await worker.queue.nack(JobId("j0"), 1)
            assert await worker.queue.size() == QueueSize(waiting=most + 1, in_flight=0)
            assert await worker.pull_ids(20) == [f"j{number}" for number in range(most)] + ["more"]

        self.run(scenario)

    def test_the_size_is_pushed(self) -> None:
        async def scenario(world: World) -> None:
            worker, watcher = await consumer(world, "w"), (await world.connect()).queue
            async with Reading(watcher.watch_size()) as sizes:
                assert await sizes.next() == QueueSize(waiting=0, in_flight=0)
                await put_all(worker.queue, "1", "2", "3")
                seen: list[int] = []
                while not seen or seen[-1] < 3:
                    size = await sizes.next()
                    assert isinstance(size, QueueSize)
                    assert size.in_flight == 0
                    seen.append(size.waiting)
                assert seen == sorted(set(seen))
                await sizes.expect_silence(0.1)
                await worker.pull_ids(2)
                await worker.queue.ack(JobId("1"), 1)
                last = QueueSize(waiting=1, in_flight=1)
                while (size := await sizes.next()) != last:
                    assert size == QueueSize(waiting=1, in_flight=2)

        self.run(scenario)

    def test_a_cancelled_pull_takes_no_job(self) -> None:
        """Cancelled at every moment around the delivery: the job is another's at once, long before the ack wait."""

        async def scenario(world: World) -> None:
            fickle, other = await consumer(world, "fickle"), await consumer(world, "other")
            producer = (await world.connect()).queue
            for num_yields in range(12):
                job = JobId(f"j{num_yields}")
                pull = asyncio.ensure_future(fickle.pull())
                await asyncio.sleep(0)
                await fickle.queue.size()
                put = asyncio.ensure_future(producer.put(job, b"x"))
                for _ in range(num_yields):
                    await asyncio.sleep(0)
                pull.cancel()
                await asyncio.wait([pull])
                await put
                if pull.cancelled():
                    delivery = await other.pull_one(wait_s=world.limits.queue.ack_wait_s / 2)
                    assert await other.queue.ack(job, delivery.attempt)
                else:
                    (delivery,) = pull.result()
                    assert await fickle.queue.ack(job, delivery.attempt)
                assert delivery.job_id == job
            assert await producer.size() == QueueSize(waiting=0, in_flight=0)
            assert await producer.dead_letters() == []

        self.run(scenario)

    def test_namespaces_share_nothing(self) -> None:
        async def scenario(world: World) -> None:
            mine, theirs = await consumer(world, "w", "mine"), await consumer(world, "w", "theirs")
            await put_all(mine.queue, "j")
            assert await theirs.pull(1, wait_s=0.0) == []
            await expect_error(
                ErrorCode.NOT_FOUND,
                theirs.queue.pull(mine.name, mine.lease.lease_id, max_jobs=1, wait_s=0.0),
            )
            assert not await theirs.queue.cancel(JobId("j"))
            assert await mine.pull_ids() == ["j"]

        self.run(scenario)


class QueueLossContract:
    """For implementations whose server is elsewhere and may be lost."""

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        raise NotImplementedError

    def test_calls_without_a_server_name_its_address(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            worker = await consumer(world, "w")
            address = world.address
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(expect_error(ErrorCode.INSTANCE_LOST, worker.pull(wait_s=60.0)))
                await asyncio.sleep(0)
                await worker.queue.size()
                await world.cut()
                assert address in (await waiting).message
            for call in (put_all(worker.queue, "j"), worker.queue.size(), worker.queue.dead_letters()):
                assert address in (await expect_error(ErrorCode.INSTANCE_LOST, call)).message

        self.run_losable(scenario)

    def test_jobs_whose_delivery_was_cut_off_come_back_before_the_ack_wait(self) -> None:
        """Cut at every moment around the delivery, with the consumer and its lease alive."""

        async def scenario(world: LosableWorld) -> None:
            worker, other = await consumer(world, "w"), await consumer(world, "other")
            for num_yields in range(0, 12, 2):
                job = JobId(f"j{num_yields}")
                pull = asyncio.ensure_future(worker.pull())
                await asyncio.sleep(0)
                await worker.queue.size()
                put = asyncio.ensure_future(other.queue.put(job, b"x"))
                for _ in range(num_yields):
                    await asyncio.sleep(0)
                await world.cut()
                await asyncio.wait([pull, put])
                await world.heal()
                put.exception()
                await other.queue.put(job, b"x")
                if pull.exception() is None:
                    (delivery,) = pull.result()
                else:
                    delivery = await other.pull_one(wait_s=world.limits.queue.ack_wait_s / 2)
                assert delivery.job_id == job
                assert await other.queue.ack(job, delivery.attempt)

        self.run_losable(scenario)

    def test_a_size_watch_tells_the_loss_and_the_return(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            queue = (await world.connect()).queue
            await put_all(queue, "j")
            async with Reading(queue.watch_size()) as news:
                assert await news.next() == QueueSize(waiting=1, in_flight=0)
                await world.cut()
                assert await news.next() == QueueLoss(jobs_lost=False)
                await news.expect_silence(0.5)
                await world.heal()
                # The same size again: what was in doubt is there.
                assert await news.next() == QueueSize(waiting=1, in_flight=0)
                await world.lose()
                await world.heal()
                assert await news.next() == QueueLoss(jobs_lost=False)
                assert await news.next() == QueueLoss(jobs_lost=True)
                assert await news.next() == QueueSize(waiting=0, in_flight=0)
                await put_all(queue, "j")
                assert await news.next() == QueueSize(waiting=1, in_flight=0)

        self.run_losable(scenario)

    def test_who_has_a_job_keeps_it_when_the_server_loses_its_state(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            worker, other = await consumer(world, "w"), await consumer(world, "other")
            await put_all(worker.queue, "j", "k")
            assert await worker.pull_ids(2) == ["j", "k"]
            assert await worker.queue.extend(JobId("j"), 1)
            await world.lose()
            await world.heal()
            assert await worker.queue.extend(JobId("j"), 1)
            # Done, or given back: there is nobody to tell, and that is no error.
            assert not await worker.queue.ack(JobId("j"), 1)
            assert not await worker.queue.nack(JobId("k"), 1)
            assert not await worker.queue.extend(JobId("j"), 1)
            # What the new one delivers is its own to take back.
            await put_all(other.queue, "l")
            await worker.party.discovery.put("i/w", b"x", worker.lease)
            assert await worker.pull_ids(1) == ["l"]
            assert not await other.queue.cancel(JobId("l"))
            assert not await worker.queue.extend(JobId("l"), 1)

        self.run_losable(scenario)

    def test_closing_ends_pulls_and_gives_their_jobs_back(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            worker, other = await consumer(world, "w"), await consumer(world, "other")
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(expect_error(ErrorCode.INSTANCE_LOST, worker.pull()))
                await asyncio.sleep(0)
                await worker.queue.size()
                await asyncio.gather(put_all(other.queue, "j"), worker.queue.close())
                await waiting
            assert await other.pull_ids(wait_s=world.limits.queue.ack_wait_s / 2) == ["j"]
            await worker.queue.close()
            await expect_error(ErrorCode.INSTANCE_LOST, worker.pull())

        self.run_losable(scenario)
