"""The job queue over the request plane, in the hub in the head's process."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator

from stator.errors import ErrorCode, StatorError
from stator.hub import messages as m
from stator.hub.client import DEFAULT_TIMEOUT_S, Backoff, HubClient
from stator.ids import InstanceId, JobId, LeaseId
from stator.queue.base import DeadLetter, Delivery, QueueLoss, QueueSize
from stator.runtime.tasks import TaskOwner
from stator.transport.base import TransportClient

logger = logging.getLogger(__name__)

MAX_ABANDONED = 1024
MAX_DELIVERIES_KNOWN = 4096
CLOSE_TIMEOUT_S = 1.0


class HubQueue:
    """The queue seam; guarantees as in `queue.base`. Parameters as for `discovery.hub_client.HubDiscovery`.

    A pull that ends without its answer having been read (cancelled, timed out, connection lost) is abandoned: the hub
    is told its id, again and again until it has heard, and gives the jobs to others at once. If this process dies, its
    lease's end does the same.
    """

    def __init__(
        self,
        client: TransportClient,
        addresses: tuple[str, ...],
        *,
        namespace: str,
        name: str = "prefill",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        random_source: random.Random | None = None,
    ) -> None:
        self.name = name
        self._hub = HubClient(
            client,
            addresses,
            namespace=namespace,
            timeout_s=timeout_s,
            random_source=random_source or random.SystemRandom(),
        )
        self._tasks = TaskOwner(f"hub queue {name}")
        # The epoch of the hub that delivered it, while it is in a consumer's hands.
        self._delivered: dict[tuple[JobId, int], int] = {}
        self._pulling: set[int] = set()
        self._abandoned: dict[int, None] = {}
        self._abandoning: asyncio.Task[None] | None = None
        self._closing = False

    async def put(
        self, job_id: JobId, payload: bytes, *, deadline_s: float | None = None, preferred: InstanceId | None = None
    ) -> None:
        request = m.PutJob(self._hub.namespace, self.name, job_id, payload, deadline_s, preferred)
        await self._hub.ask(m.PUT_JOB, request)

    async def pull(self, consumer: InstanceId, lease_id: LeaseId, *, max_jobs: int, wait_s: float) -> list[Delivery]:
        pull_id = self._hub.random_source.getrandbits(63)
        request = m.PullJobs(self._hub.namespace, self.name, pull_id, consumer, lease_id, max_jobs, wait_s)
        self._pulling.add(pull_id)
        try:
            jobs: list[m.DeliveredJob] = await self._hub.collect(
                m.PULL_JOBS, request, m.DeliveredJob, timeout_s=wait_s + self._hub.timeout_s
            )
            if self._closing:
                raise StatorError(ErrorCode.INSTANCE_LOST, f"this client of {self._hub.name} is closed")
            return [self._delivery(job) for job in jobs]
        except asyncio.CancelledError:
            self._abandon(pull_id)
            raise
        except StatorError as error:
            if error.code is ErrorCode.INSTANCE_LOST:
                self._abandon(pull_id)
            raise
        finally:
            self._pulling.discard(pull_id)

    async def extend(self, job_id: JobId, attempt: int) -> bool:
        answer = await self._settle(m.Settlement.EXTEND, job_id, attempt)
        if answer.value:
            return True
        if self._delivered.get((job_id, attempt), answer.epoch) != answer.epoch:
            return True  # Its hub is gone, and with it whoever could have given the job to another or cancelled it.
        self._delivered.pop((job_id, attempt), None)
        return False

    async def ack(self, job_id: JobId, attempt: int) -> bool:
        return await self._give_up(m.Settlement.ACK, job_id, attempt)

    async def nack(self, job_id: JobId, attempt: int) -> bool:
        return await self._give_up(m.Settlement.NACK, job_id, attempt)

    async def cancel(self, job_id: JobId) -> bool:
        return bool(await self._hub.ask(m.CANCEL_JOB, m.CancelJob(self._hub.namespace, self.name, job_id)))

    async def size(self) -> QueueSize:
        request = m.QueueRequest(self._hub.namespace, self.name)
        return (await self._hub.collect(m.QUEUE_SIZE, request, QueueSize))[0]

    async def watch_size(self) -> AsyncGenerator[QueueSize | QueueLoss, None]:
        request = m.QueueRequest(self._hub.namespace, self.name)
        told: QueueSize | None = None
        epoch: int | None = None
        async with contextlib.aclosing(self._hub.follow(m.WATCH_SIZE, request, m.SizeUpdate)) as updates:
            update: m.SizeUpdate | None
            async for _, update in updates:
                if update is None:
                    told = None
                    yield QueueLoss(jobs_lost=False)
                    continue
                if epoch not in (None, update.epoch):
                    told = None
                    yield QueueLoss(jobs_lost=True)
                epoch = update.epoch
                size = QueueSize(update.waiting, update.in_flight)
                if size != told:
                    told = size
                    yield size

    async def dead_letters(self) -> list[DeadLetter]:
        request = m.QueueRequest(self._hub.namespace, self.name)
        return await self._hub.collect(m.DEAD_LETTERS, request, DeadLetter)

    async def close(self) -> None:
        """End every pull with INSTANCE_LOST and every watch. Jobs of pulls that were cut off go back, if the hub hears
        of them within a second."""
        if self._closing:
            return
        self._closing = True
        self._abandoned.update(dict.fromkeys(self._pulling))
        if self._abandoned:
            with contextlib.suppress(StatorError):
                await self._send_abandoned(CLOSE_TIMEOUT_S)
        await self._hub.close()
        await self._tasks.close()

    def _delivery(self, job: m.DeliveredJob) -> Delivery:
        self._delivered[job.job_id, job.attempt] = job.epoch
        if len(self._delivered) > MAX_DELIVERIES_KNOWN:
            del self._delivered[next(iter(self._delivered))]
        return Delivery(job.job_id, job.attempt, job.payload, job.seconds_left)

    async def _give_up(self, settlement: m.Settlement, job_id: JobId, attempt: int) -> bool:
        self._delivered.pop((job_id, attempt), None)
        return bool((await self._settle(settlement, job_id, attempt)).value)

    async def _settle(self, settlement: m.Settlement, job_id: JobId, attempt: int) -> m.Answer:
        request = m.SettleJob(self._hub.namespace, self.name, settlement, job_id, attempt)
        return await self._hub.ask_for_answer(m.SETTLE_JOB, request)

    def _abandon(self, pull_id: int) -> None:
        if self._closing:
            return
        self._abandoned[pull_id] = None
        if len(self._abandoned) > MAX_ABANDONED:
            # The hub's ack wait brings those jobs back.
            del self._abandoned[next(iter(self._abandoned))]
        if self._abandoning is None or self._abandoning.done():
            self._abandoning = self._tasks.spawn(self._abandon_all(), "abandon pulls")

    async def _abandon_all(self) -> None:
        backoff = Backoff(self._hub.random_source)
        while self._abandoned and not self._hub.closed:
            try:
                await self._send_abandoned(self._hub.timeout_s)
            except StatorError as error:
                logger.debug("could not tell of abandoned pulls, trying again: %s", error.message)
                await self._hub.pause(backoff.next_s())
            else:
                backoff.reset()

    async def _send_abandoned(self, timeout_s: float) -> None:
        pull_ids = list(self._abandoned)
        request = m.AbandonPulls(self._hub.namespace, self.name, pull_ids)
        await self._hub.ask(m.ABANDON_PULLS, request, timeout_s=timeout_s)
        for pull_id in pull_ids:
            self._abandoned.pop(pull_id, None)
