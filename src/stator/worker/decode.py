"""The decode worker: takes requests, has long prompts prefilled elsewhere, streams the engine's tokens.

A request's tokens go from the engine straight into the call of the transport; nothing here runs per token. What is
remote about a prefill is decided in `core.disagg` and `core.remote_prefill`; this shell carries out their effects.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from stator.config.schema import VllmWorkerConfig
from stator.core import remote_prefill
from stator.core.disagg import DisaggPolicy, choose_prefill
from stator.core.remote_prefill import CancelJob, RemotePrefill, Reply, StartFetched, StartLocal
from stator.engines.base import Engine
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, JobId, RequestId
from stator.messages.engine import EngineInfo, EngineRequest, PrefillDone, PrefillDoneReply, PrefillJob
from stator.messages.instances import InstanceInfo
from stator.messages.reports import WorkerReport
from stator.messages.tokens import num_tokens
from stator.queue.base import JobQueue
from stator.runtime.context import loop_time
from stator.runtime.directory import DirectoryChange, InstanceDirectory
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Call
from stator.worker.host import WorkerHost

logger = logging.getLogger(__name__)

REMOTE_PREFILL_TIMEOUT_S = 25.0
"""When a remote prefill is late. Longer than a lease, so that a job of a dead prefill node is redelivered first."""


PREFILL_QUEUE = "prefill"


def disagg_policy(config: VllmWorkerConfig) -> DisaggPolicy:
    return DisaggPolicy(
        remote_prefill=config.remote_prefill,
        conditional_disagg=config.conditional_disagg,
        max_local_prefill_length=config.max_local_prefill_length,
        max_prefill_queue_size=config.max_prefill_queue_size,
    )


class _EngineSink:
    """The call, plus a note when it ends. `items` is the call's own bound method: no extra frame per token."""

    __slots__ = ("_call", "_on_end", "items")

    def __init__(self, call: Call, on_end: Callable[[], None]) -> None:
        self.items = call.items
        self._call = call
        self._on_end = on_end

    def end(self, error: StatorError | None = None, /) -> None:
        self._call.end(error)
        self._on_end()


@dataclass(slots=True)
class _Pending:
    job_id: JobId
    request: EngineRequest
    call: Call
    core: RemotePrefill
    late: asyncio.TimerHandle


