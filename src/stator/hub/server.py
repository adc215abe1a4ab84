"""The hub: discovery and queues for a deployment without external services, served on the request plane.

It lives in the head's supervisor process, or alone (`stator hub`), and keeps everything in memory. When it is gone and
comes back empty it has another epoch, by which everybody knows: holders of leases take new ones and put their keys
again, watchers keep what they knew until the holders had the time for that, and jobs that waited are prefilled by the
workers that put them (docs/adr/0008-the-hub-may-be-away.md).
"""

import contextlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from stator.core import job_queue
from stator.core.job_queue import DeadLetter, Delivery, QueueLimits, QueueSize
from stator.core.key_store import KeyStoreLimits, KeyValue
from stator.discovery.memory import MemoryKeyStore
from stator.errors import ErrorCode, StatorError
from stator.hub import messages as m
from stator.hub.status import HUB_STATUS, HubStatus, NamespaceRequest, hub_status
from stator.queue.memory import MemoryQueue
from stator.runtime.clock import RunningClock
from stator.runtime.context import CallContext, loop_time
from stator.transport.base import Call, Endpoint, TransportServer
from stator.transport.calls import CallTasks

logger = logging.getLogger(__name__)

MAX_NAMESPACES = 256
MAX_QUEUES = 64
MAX_NAME_BYTES = 256
MAX_PULL_WAIT_S = 3_600.0
PART_BYTES = 256 * 1024
MAX_ABANDONED_PULLS = 4_096


class _Namespace:
    def __init__(self, hub: "Hub", name: str) -> None:
        self.name = name
        self.store = MemoryKeyStore(hub.key_limits, random_source=hub.random_source, clock=hub.clock)
        self.queues: dict[str, MemoryQueue] = {}


