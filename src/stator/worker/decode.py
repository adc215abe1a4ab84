"""The decode worker: takes requests, has long prompts prefilled elsewhere, streams the engine's tokens.

A request's tokens go from the engine straight into the call of the transport; nothing here runs per token. What is
remote about a prefill is decided in `core.disagg` and `core.remote_prefill`; this shell carries out their effects.

Whatever ends a request here ends its work at once wherever that is: in the engine (`abort`), on the queue (`cancel`),
and at the prefill worker that has the job (its call of `prefill_taken` ends).
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from stator.config.schema import VllmWorkerConfig
from stator.core import remote_prefill
from stator.core.disagg import DisaggPolicy, choose_prefill
from stator.core.pairing import Left, Paired, PrefillPeers, Refused, differences, in_words
from stator.core.queue_outlook import QueueOutlook
from stator.core.remote_prefill import CancelJob, EndCrashed, RemotePrefill, Reply, StartFetched, StartLocal
from stator.core.sequence_limits import computes_whole_prompt
from stator.engines.base import Engine
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, JobId, RequestId
from stator.messages.embeddings import EmbedRequest
from stator.messages.engine import EngineInfo, EngineRequest, PrefillDone, PrefillDoneReply, PrefillJob, PrefillTaken
from stator.messages.reports import WorkerReport
from stator.messages.tokens import num_tokens
from stator.queue.base import JobQueue, QueueLoss
from stator.runtime.context import loop_time
from stator.runtime.directory import DirectoryChange, InstanceDirectory
from stator.runtime.settings import FollowSetting
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Call, Sink
from stator.worker.adapters import WorkerAdapters
from stator.worker.host import WorkerHost

logger = logging.getLogger(__name__)

REMOTE_PREFILL_TIMEOUT_S = 25.0
"""When a remote prefill is late. Longer than a lease, so that a job of a dead prefill node is redelivered first."""

CANCEL_TIMEOUT_S = 1.0
"""For how long a worker that stops tries to take its jobs off the queue. Those that stay find nobody who wants them."""


PUT_TIMEOUT_S = 1.0
"""For the queue to take a job: it is a message to a peer, and a client waits for its first token."""

QUEUE_GRACE_S = 1.0
"""A queue that is back within this has its jobs, if it is the same: they are waited for."""


def prefill_queue(info: EngineInfo) -> str:
    """The queue of an engine's prefill jobs: one for each kind of engine, so that a prefill worker is given only jobs
    that it can do."""
    digest = hashlib.blake2b(msgspec.json.encode(sorted(info.pairing.items())), digest_size=8).hexdigest()
    return f"prefill-{digest}"


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
    taken: list[Call] = field(default_factory=list[Call])
    """Of the prefill workers that have the job, or had it."""


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
        adapters: WorkerAdapters | None = None,
    ) -> None:
        """adapters: the engine's LoRA adapters; None: it has none that are loaded or unloaded while it runs."""
        self._engine = engine
        self._adapters = adapters
        if adapters is not None:
            adapters.user = self
        self._info = info
        self._host = host
        self._policy = policy
        self._queue = queue
        self._directory = directory
        self._timeout_s = remote_prefill_timeout_s
        self._tasks = TaskOwner(f"decode worker {host.instance_id}")
        self._pending: dict[JobId, _Pending] = {}
        self._in_engine: dict[RequestId, Call] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._num_open = 0
        self._num_accepted = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._one_ended = asyncio.Event()
        self._draining = False
        self._outlook = QueueOutlook()
        self._doubt_ends: asyncio.TimerHandle | None = None
        self._peers = PrefillPeers(info.pairing)
        self._unsubscribe: Callable[[], None] | None = None
        self._prefills = {"local": 0, "remote": 0, "fallback": 0}

    async def start(self) -> None:
        if not self._policy.remote_prefill:
            return
        self._unsubscribe = self._directory.subscribe(self._on_directory_change)
        self._see_prefillers()
        self._tasks.spawn(self._watch_queue(), "watch queue size")

    def follow_settings(self, follow: FollowSetting) -> None:
        """Apply what the deployment's settings say in place of the policy, from now on. Where remote prefill is off
        there is nothing to decide."""
        if self._policy.remote_prefill:
            follow("conditional-disagg", "conditional_disagg", lambda value: self._set(conditional_disagg=value))
            follow(
                "max-local-prefill-length",
                "max_local_prefill_length",
                lambda value: self._set(max_local_prefill_length=value),
            )
            follow(
                "max-prefill-queue-size",
                "max_prefill_queue_size",
                lambda value: self._set(max_prefill_queue_size=value),
            )

    def _set(self, **changes: Any) -> None:
        self._policy = replace(self._policy, **changes)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return self._num_open

    def report(self) -> WorkerReport:
        seen: dict[str, int] = {}
        if self._policy.remote_prefill:
            seen = {"paired": self._peers.num_paired, "refused": len(self._peers.refused)}
        return WorkerReport(
            self._engine.load(), dict(self._prefills), self._outlook.told_waiting, prefill_instances=seen
        )

    # Requests

    def generate(self, call: Call) -> None:
        """Endpoint `generate`: EngineRequest in, TokenDelta out."""
        request: EngineRequest = call.request
        lora, adapters = request.lora_name, self._adapters
        if lora is not None and adapters is not None and (refusal := adapters.refusal(lora)) is not None:
            call.end(refusal)
            return
        request_id = self._accept(call, request.request_id)
        if request_id is None:
            return
        request = msgspec.structs.replace(request, request_id=request_id)
        num_prompt_tokens = num_tokens(request.prompt_ids) + num_tokens(request.resume_ids)
        choice = choose_prefill(
            self._policy,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=self._engine.cached_prefix_tokens(request) if self._policy.remote_prefill else 0,
            num_waiting_jobs=self._outlook.num_waiting,
            num_prefillers=self._peers.num_paired,
            queue_answers=self._outlook.answers(loop_time()),
            adapter_everywhere=lora is None or self._prefillers_have(lora),
        )
        if logger.isEnabledFor(logging.DEBUG):
            where = "remotely" if choice.remote else "locally"
            logger.debug(
                "prefilling %s (%d tokens) %s: %s", request.request_id, num_prompt_tokens, where, choice.reason
            )
        whole_here = computes_whole_prompt(request.sampling)
        if choice.remote and not whole_here and num_prompt_tokens + 1 <= self._info.max_model_len:
            self._prefill_remotely(request, call)
        else:
            self._prefills["local"] += 1
            self._start_engine(request, call)

    def embed(self, call: Call) -> None:
        """Endpoint `embed`: EmbedRequest in, one Embedding out."""
        request: EmbedRequest = call.request
        request_id = self._accept(call, request.request_id)
        if request_id is not None:
            request = msgspec.structs.replace(request, request_id=request_id)
            self._start_in_engine(request_id, call, lambda sink: self._engine.embed(request, sink))

    def _accept(self, call: Call, request_id: RequestId) -> RequestId | None:
        """Its id in the engine; None if it is refused here."""
        if self._draining:
            call.end(StatorError(ErrorCode.DRAINING, f"instance {self._host.instance_id} is draining"))
            return None
        self._num_open += 1
        self._idle.clear()
        # Callers choose request ids, and may send one again while its last attempt is still being aborted here.
        self._num_accepted += 1
        return RequestId(f"{request_id}/{self._num_accepted}")

    def _start_engine(self, request: EngineRequest, call: Call) -> None:
        self._start_in_engine(request.request_id, call, lambda sink: self._engine.generate(request, sink))

    def _start_in_engine(self, request_id: RequestId, call: Call, start: Callable[[Sink], None]) -> None:
        call.on_cancel(lambda: self._engine.abort(request_id))
        if call.cancelled:
            self._ended()
            return
        self._in_engine[request_id] = call
        start(_EngineSink(call, lambda: self._engine_ended(request_id)))

    def _engine_ended(self, request_id: RequestId) -> None:
        del self._in_engine[request_id]
        self._ended()

    def _ended(self) -> None:
        self._one_ended.set()
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
        self._outlook.put(job_id)
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
            adapter=self._digest(pending.request.lora_name),
        )
        deadline_s = self._timeout_s
        left = pending.call.context.seconds_left(loop_time())
        if left is not None:
            deadline_s = min(deadline_s, max(0.0, left))
        try:
            async with asyncio.timeout(PUT_TIMEOUT_S):
                await self._queue.put(pending.job_id, msgspec.msgpack.encode(job), deadline_s=deadline_s)
        except TimeoutError:
            self._outlook.unanswered(loop_time())
            self._handle(pending, remote_prefill.GaveUp(f"the prefill queue took no job within {PUT_TIMEOUT_S:g} s"))
        except StatorError as error:
            if error.code is ErrorCode.INSTANCE_LOST:
                self._outlook.unanswered(loop_time())
            self._handle(pending, remote_prefill.GaveUp(f"the prefill queue refused the job: {error.message}"))

    def prefill_done(self, call: Call) -> None:
        """Endpoint `prefill_done`: PrefillDone in, one PrefillDoneReply out."""
        done: PrefillDone = call.request
        pending = self._pending.get(done.job_id)
        if pending is None:
            call.items([PrefillDoneReply(accepted=False)])
            call.end()
            return
        result, error = done.result, done.error
        if result is not None and (refusal := self._refusal(done.prefill_instance)) is not None:
            result, error = None, refusal
        self._handle(pending, remote_prefill.Completed(result, error, done.crashed), call, done.prefill_instance)

    def prefill_taken(self, call: Call) -> None:
        """Endpoint `prefill_taken`: PrefillTaken in, no item; the end says that the job is wanted no more."""
        taken: PrefillTaken = call.request
        pending = self._pending.get(taken.job_id)
        if pending is None:
            call.end()
            return
        pending.taken.append(call)
        self._outlook.waits_no_more(taken.job_id)

    def _handle(
        self,
        pending: _Pending,
        event: remote_prefill.Event,
        reply_to: Call | None = None,
        prefill_instance: InstanceId | None = None,
    ) -> None:
        """reply_to, prefill_instance: of a completion."""
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
                case EndCrashed(reason):
                    message = f"the prefill engine of {prefill_instance} died of the step that computed it: {reason}"
                    error = StatorError(ErrorCode.ENGINE_CRASHED, message, instance_id=prefill_instance)
                    pending.call.end(error)
                case CancelJob():
                    task = self._tasks.spawn(self._cancel(pending.job_id), f"cancel {pending.job_id}")
                    self._cancels.add(task)
                    task.add_done_callback(self._cancels.discard)
        if pending.core.state is not remote_prefill.State.PENDING and self._pending.pop(pending.job_id, None):
            self._outlook.waits_no_more(pending.job_id)
            pending.late.cancel()
            for taken in pending.taken:
                taken.end()
            if pending.core.state in (remote_prefill.State.CANCELLED, remote_prefill.State.CRASHED):
                self._ended()

    async def _cancel(self, job_id: JobId) -> None:
        try:
            await self._queue.cancel(job_id)
        except StatorError as error:
            # Harmless: the completion of a job that nobody waits for is refused, and its deadline drops it.
            logger.info("could not cancel prefill job %s: %s", job_id, error.message)

    async def _watch_queue(self) -> None:
        async for news in self._queue.watch_size():
            if isinstance(news, QueueLoss):
                self._on_queue_loss(news)
                continue
            self._end_doubt()
            self._outlook.sized(news.waiting)

    def _on_queue_loss(self, loss: QueueLoss) -> None:
        """Jobs that prefill workers have are finished without the queue. Those that waited come back with it, or are
        lost: then they are done here."""
        if loss.jobs_lost:
            self._give_up_waiting_jobs()
        elif not self._outlook.away:
            self._doubt_ends = asyncio.get_running_loop().call_later(QUEUE_GRACE_S, self._give_up_waiting_jobs)
        self._outlook.lost()

    def _give_up_waiting_jobs(self) -> None:
        self._end_doubt()
        for pending in list(self._pending.values()):
            if all(taken.cancelled for taken in pending.taken):
                self._handle(pending, remote_prefill.GaveUp("the prefill queue was lost"))

    def _end_doubt(self) -> None:
        if self._doubt_ends is not None:
            self._doubt_ends.cancel()
            self._doubt_ends = None

    # Prefill instances

    def _on_directory_change(self, _change: DirectoryChange) -> None:
        self._see_prefillers()

    def _see_prefillers(self) -> None:
        instances = self._directory.instances(role="prefill", model=self._info.model)
        news = self._peers.update({i.instance_id: i.engine.pairing for i in instances if i.engine is not None})
        for new in news:
            match new:
                case Refused(instance_id, found):
                    logger.warning(
                        "prefill instance %s cannot prefill for this worker: %s", instance_id, in_words(found)
                    )
                case Paired(instance_id):
                    logger.info("prefill instance %s can prefill for this worker now", instance_id)
                case Left(instance_id):
                    logger.info("prefill instance %s, which could not prefill for this worker, has left", instance_id)
        if not self._peers.num_paired:
            for pending in list(self._pending.values()):
                self._handle(pending, remote_prefill.GaveUp("no prefill instance is left"))

    def _refusal(self, instance_id: InstanceId) -> str | None:
        """Why this instance's KV blocks must not be taken, even if it has computed them: a second look, after its own.

        One that discovery no longer shows may be taken from: it compared the pairings when it took the job, and whether
        it still lives the engine finds out before it fetches.
        """
        instance = self._directory.get(instance_id)
        if instance is None or instance.engine is None:
            return None
        found = differences(self._info.pairing, instance.engine.pairing)
        return f"prefill instance {instance_id} does not pair: {in_words(found)}" if found else None

    # LoRA adapters

    async def adapter_idle(self, name: str) -> None:
        while any(self._using(name)):
            self._one_ended.clear()
            await self._one_ended.wait()

    def end_adapter(self, name: str, error: StatorError) -> int:
        ended = list(self._using(name))
        for request_id in ended:
            self._end_early(request_id, error)
        return len(ended)

    def _using(self, name: str) -> Iterator[RequestId]:
        for pending in self._pending.values():
            if pending.request.lora_name == name:
                yield pending.request.request_id
        for request_id, call in self._in_engine.items():
            if call.request.lora_name == name:
                yield request_id

    def _end_early(self, request_id: RequestId, error: StatorError) -> None:
        for pending in [each for each in self._pending.values() if each.request.request_id == request_id]:
            pending.call.end(error)
            self._handle(pending, remote_prefill.RequestEnded())
        if (call := self._in_engine.get(request_id)) is not None:
            call.end(error)
            self._engine.abort(request_id)

    def _digest(self, lora_name: str | None) -> str:
        return "" if lora_name is None or self._adapters is None else self._adapters.digest(lora_name)

    def _prefillers_have(self, lora_name: str) -> bool:
        """Whether all that may take our jobs have the very adapter that is here."""
        here = self._digest(lora_name)
        instances = self._directory.instances(role="prefill", model=self._info.model)
        paired = [i for i in instances if i.engine is not None and i.engine.pairing == self._info.pairing]
        found = [instance.adapter(lora_name) for instance in paired]
        return bool(here) and all(adapter is not None and adapter.digest == here for adapter in found)

    # End

    async def drain(self) -> None:
        """Refuse new requests and wait until the open ones have ended. The caller bounds the wait."""
        self._draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """End what is still open with DRAINING, so that it goes on elsewhere. The engine is stopped after this."""
        self._draining = True
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._end_doubt()
        stopped = f"instance {self._host.instance_id} stopped"
        for pending in list(self._pending.values()):
            pending.call.end(StatorError(ErrorCode.DRAINING, stopped))
            self._handle(pending, remote_prefill.RequestEnded())
        for request_id, call in list(self._in_engine.items()):
            call.end(StatorError(ErrorCode.DRAINING, stopped))
            self._engine.abort(request_id)
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=CANCEL_TIMEOUT_S)
        await self._tasks.close()