class DecodeWorker:
    """Owns the requests of one decode engine between `start` and `close`; the engine itself belongs to the caller."""

    def __init__(
        self,
        *,
        engine: Engine,
        info: EngineInfo,
        host: WorkerHost,
        policy: DisaggPolicy,
        queue: JobQueue,
        directory: InstanceDirectory,
        remote_prefill_timeout_s: float = REMOTE_PREFILL_TIMEOUT_S,
    ) -> None:
        self._engine = engine
        self._info = info
        self._host = host
        self._policy = policy
        self._queue = queue
        self._directory = directory
        self._timeout_s = remote_prefill_timeout_s
        self._tasks = TaskOwner(f"decode worker {host.instance_id}")
        self._pending: dict[JobId, _Pending] = {}
        self._num_open = 0
        self._num_accepted = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._queue_waiting = 0
        self._puts_since_size = 0
        self._num_prefillers = 0
        self._unsubscribe: Callable[[], None] | None = None
        self._prefills = {"local": 0, "remote": 0, "fallback": 0}

    async def start(self) -> None:
        if not self._policy.remote_prefill:
            return
        self._unsubscribe = self._directory.subscribe(self._on_directory_change)
        self._count_prefillers()
        self._tasks.spawn(self._watch_queue(), "watch queue size")

    def report(self) -> WorkerReport:
        return WorkerReport(self._engine.load(), dict(self._prefills), self._queue_waiting)

    # Requests

    def generate(self, call: Call) -> None:
        """Endpoint `generate`: EngineRequest in, TokenDelta out."""
        request: EngineRequest = call.request
        if self._draining:
            call.end(StatorError(ErrorCode.DRAINING, f"instance {self._host.instance_id} is draining"))
            return
        self._num_open += 1
        self._idle.clear()
        # Callers choose request ids, and may send one again while its last attempt is still being aborted here.
        self._num_accepted += 1
        request = msgspec.structs.replace(request, request_id=RequestId(f"{request.request_id}/{self._num_accepted}"))
        num_prompt_tokens = num_tokens(request.prompt_ids) + num_tokens(request.resume_ids)
        choice = choose_prefill(
            self._policy,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=self._engine.cached_prefix_tokens(request) if self._policy.remote_prefill else 0,
            num_waiting_jobs=self._queue_waiting + self._puts_since_size,
            num_prefillers=self._num_prefillers,
        )
        if logger.isEnabledFor(logging.DEBUG):
            where = "remotely" if choice.remote else "locally"
            logger.debug(
                "prefilling %s (%d tokens) %s: %s", request.request_id, num_prompt_tokens, where, choice.reason
            )
        if choice.remote and num_prompt_tokens + 1 <= self._info.max_model_len:
            self._prefill_remotely(request, call)
        else:
            self._prefills["local"] += 1
            self._start_engine(request, call)

    def _start_engine(self, request: EngineRequest, call: Call) -> None:
        call.on_cancel(lambda: self._engine.abort(request.request_id))
        if call.cancelled:
            self._ended()
            return
        self._engine.generate(request, _EngineSink(call, self._ended))

    def _ended(self) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._idle.set()

    # Remote prefill

    def _prefill_remotely(self, request: EngineRequest, call: Call) -> None:
        job_id = JobId(f"{self._host.instance_id}/{request.request_id}")
        loop = asyncio.get_running_loop()
        gave_up = remote_prefill.GaveUp(f"no answer within {self._timeout_s:g} s")
        late = loop.call_later(self._timeout_s, lambda: self._handle(pending, gave_up))
        pending = _Pending(job_id, request, call, RemotePrefill(), late)
        self._pending[job_id] = pending
        self._puts_since_size += 1
        call.on_cancel(lambda: self._handle(pending, remote_prefill.RequestEnded()))
        if pending.core.state is remote_prefill.State.PENDING:
            self._tasks.spawn(self._put(pending), f"put {job_id}")

    async def _put(self, pending: _Pending) -> None:
        job = PrefillJob(
            job_id=pending.job_id,
            request=pending.request,
            decode_instance=self._host.instance_id,
            decode_addresses=self._host.addresses,
            pairing=self._info.pairing,
        )
        deadline_s = self._timeout_s
        left = pending.call.context.seconds_left(loop_time())
        if left is not None:
            deadline_s = min(deadline_s, max(0.0, left))
        try:
            await self._queue.put(pending.job_id, msgspec.msgpack.encode(job), deadline_s=deadline_s)
        except StatorError as error:
            self._handle(pending, remote_prefill.GaveUp(f"the prefill queue refused the job: {error.message}"))

    def prefill_done(self, call: Call) -> None:
        """Endpoint `prefill_done`: PrefillDone in, one PrefillDoneReply out."""
        done: PrefillDone = call.request
        pending = self._pending.get(done.job_id)
        if pending is None:
            call.items([PrefillDoneReply(accepted=False)])
            call.end()
            return
        self._handle(pending, remote_prefill.Completed(done.result, done.error), call)

    def _handle(self, pending: _Pending, event: remote_prefill.Event, reply_to: Call | None = None) -> None:
        for effect in pending.core.handle(event):
            match effect:
                case Reply(accepted):
                    assert reply_to is not None
                    reply_to.items([PrefillDoneReply(accepted)])
                    reply_to.end()
                case StartFetched(result):
                    self._prefills["remote"] += 1
                    self._start_engine(msgspec.structs.replace(pending.request, transfer=result.transfer), pending.call)
                case StartLocal(reason):
                    self._prefills["fallback"] += 1
                    logger.warning("prefilling %s here after all: %s", pending.request.request_id, reason)
                    self._start_engine(pending.request, pending.call)
                case CancelJob():
                    self._tasks.spawn(self._cancel(pending.job_id), f"cancel {pending.job_id}")
        if pending.core.state is not remote_prefill.State.PENDING and self._pending.pop(pending.job_id, None):
            pending.late.cancel()
            if pending.core.state is remote_prefill.State.CANCELLED:
                self._ended()

    async def _cancel(self, job_id: JobId) -> None:
        try:
            await self._queue.cancel(job_id)
        except StatorError as error:
            # Harmless: the completion of a job that nobody waits for is refused, and its deadline drops it.
            logger.info("could not cancel prefill job %s: %s", job_id, error.message)

    async def _watch_queue(self) -> None:
        async for size in self._queue.watch_size():
            self._queue_waiting = size.waiting
            self._puts_since_size = 0

    def _on_directory_change(self, _change: DirectoryChange) -> None:
        self._count_prefillers()

    def _count_prefillers(self) -> None:
        self._num_prefillers = sum(self._pairs(i) for i in self._directory.instances(role="prefill"))
        if not self._num_prefillers:
            for pending in list(self._pending.values()):
                self._handle(pending, remote_prefill.GaveUp("no prefill instance is left"))

    def _pairs(self, instance: InstanceInfo) -> bool:
        if instance.engine is None:
            return False
        mine, theirs = self._info.pairing, instance.engine.pairing
        if mine == theirs:
            return True
        self._warn_unpaired(instance.instance_id, mine, theirs)
        return False

    def _warn_unpaired(self, instance_id: InstanceId, mine: dict[str, str], theirs: dict[str, str]) -> None:
        keys = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
        differences = ", ".join(f"{k} is {mine.get(k)} here and {theirs.get(k)} there" for k in keys)
        logger.warning("prefill instance %s cannot prefill for this worker: %s", instance_id, differences)

    # End

    async def drain(self) -> None:
        """Refuse new requests and wait until the open ones have ended. The caller bounds the wait."""
        self._draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """Stop watching and putting. Open streams end with the engine's stop, which is the caller's next step."""
        self._draining = True
        if self._unsubscribe is not None:
            self._unsubscribe()
        for pending in list(self._pending.values()):
            pending.late.cancel()
            self._pending.pop(pending.job_id, None)
            pending.call.end(StatorError(ErrorCode.DRAINING, f"instance {self._host.instance_id} stopped"))
            self._ended()
        await self._tasks.close()
