"""The job queue in one process: a clock and callbacks around `core.job_queue`. The hub owns one per queue name."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable

from stator.core import job_queue as core
from stator.discovery.memory import MemoryKeyStore
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, JobId, LeaseId
from stator.queue.base import DeadLetter, Delivery, QueueSize
from stator.runtime.clock import Clock, LoopClock

logger = logging.getLogger(__name__)

PullListener = Callable[[list[Delivery], StatorError | None], None]


class MemoryQueue:
    """store: whose leases consumers pull under; with a lease there, its deliveries here end.

    Must be used on one event loop. The methods without `async` are for a server that answers others by callback.
    random_source: draws the ids of pulls made here, which must differ from those of other consumers.
    clock: that deadlines and the times of deliveries run on.
    """

    def __init__(
        self,
        store: MemoryKeyStore,
        limits: core.QueueLimits | None = None,
        *,
        name: str = "prefill",
        random_source: random.Random | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self._clock = clock or LoopClock()
        self._store = store
        self._core = core.JobQueueCore(limits)
        self._random = random_source or random.SystemRandom()
        self._pulls: dict[int, PullListener] = {}
        self._size_watches: dict[asyncio.Event, None] = {}
        self._last_size = self._core.size
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._closed = False
        self._unsubscribe = store.on_lease_end(self._lease_ended)

    async def put(
        self, job_id: JobId, payload: bytes, *, deadline_s: float | None = None, preferred: InstanceId | None = None
    ) -> None:
        self.apply(core.Put(job_id, payload, deadline_s, preferred))

    async def pull(self, consumer: InstanceId, lease_id: LeaseId, *, max_jobs: int, wait_s: float) -> list[Delivery]:
        answer: asyncio.Future[list[Delivery]] = asyncio.get_running_loop().create_future()

        def done(deliveries: list[Delivery], error: StatorError | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(deliveries)
            else:
                answer.set_exception(error)

        pull_id = self._random.getrandbits(63)
        self.start_pull(pull_id, consumer, lease_id, max_jobs=max_jobs, wait_s=wait_s, done=done)
        try:
            return await answer
        except asyncio.CancelledError:
            # The jobs may be here already, in an answer that nobody will read.
            self.abandon_pull(pull_id)
            raise

    def start_pull(
        self,
        pull_id: int,
        consumer: InstanceId,
        lease_id: LeaseId,
        *,
        max_jobs: int,
        wait_s: float,
        done: PullListener,
    ) -> None:
        """Calls done exactly once, perhaps before this returns, with deliveries or an error."""
        if self._closed:
            done([], self._closed_error())
        elif not self._store.has_lease(lease_id):
            message = f"lease {lease_id} of {consumer} has ended; take a new lease under a new instance id"
            done([], StatorError(ErrorCode.NOT_FOUND, message))
        elif pull_id in self._pulls:
            done([], StatorError(ErrorCode.INVALID_REQUEST, f"a pull has the id of another, {pull_id}"))
        else:
            self._pulls[pull_id] = done
            self._handle(core.Pull(pull_id, consumer, lease_id, max_jobs, wait_s))

    def abandon_pull(self, pull_id: int) -> bool:
        """Nobody will see this pull's answer: what it was given goes back at once. False if there is nothing to do."""
        return not self._closed and self.apply(core.AbandonPull(pull_id))

    def apply(self, event: core.Put | core.AbandonPull | core.Extend | core.Ack | core.Nack | core.Cancel) -> bool:
        """The event's answer, as its docstring says. Raises StatorError if it is refused."""
        answer = self._handle(event)
        if isinstance(answer, core.Refused):
            raise StatorError(answer.code, f"queue {self.name!r}: {answer.message}")
        assert isinstance(answer, core.Answer)
        return answer.value

    async def extend(self, job_id: JobId, attempt: int) -> bool:
        return self.apply(core.Extend(job_id, attempt))

    async def ack(self, job_id: JobId, attempt: int) -> bool:
        return self.apply(core.Ack(job_id, attempt))

    async def nack(self, job_id: JobId, attempt: int) -> bool:
        return self.apply(core.Nack(job_id, attempt))

    async def cancel(self, job_id: JobId) -> bool:
        return self.apply(core.Cancel(job_id))

    async def size(self) -> QueueSize:
        if self._closed:
            raise self._closed_error()
        return self._core.size

    async def watch_size(self) -> AsyncGenerator[QueueSize, None]:
        changed = asyncio.Event()
        self._size_watches[changed] = None
        told: QueueSize | None = None
        try:
            while not self._closed:
                changed.clear()
                size = self._core.size
                if size != told:
                    told = size
                    yield size
                else:
                    await changed.wait()
        finally:
            self._size_watches.pop(changed, None)

    async def dead_letters(self) -> list[DeadLetter]:
        if self._closed:
            raise self._closed_error()
        return self._core.dead_letters

    async def close(self) -> None:
        """End every pull with INSTANCE_LOST and every watch. The jobs are gone. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pulls, self._pulls = self._pulls, {}
        for done in pulls.values():
            done([], self._closed_error())
        for changed in self._size_watches:
            changed.set()

    def _closed_error(self) -> StatorError:
        return StatorError(ErrorCode.INSTANCE_LOST, f"queue {self.name!r} is closed")

    def _lease_ended(self, lease_id: LeaseId) -> None:
        self._handle(core.EndLease(lease_id))

    def _handle(self, event: core.Event) -> core.Answer | core.Refused | None:
        if self._closed:
            raise self._closed_error()
        answer: core.Answer | core.Refused | None = None
        ended: list[core.PullEnded] = []
        for effect in self._core.handle(event, self._clock.now()):
            match effect:
                case core.Answer() | core.Refused():
                    answer = effect
                case core.PullEnded():
                    ended.append(effect)
                case _:
                    self._log(effect)
        self._set_timer()
        if self._core.size != self._last_size:
            self._last_size = self._core.size
            for changed in self._size_watches:
                changed.set()
        # Last, because a listener may call back into the queue.
        for effect in ended:
            self._end_pull(effect)
        return answer

    def _end_pull(self, effect: core.PullEnded) -> None:
        done = self._pulls.pop(effect.pull_id, None)
        if done is None:
            return
        if effect.refused is None:
            done(list(effect.deliveries), None)
        else:
            done([], StatorError(effect.refused.code, f"queue {self.name!r}: {effect.refused.message}"))

    def _log(self, effect: core.Expired | core.CameBack | core.Buried) -> None:
        match effect:
            case core.Expired():
                logger.info("queue %s: job %s dropped, its deadline has passed", self.name, effect.job_id)
            case core.CameBack():
                logger.info(
                    "queue %s: job %s waits again after attempt %d: %s",
                    self.name,
                    effect.job_id,
                    effect.attempt,
                    effect.reason,
                )
            case core.Buried():
                logger.warning(
                    "queue %s: job %s is a dead letter after %d attempts: %s",
                    self.name,
                    effect.job_id,
                    effect.attempts,
                    effect.reason,
                )

    def _set_timer(self) -> None:
        deadline = self._core.next_deadline
        if deadline == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = deadline
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(self._clock.on_loop(deadline), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = None
        self._handle(core.Tick())