class Hub:
    """Answers `hub.*` on the server from the moment it is made until `close`; the server belongs to the caller.

    queue_limits hold for every queue. random_source: draws the epoch and lease ids, by default from the system.
    epoch: of this incarnation; its clients are told.
    """

    def __init__(
        self,
        server: TransportServer,
        *,
        queue_limits: QueueLimits | None = None,
        key_limits: KeyStoreLimits | None = None,
        random_source: random.Random | None = None,
    ) -> None:
        self.queue_limits = queue_limits
        self.key_limits = key_limits
        self.random_source = random_source or random.SystemRandom()
        self.epoch = self.random_source.getrandbits(62) + 1
        self._namespaces: dict[str, _Namespace] = {}
        self._tasks = CallTasks("hub")
        self._closed = False
        self._started_at = loop_time()
        # While it stands still it hears no renewal, and none is late.
        self.clock = RunningClock("the hub")
        self.serve_on(server)

    def store(self, namespace: str) -> MemoryKeyStore:
        """The namespace's keys and leases, made if need be. For the hub's own process: `MemoryDiscovery(store)`."""
        return self._namespace(namespace).store

    def queue(self, namespace: str, name: str) -> MemoryQueue:
        """Made if need be. Raises StatorError if the name or the number of queues is out of bounds."""
        space = self._namespace(namespace)
        queue = space.queues.get(name)
        if queue is None:
            _check_name("queue", name)
            if len(space.queues) >= MAX_QUEUES:
                raise StatorError(ErrorCode.OVERLOADED, f"namespace {namespace} has {MAX_QUEUES} queues already")
            queue = space.queues[name] = MemoryQueue(space.store, self.queue_limits, name=name, clock=self.clock)
        return queue

    async def close(self) -> None:
        """End every watch and pull with INSTANCE_LOST. The state is gone. Idempotent."""
        self._closed = True
        self.clock.close()
        spaces, self._namespaces = self._namespaces, {}
        for space in spaces.values():
            for queue in space.queues.values():
                await queue.close()
            space.store.close()
        await self._tasks.close()

    def _namespace(self, name: str) -> _Namespace:
        if self._closed:
            raise _closed_error()
        space = self._namespaces.get(name)
        if space is None:
            _check_name("namespace", name)
            if len(self._namespaces) >= MAX_NAMESPACES:
                raise StatorError(ErrorCode.OVERLOADED, f"the hub has {MAX_NAMESPACES} namespaces already")
            space = self._namespaces[name] = _Namespace(self, name)
        return space

    # Endpoints.

    def serve_on(self, server: TransportServer) -> None:
        """Answer on one more server."""

        def answer(name: str, request_type: Any, function: Callable[[Any], int]) -> None:
            def handle(call: Call) -> None:
                call.items([m.Answer(int(function(call.request)), self.epoch)])
                call.end()

            server.register(Endpoint(name, request_type, handle))

        def stream(name: str, request_type: Any, function: Callable[[Any, CallContext], AsyncIterator[Any]]) -> None:
            server.register(self._tasks.endpoint(name, request_type, function))

        answer(m.GRANT_LEASE, m.GrantLease, lambda r: self.store(r.namespace).grant(r.ttl_s))
        answer(m.RENEW_LEASE, m.LeaseRequest, lambda r: self.store(r.namespace).renew(r.lease_id))
        answer(m.REVOKE_LEASE, m.LeaseRequest, lambda r: self.store(r.namespace).revoke(r.lease_id))
        answer(m.PUT_KEY, m.PutKey, self._put_key)
        answer(m.DELETE_KEY, m.DeleteKey, lambda r: self.store(r.namespace).delete(r.key))
        stream(m.GET_KEYS, m.GetKeys, self._get_keys)
        stream(m.WATCH_KEYS, m.WatchKeys, self._watch_keys)
        answer(m.PUT_JOB, m.PutJob, self._put_job)
        server.register(Endpoint(m.PULL_JOBS, m.PullJobs, self._pull_jobs))
        answer(m.ABANDON_PULLS, m.AbandonPulls, self._abandon_pulls)
        answer(m.SETTLE_JOB, m.SettleJob, self._settle_job)
        answer(m.CANCEL_JOB, m.CancelJob, lambda r: self.queue(r.namespace, r.queue).apply(job_queue.Cancel(r.job_id)))
        stream(m.QUEUE_SIZE, m.QueueRequest, self._queue_size)
        stream(m.WATCH_SIZE, m.QueueRequest, self._watch_size)
        stream(m.DEAD_LETTERS, m.QueueRequest, self._dead_letters)
        stream(HUB_STATUS, NamespaceRequest, self._status)

    def _put_key(self, request: m.PutKey) -> int:
        put = self.store(request.namespace).create if request.only_if_absent else self.store(request.namespace).put
        return put(request.key, request.value, request.lease_id)

    async def _get_keys(self, request: m.GetKeys, context: CallContext) -> AsyncGenerator[KeyValue, None]:
        store = self.store(request.namespace)
        if request.prefix:
            for entry in store.get_prefix(request.key):
                yield entry
        elif (found := store.get(request.key)) is not None:
            yield found

    async def _watch_keys(self, request: m.WatchKeys, context: CallContext) -> AsyncGenerator[m.WatchPart, None]:
        async with contextlib.aclosing(self.store(request.namespace).watch(request.prefix).batches()) as batches:
            async for batch in batches:
                for part in m.split_batch(batch, PART_BYTES, self.epoch):
                    yield part
        raise _closed_error()

    def _put_job(self, request: m.PutJob) -> int:
        put = job_queue.Put(request.job_id, request.payload, request.deadline_s, request.preferred)
        return self.queue(request.namespace, request.queue).apply(put)

    def _pull_jobs(self, call: Call) -> None:
        request: m.PullJobs = call.request
        queue = self.queue(request.namespace, request.queue)

        def done(deliveries: list[Delivery], error: StatorError | None) -> None:
            if deliveries:
                call.items(
                    [m.DeliveredJob(d.job_id, d.attempt, d.payload, d.seconds_left, self.epoch) for d in deliveries]
                )
            call.end(error)

        # Also for an answer that was given but could not be sent any more. One that was sent and never read is
        # abandoned by the consumer, or comes back with the consumer's lease.
        def abandon() -> None:
            queue.abandon_pull(request.pull_id)

        call.on_cancel(abandon)
        queue.start_pull(
            request.pull_id,
            request.consumer,
            request.lease_id,
            max_jobs=request.max_jobs,
            wait_s=min(request.wait_s, MAX_PULL_WAIT_S),
            done=done,
        )

    def _abandon_pulls(self, request: m.AbandonPulls) -> int:
        queue = self.queue(request.namespace, request.queue)
        return sum(queue.abandon_pull(pull_id) for pull_id in request.pull_ids[:MAX_ABANDONED_PULLS])

    def _settle_job(self, request: m.SettleJob) -> int:
        queue = self.queue(request.namespace, request.queue)
        match request.settlement:
            case m.Settlement.EXTEND:
                return queue.apply(job_queue.Extend(request.job_id, request.attempt))
            case m.Settlement.ACK:
                return queue.apply(job_queue.Ack(request.job_id, request.attempt))
            case m.Settlement.NACK:
                return queue.apply(job_queue.Nack(request.job_id, request.attempt))

    async def _queue_size(self, request: m.QueueRequest, context: CallContext) -> AsyncGenerator[QueueSize, None]:
        yield await self.queue(request.namespace, request.queue).size()

    async def _watch_size(self, request: m.QueueRequest, context: CallContext) -> AsyncGenerator[m.SizeUpdate, None]:
        async with contextlib.aclosing(self.queue(request.namespace, request.queue).watch_size()) as sizes:
            async for size in sizes:
                yield m.SizeUpdate(size.waiting, size.in_flight, self.epoch)
        raise _closed_error()

    async def _dead_letters(self, request: m.QueueRequest, context: CallContext) -> AsyncGenerator[DeadLetter, None]:
        for letter in await self.queue(request.namespace, request.queue).dead_letters():
            yield letter

    async def _status(self, request: NamespaceRequest, context: CallContext) -> AsyncGenerator[HubStatus, None]:
        uptime_s = loop_time() - self._started_at
        space = self._namespaces.get(request.namespace)
        if space is None:
            yield HubStatus(self.epoch, uptime_s)
        else:
            yield await hub_status(self.epoch, uptime_s, space.store, space.queues)


def _check_name(what: str, name: str) -> None:
    if not 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
        raise StatorError(ErrorCode.INVALID_REQUEST, f"the name of a {what} has 1 to {MAX_NAME_BYTES} bytes")


def _closed_error() -> StatorError:
    return StatorError(ErrorCode.INSTANCE_LOST, "the hub is stopping")
