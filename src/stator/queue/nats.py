"""The job queue in NATS JetStream, without a server of our own: its members keep one log (`queue.nats_log`) and each
applies it to the same rules (`core.replicated_queue`, docs/adr/0009-the-queue-in-jetstream.md).

Whatever changes the queue is one message to the log, and its answer comes when the log brings it back. The size is at
hand. A consumer's lease is discovery's: the consumer puts a key under it, and whoever pulls follows those keys; the end
of a lease is told to the log by its holder if that can, else by the first of the others. What JetStream has
acknowledged and lost all the same (it was not on disk) is as if the server had lost its state: jobs are idempotent by
their id.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from random import Random, SystemRandom
from typing import Any, Protocol

from stator.core import replicated_queue as rq
from stator.core.job_queue_events import (
    Answer,
    Buried,
    CameBack,
    DeadLetter,
    Delivery,
    Expired,
    PullEnded,
    QueueLimits,
    QueueSize,
    Refused,
)
from stator.core.replicated_queue import Applied, Entry, Logged, ReplicatedQueue
from stator.discovery.base import Lease, WatchBatch
from stator.errors import ErrorCode, StatorError
from stator.hub.client import DEFAULT_TIMEOUT_S, Backoff
from stator.ids import InstanceId, JobId, LeaseId
from stator.queue.base import QueueLoss
from stator.queue.nats_connection import NatsConnection
from stator.queue.nats_log import SNAPSHOT_EVERY, LogNames, QueueLog
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

CONSUMERS_PREFIX = "queue-consumers/"
MAX_ABANDONED = 1024
MAX_DELIVERIES_KNOWN = 4096
CLOSE_TIMEOUT_S = 1.0
TICK_EVERY_S = rq.MAX_STEP_S * 0.8
UNKNOWN_LEASE_GRACE_S = 2.0


class LeaseSource(Protocol):
    """Discovery, as far as the queue needs it."""

    def find_lease(self, lease_id: LeaseId) -> Lease | None: ...

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int: ...

    def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]: ...


class NatsQueue:
    """The queue seam; guarantees as in `queue.base`.

    connection: the caller's, and stays open. discovery: whose leases consumers pull under. timeout_s: for each call.
    limits: the same for all members; others have a queue of their own. replicas: of its streams, on how many servers.
    """

    def __init__(
        self,
        connection: NatsConnection,
        discovery: LeaseSource,
        *,
        namespace: str,
        name: str = "prefill",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        random_source: Random | None = None,
        limits: QueueLimits | None = None,
        replicas: int = 1,
    ) -> None:
        self.name = name
        self._limits = limits or QueueLimits()
        self._connection = connection
        self._timeout_s = timeout_s
        self._random = random_source or SystemRandom()
        self._writer = f"{self._random.getrandbits(64):016x}"
        self._number = 0
        self._tasks = TaskOwner(f"NATS queue {name}")
        self._log = QueueLog(
            connection,
            LogNames(namespace, name, self._limits),
            self._limits,
            replicas,
            on_event=self._on_event,
            on_copy=self._on_copy,
            on_synced=self._on_synced,
        )
        self._copy: ReplicatedQueue | None = None
        self._life = 0
        self._applied_at = 0.0
        self._answers: dict[int, asyncio.Future[Answer | Refused | None]] = {}
        self._pulls: dict[int, asyncio.Future[list[Delivery]]] = {}
        self._delivered: dict[tuple[JobId, int], int] = {}
        self._abandoned: dict[int, None] = {}
        self._abandoning: asyncio.Task[None] | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._snapshot: asyncio.TimerHandle | None = None
        self._may_write_snapshots = True
        self._synced = False
        self._news = _News()
        self._consumers = _Consumers(self, discovery)
        self._started = False
        self._closing = False
        self._unsubscribe = connection.on_change(self._on_connection)

    # The seam.

    async def put(
        self, job_id: JobId, payload: bytes, *, deadline_s: float | None = None, preferred: InstanceId | None = None
    ) -> None:
        deadline = self._begin()
        name = f"{self._writer}-{self._take_number()}"
        body = await self._log.write_body(name, payload, deadline)
        await self._ask(rq.LoggedPut(job_id, body, deadline_s, preferred), deadline)

    async def pull(self, consumer: InstanceId, lease_id: LeaseId, *, max_jobs: int, wait_s: float) -> list[Delivery]:
        self._begin()
        marker = self._consumers.marker(consumer, lease_id)
        pull_id = self._random.getrandbits(63)
        answer: asyncio.Future[list[Delivery]] = asyncio.get_running_loop().create_future()
        self._pulls[pull_id] = answer
        pull = rq.LoggedPull(pull_id, consumer, marker, max_jobs, wait_s)
        try:
            async with asyncio.timeout(wait_s + self._timeout_s):
                await self._write(pull, loop_time() + self._timeout_s)
                references = await answer
                await self._consumers.registered(lease_id)
                return await self._with_payloads(references)
        except TimeoutError:
            self._abandon(pull_id)
            raise self._connection.lost(f"did not answer a pull of queue {self.name!r} in time") from None
        except asyncio.CancelledError:
            self._abandon(pull_id)
            raise
        except StatorError as error:
            if error.code is not ErrorCode.INVALID_REQUEST:
                self._abandon(pull_id)
            raise
        finally:
            self._pulls.pop(pull_id, None)
            # Its exception may have come after somebody gave it up.
            if answer.done() and not answer.cancelled():
                answer.exception()

    async def extend(self, job_id: JobId, attempt: int) -> bool:
        if await self._ask(rq.LoggedExtend(job_id, attempt)):
            return True
        if self._delivered.get((job_id, attempt), self._life) != self._life:
            return True  # Its log is gone, and with it whoever could have given the job to another or cancelled it.
        self._delivered.pop((job_id, attempt), None)
        return False

    async def ack(self, job_id: JobId, attempt: int) -> bool:
        self._delivered.pop((job_id, attempt), None)
        return await self._ask(rq.LoggedAck(job_id, attempt))

    async def nack(self, job_id: JobId, attempt: int) -> bool:
        self._delivered.pop((job_id, attempt), None)
        return await self._ask(rq.LoggedNack(job_id, attempt))

    async def cancel(self, job_id: JobId) -> bool:
        return await self._ask(rq.LoggedCancel(job_id))

    async def size(self) -> QueueSize:
        return (await self._current()).size

    async def watch_size(self) -> AsyncGenerator[QueueSize | QueueLoss, None]:
        self._begin()
        with self._news.reader() as reader:
            told: QueueSize | None = None
            while not self._closing:
                loss = reader.take_loss()
                size = self._copy.size if self._synced and self._copy is not None else None
                if loss is not None:
                    told = None
                    yield loss
                elif size is not None and size != told:
                    told = size
                    yield size
                else:
                    await reader.wait()

    async def dead_letters(self) -> list[DeadLetter]:
        letters = (await self._current()).dead_letters
        bodies = await asyncio.gather(*(self._log.read_body(rq.decode_body(letter.payload)) for letter in letters))
        return [
            DeadLetter(letter.job_id, letter.attempts, letter.reason, body or b"")
            for letter, body in zip(letters, bodies, strict=True)
        ]

    async def close(self) -> None:
        """End every pull with INSTANCE_LOST and every watch. Jobs of pulls that were cut off go back, if NATS hears of
        them within a second."""
        if self._closing:
            return
        self._closing = True
        self._abandoned.update(dict.fromkeys(self._pulls))
        for answered in self._answers.values():
            if not answered.done():
                answered.set_exception(self._closed_error())
        self._fail_pulls(self._closed_error())
        self._news.tell(None)
        if self._abandoned and self._connection.is_up:
            with contextlib.suppress(StatorError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._write_abandoned(loop_time() + CLOSE_TIMEOUT_S)
        self._unsubscribe()
        for timer in (self._ticker, self._snapshot):
            if timer is not None:
                timer.cancel()
        await self._tasks.close()
        await self._log.close()

    # Asking the log.

    def _begin(self) -> float:
        """The deadline of a call that begins now."""
        if self._closing:
            raise self._closed_error()
        if not self._started:
            self._started = True
            self._log.start()
        return loop_time() + self._timeout_s

    def _take_number(self) -> int:
        self._number += 1
        return self._number

    async def _ask(self, event: Logged, deadline: float | None = None) -> bool:
        deadline = self._begin() if deadline is None else deadline
        number = self._take_number()
        answered: asyncio.Future[Answer | Refused | None] = asyncio.get_running_loop().create_future()
        self._answers[number] = answered
        try:
            async with asyncio.timeout_at(deadline):
                await self._log.write(Entry(self._writer, number, event), deadline)
                answer = await answered
        except TimeoutError:
            raise self._connection.lost(
                f"did not answer for queue {self.name!r} within {self._timeout_s:g} s"
            ) from None
        finally:
            self._answers.pop(number, None)
            if answered.done() and not answered.cancelled():
                answered.exception()
        if isinstance(answer, Refused):
            raise StatorError(answer.code, f"queue {self.name!r}: {answer.message}")
        return answer is not None and answer.value

    async def write_soon(self, event: Logged) -> None:
        """For what another member will do if this one cannot."""
        with contextlib.suppress(StatorError):
            await self._write(event, loop_time() + self._timeout_s)

    async def _write(self, event: Logged, deadline: float) -> None:
        await self._log.write(Entry(self._writer, self._take_number(), event), deadline)

    async def _current(self) -> ReplicatedQueue:
        """The copy, with everything applied that was written before this was called."""
        await self._ask(rq.LoggedTick())
        assert self._copy is not None
        return self._copy

    async def _with_payloads(self, references: list[Delivery]) -> list[Delivery]:
        bodies = await asyncio.gather(*(self._log.read_body(rq.decode_body(found.payload)) for found in references))
        deliveries: list[Delivery] = []
        for found, body in zip(references, bodies, strict=True):
            if body is None:
                logger.warning("queue %s: the payload of job %s is gone; giving it up", self.name, found.job_id)
                await self.write_soon(rq.LoggedCancel(found.job_id))
                continue
            self._delivered[found.job_id, found.attempt] = self._life
            if len(self._delivered) > MAX_DELIVERIES_KNOWN:
                del self._delivered[next(iter(self._delivered))]
            deliveries.append(Delivery(found.job_id, found.attempt, body, found.seconds_left))
        return deliveries

    # What the log brings.

    def _on_copy(self, copy: ReplicatedQueue, lost: bool) -> None:
        # Whatever waits for an answer has it from the new log, or gives up at its time. A pull may wait for long.
        if self._copy is not None:
            self._fail_pulls(self._connection.lost(f"has lost what was written to queue {self.name!r}"))
        self._copy = copy
        if lost:
            self._life += 1
            self._news.tell(QueueLoss(jobs_lost=True))

    def _on_synced(self) -> None:
        self._applied_at = loop_time()
        self._synced = True
        self._news.tell(None)
        self._set_ticker()

    def _on_event(self, entry: Entry, applied: Applied) -> None:
        self._applied_at = loop_time()
        mine = entry.writer == self._writer
        if mine and (answered := self._answers.get(entry.number)) is not None and not answered.done():
            answered.set_result(applied.answer)
        for effect in applied.effects:
            match effect:
                case PullEnded():
                    self._end_pull(effect)
                case Expired() | CameBack() | Buried() if mine:
                    self._say(effect)
                case _:
                    pass
        if mine and applied.freed and not self._closing:
            self._tasks.spawn(self._free(applied.freed), "free payloads")
        self._news.tell(None)
        self._set_ticker()
        self._set_snapshot()

    def _end_pull(self, effect: PullEnded) -> None:
        answer = self._pulls.get(effect.pull_id)
        if answer is None or answer.done():
            return
        if effect.refused is None:
            answer.set_result(list(effect.deliveries))
        else:
            answer.set_exception(StatorError(effect.refused.code, f"queue {self.name!r}: {effect.refused.message}"))

    def _say(self, effect: Expired | CameBack | Buried) -> None:
        match effect:
            case Expired():
                logger.info("queue %s: job %s dropped, its deadline has passed", self.name, effect.job_id)
            case CameBack():
                said = "queue %s: job %s waits again after attempt %d: %s"
                logger.info(said, self.name, effect.job_id, effect.attempt, effect.reason)
            case Buried():
                said = "queue %s: job %s is a dead letter after %d attempts: %s"
                logger.warning(said, self.name, effect.job_id, effect.attempts, effect.reason)

    async def _free(self, bodies: tuple[rq.Body, ...]) -> None:
        with contextlib.suppress(StatorError):
            for body in bodies:
                await self._log.free(body)

    def _on_connection(self, up: bool) -> None:
        if up or self._closing:
            return
        if self._synced:
            self._synced = False
            self._news.tell(QueueLoss(jobs_lost=False))
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        self._fail_pulls(self._connection.lost("was lost while a pull waited"))

    def _fail_pulls(self, error: StatorError) -> None:
        for answer in self._pulls.values():
            if not answer.done():
                answer.set_exception(error)

    # What the clock brings: one of the members has to say that time has passed.

    def _set_ticker(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        due_s = None if self._copy is None else self._copy.due_in_s
        if due_s is None or not self._synced or self._closing:
            return
        # Who waits for it says it in time, the others if nobody does.
        wait_s = self._random.uniform(0.0, 0.02) if self._pulls else self._random.uniform(0.5, 1.5)
        at = self._applied_at + min(due_s, TICK_EVERY_S) + wait_s
        self._ticker = asyncio.get_running_loop().call_at(at, self._tick)

    def _tick(self) -> None:
        self._ticker = None
        self.spawn(self.write_soon(rq.LoggedTick()), "tick")

    def _set_snapshot(self) -> None:
        copy = self._copy
        if not self._may_write_snapshots:
            return
        if copy is None or self._closing or copy.sequence - copy.snapshot_sequence < SNAPSHOT_EVERY:
            if self._snapshot is not None:
                self._snapshot.cancel()
                self._snapshot = None
        elif self._snapshot is None:
            # Consumers first: they have more time than those who serve streams.
            wait_s = self._random.uniform(0.0, 1.0) + (0.0 if self._consumers.any else 2.0)
            self._snapshot = asyncio.get_running_loop().call_later(wait_s, self._begin_snapshot)

    def _begin_snapshot(self) -> None:
        self._snapshot = None
        if self._synced and not self._closing:
            self.spawn(self._write_snapshot(), "snapshot")

    async def _write_snapshot(self) -> None:
        copy = self._copy
        assert copy is not None
        sequence, before = copy.sequence, copy.snapshot_sequence
        try:
            await self._log.write_snapshot(copy.snapshot(), sequence)
            await self._write(rq.LoggedSnapshot(sequence), loop_time() + self._timeout_s)
            if before > 0:
                await self._log.shorten(before + 1)
        except StatorError as error:
            if error.code is ErrorCode.UNAUTHORIZED:
                # By its role; the others are left to write them.
                self._may_write_snapshots = False
                logger.info("queue %s: snapshots are left to others: %s", self.name, error.message)
            else:
                logger.warning("queue %s: no snapshot was written: %s", self.name, error.message)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return self._tasks.spawn(coroutine, name)

    # Pulls that nobody waits for any more.

    def _abandon(self, pull_id: int) -> None:
        if self._closing:
            return
        self._abandoned[pull_id] = None
        if len(self._abandoned) > MAX_ABANDONED:
            # The ack wait brings those jobs back.
            del self._abandoned[next(iter(self._abandoned))]
        if self._abandoning is None or self._abandoning.done():
            self._abandoning = self._tasks.spawn(self._abandon_all(), "abandon pulls")

    async def _abandon_all(self) -> None:
        backoff = Backoff(self._random)
        while self._abandoned and not self._closing:
            await self._connection.wait_up()
            try:
                await self._write_abandoned(loop_time() + self._timeout_s)
            except StatorError as error:
                logger.debug("could not tell of abandoned pulls, trying again: %s", error.message)
                await self._connection.pause(backoff.next_s())

    async def _write_abandoned(self, deadline: float) -> None:
        for pull_id in list(self._abandoned):
            await self._write(rq.LoggedAbandon(pull_id), deadline)
            self._abandoned.pop(pull_id, None)

    # For the consumers' leases.

    @property
    def leases(self) -> set[LeaseId]:
        """Of consumers that hold jobs or wait for some."""
        return set() if self._copy is None else self._copy.leases

    @property
    def random_source(self) -> Random:
        return self._random

    def not_found(self, consumer: InstanceId, lease_id: LeaseId) -> StatorError:
        message = f"lease {lease_id} of {consumer} has ended; take a new lease under a new instance id"
        return StatorError(ErrorCode.NOT_FOUND, f"queue {self.name!r}: {message}")

    def _closed_error(self) -> StatorError:
        return StatorError(ErrorCode.INSTANCE_LOST, f"queue {self.name!r} is closed")


class _Consumers:
    """The leases of those who pull: a key of each in discovery, and what follows from its end.

    A lease's id changes when discovery loses its state; the queue knows consumers by markers of its own.
    """

    def __init__(self, queue: NatsQueue, discovery: LeaseSource) -> None:
        self._queue = queue
        self._discovery = discovery
        self._markers: dict[Lease, LeaseId] = {}
        self._registering: dict[Lease, asyncio.Task[None]] = {}
        self._present: set[LeaseId] = set()
        self._watching = False

    @property
    def any(self) -> bool:
        return bool(self._markers)

    def marker(self, consumer: InstanceId, lease_id: LeaseId) -> LeaseId:
        """Known to the others soon. Raises StatorError(NOT_FOUND) for a lease that has ended, or is not of ours."""
        lease = self._discovery.find_lease(lease_id)
        if lease is None or lease.lost.is_set():
            raise self._queue.not_found(consumer, lease_id)
        if lease not in self._markers:
            marker = self._markers[lease] = LeaseId(self._queue.random_source.getrandbits(62) + 1)
            self._registering[lease] = self._queue.spawn(self._register(lease, marker, consumer), "register consumer")
            self._queue.spawn(self._until_lost(lease, marker), "wait for the lease's end")
            if not self._watching:
                self._watching = True
                self._queue.spawn(self._watch(), "watch consumers")
        return self._markers[lease]

    async def registered(self, lease_id: LeaseId) -> None:
        """Returns once the others can see the consumer, or discovery could not be reached."""
        lease = self._discovery.find_lease(lease_id)
        task = None if lease is None else self._registering.get(lease)
        if task is not None:
            await asyncio.shield(task)

    async def _register(self, lease: Lease, marker: LeaseId, consumer: InstanceId) -> None:
        try:
            await self._discovery.put(f"{CONSUMERS_PREFIX}{marker}", consumer.encode(), lease)
        except StatorError as error:
            # Under a lease it will be put once discovery is back; a lease that has ended is told by itself.
            logger.debug("could not register consumer %s: %s", consumer, error.message)

    async def _until_lost(self, lease: Lease, marker: LeaseId) -> None:
        await lease.lost.wait()
        self._markers.pop(lease, None)
        self._registering.pop(lease, None)
        await self._queue.write_soon(rq.LoggedEndLease(marker))

    async def _watch(self) -> None:
        async with contextlib.aclosing(self._discovery.watch(CONSUMERS_PREFIX)) as batches:
            async for batch in batches:
                before = set[LeaseId]() if batch.reset else self._present
                after = before - {_marker(key) for key in batch.deletes} | {_marker(entry.key) for entry in batch.puts}
                for marker in self._present - after:
                    self._queue.spawn(self._end(marker, self._queue.random_source.uniform(0.0, 0.2)), "end a lease")
                self._present = after
                if batch.reset:
                    self._queue.spawn(self._end_unknown(), "end unknown leases")

    async def _end(self, marker: LeaseId, wait_s: float) -> None:
        """After a moment, in which another may have said it."""
        await asyncio.sleep(wait_s)
        if marker in self._queue.leases and marker not in self._present:
            await self._queue.write_soon(rq.LoggedEndLease(marker))

    async def _end_unknown(self) -> None:
        """Of consumers whose end nobody saw. One that has only just begun to pull may not be registered yet."""
        await asyncio.sleep(UNKNOWN_LEASE_GRACE_S)
        held = self._queue.leases
        for marker in held - self._present - set(self._markers.values()):
            await self._queue.write_soon(rq.LoggedEndLease(marker))


class _News:
    """Wakes the watchers of the size; a loss is told to each, and each in order."""

    def __init__(self) -> None:
        self._readers: set[_Reader] = set()

    @contextlib.contextmanager
    def reader(self) -> "Generator[_Reader]":
        reader = _Reader()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def tell(self, loss: QueueLoss | None) -> None:
        for reader in self._readers:
            reader.tell(loss)


class _Reader:
    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._losses: list[QueueLoss] = []

    def tell(self, loss: QueueLoss | None) -> None:
        if loss is not None and loss not in self._losses:
            self._losses.append(loss)
        self._changed.set()

    def take_loss(self) -> QueueLoss | None:
        return self._losses.pop(0) if self._losses else None

    async def wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()


def _marker(key: str) -> LeaseId:
    text = key.removeprefix(CONSUMERS_PREFIX)
    return LeaseId(int(text) if text.isdecimal() else 0)


def nats_queues(
    connection: NatsConnection, discovery: LeaseSource, *, namespace: str, replicas: int
) -> Callable[[str], NatsQueue]:
    """Opens a queue by name."""

    def open_queue(name: str) -> NatsQueue:
        return NatsQueue(connection, discovery, namespace=namespace, name=name, replicas=replicas)

    return open_queue
