"""The prefill worker: pulls jobs while it has room, computes their KV blocks, tells the decode workers, acks.

A job is in exactly one of three hands: the queue's (waiting), ours (from the pull to ack, nack or lost extension), or
the decode worker's (once it accepted the completion, it fetches and releases the blocks). Completions that are not
accepted release their blocks at once.

While we compute a job, a call of `prefill_taken` is open at its decode worker, which ends it when the request is
cancelled or was served otherwise: we stop then. That a job is no longer ours when we extend it says the same, later.

A job whose own step the engine died of is finished, not given back: it would be handed to the next engine as if nothing
had happened. The decode worker is told, and what comes of it is decided where its request's deaths are counted.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from stator.core.disagg import PrefillRoom
from stator.core.pairing import differences, in_words
from stator.discovery.base import Lease
from stator.engines.base import Engine
from stator.errors import DECODE_ERRORS, ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.messages.engine import EngineInfo, PrefillDone, PrefillDoneReply, PrefillJob, PrefillResult, PrefillTaken
from stator.messages.reports import WorkerReport
from stator.messages.tokens import num_tokens
from stator.queue.base import Delivery, JobQueue
from stator.runtime.context import CallContext, loop_time
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Sink, Target
from stator.transport.calls import call
from stator.worker.adapters import WorkerAdapters
from stator.worker.host import WorkerHost

logger = logging.getLogger(__name__)

PULL_WAIT_S = 5.0
EXTEND_EVERY_S = 1.0
NOTIFY_TIMEOUT_S = 5.0
MAX_BACKOFF_S = 2.0


@dataclass(slots=True)
class _InHand:
    delivery: Delivery
    job: PrefillJob
    request_id: RequestId
    num_prompt_tokens: int
    crashed: bool = False
    """The engine died of it."""

    served: asyncio.Task[None] | None = None
    given_up: StatorError | None = None
    """Why it was aborted here, though its result was wanted."""


class _ResultSink(Sink):
    """Turns a prefill's stream into a future."""

    def __init__(self, in_hand: _InHand) -> None:
        self._in_hand = in_hand
        self.result: asyncio.Future[PrefillResult] = asyncio.get_running_loop().create_future()

    def items(self, items: Sequence[Any], /) -> None:
        if not self.result.done():
            self.result.set_result(items[0])

    def end(self, error: StatorError | None = None, /) -> None:
        if not self.result.done():
            self._in_hand.crashed = error is not None and error.code is ErrorCode.ENGINE_CRASHED
            self.result.set_exception(error or StatorError(ErrorCode.INTERNAL, "the engine gave no prefill result"))


class _TakenSink(Sink):
    """A call of `prefill_taken`. unwanted: called at its end; one that was lost or refused says nothing."""

    def __init__(self, unwanted: Callable[[], None]) -> None:
        self._unwanted = unwanted

    def items(self, items: Sequence[Any], /) -> None:
        pass

    def end(self, error: StatorError | None = None, /) -> None:
        if error is None:
            self._unwanted()


class PrefillWorker:
    """Owns the jobs of one prefill engine between `start` and `close`; the engine itself belongs to the caller."""

    def __init__(
        self,
        *,
        engine: Engine,
        info: EngineInfo,
        host: WorkerHost,
        queue: JobQueue,
        lease: Lease,
        rng: Random,
        adapters: WorkerAdapters | None = None,
    ) -> None:
        """adapters: as DecodeWorker's."""
        self._engine = engine
        self._adapters = adapters
        if adapters is not None:
            adapters.user = self
        self._info = info
        self._host = host
        self._queue = queue
        self._lease = lease
        self._rng = rng
        self._tasks = TaskOwner(f"prefill worker {host.instance_id}")
        self._in_hand: dict[RequestId, _InHand] = {}
        self._changed = asyncio.Event()
        self._draining = False
        self._pulling: asyncio.Task[None] | None = None
        self._prefills = {"done": 0, "failed": 0, "refused": 0, "unwanted": 0}

    async def start(self) -> None:
        self._pulling = self._tasks.spawn(self._pull_jobs(), "pull jobs")
        self._tasks.spawn(self._extend_jobs(), "extend jobs")

    def report(self) -> WorkerReport:
        return WorkerReport(self._engine.load(), dict(self._prefills))

    # Pulling

    async def _pull_jobs(self) -> None:
        backoff_s = 0.05
        while True:
            room = self._room()
            if not room:
                self._changed.clear()
                await self._changed.wait()
                continue
            try:
                deliveries = await self._queue.pull(
                    self._host.instance_id, self._lease.lease_id, max_jobs=room, wait_s=PULL_WAIT_S
                )
                backoff_s = 0.05
            except StatorError as error:
                logger.warning("cannot pull prefill jobs, trying again: %s", error.message)
                await asyncio.sleep(backoff_s * (0.5 + self._rng.random()))
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)
                continue
            for delivery in deliveries:
                self._take(delivery)

    def _room(self) -> int:
        load = self._engine.load()
        return PrefillRoom(
            jobs_in_hand=len(self._in_hand),
            tokens_in_hand=sum(j.num_prompt_tokens for j in self._in_hand.values()),
            max_num_seqs=self._info.max_num_seqs,
            max_num_batched_tokens=self._info.max_num_batched_tokens,
            num_blocks=load.num_blocks,
            num_blocks_used=load.num_blocks_used,
        ).jobs_to_pull()

    def _take(self, delivery: Delivery) -> None:
        try:
            job = msgspec.msgpack.decode(delivery.payload, type=PrefillJob)
        except DECODE_ERRORS as error:
            logger.error("prefill job %s cannot be read (%s); dropped", delivery.job_id, error)
            self._tasks.spawn(self._ack(delivery), f"ack {delivery.job_id}")
            return
        # Attempts of one job may overlap in one engine (a lost extension, then the redelivery to the same worker).
        request_id = RequestId(f"{delivery.job_id}#{delivery.attempt}")
        tokens = num_tokens(job.request.prompt_ids) + num_tokens(job.request.resume_ids)
        in_hand = _InHand(delivery, job, request_id, tokens)
        self._in_hand[request_id] = in_hand
        logger.info("took prefill job %s: %d tokens, attempt %d", job.job_id, tokens, delivery.attempt)
        in_hand.served = self._tasks.spawn(self._serve(in_hand), f"prefill {request_id}")

    # One job

    async def _serve(self, in_hand: _InHand) -> None:
        try:
            refusal = self._refusal(in_hand.job)
            if refusal is not None:
                await self._finish(in_hand, None, refusal, no_result="refused")
                return
            result, error = await self._compute(in_hand)
            if error is not None and error.code in (ErrorCode.ENGINE_DEAD, ErrorCode.ENGINE_CRASHED):
                self._pull_no_more()
            if error is not None and error.code in (ErrorCode.ENGINE_DEAD, ErrorCode.DRAINING):
                await self._nack(in_hand.delivery)
                return
            await self._finish(in_hand, result, error)
        finally:
            self._in_hand.pop(in_hand.request_id, None)
            self._changed.set()

    def _refusal(self, job: PrefillJob) -> StatorError | None:
        found = differences(self._info.pairing, job.pairing)
        message = f"prefill instance {self._host.instance_id} does not pair with {job.decode_instance}"
        if found:
            return StatorError(ErrorCode.UNSUPPORTED, f"{message}: {in_words(found)}")
        name, adapters = job.request.lora_name, self._adapters
        if name is None or adapters is None:
            return None
        if (refusal := adapters.refusal(name)) is not None:
            return refusal
        if adapters.digest(name) != job.adapter:
            return StatorError(ErrorCode.UNSUPPORTED, f"{message}: its adapter {name!r} is another one")
        return None

    # LoRA adapters

    async def adapter_idle(self, name: str) -> None:
        while any(each.job.request.lora_name == name for each in self._in_hand.values()):
            self._changed.clear()
            await self._changed.wait()

    def end_adapter(self, name: str, error: StatorError) -> int:
        ended = [each for each in self._in_hand.values() if each.job.request.lora_name == name]
        for in_hand in ended:
            in_hand.given_up = error
            self._engine.abort(in_hand.request_id)
        return len(ended)

    async def _compute(self, in_hand: _InHand) -> tuple[PrefillResult | None, StatorError | None]:
        sink, request_id, job = _ResultSink(in_hand), in_hand.request_id, in_hand.job
        taken = self._host.client.open(
            Target(job.decode_addresses, "prefill_taken", job.decode_instance),
            PrefillTaken(job.job_id, in_hand.delivery.attempt, self._host.instance_id),
            _TakenSink(lambda: self._engine.abort(request_id)),
            context=CallContext(job.request.request_id),
        )
        self._engine.prefill(msgspec.structs.replace(job.request, request_id=request_id), sink)
        try:
            return await sink.result, None
        except StatorError as error:
            return None, error
        except asyncio.CancelledError:
            self._engine.abort(request_id)
            raise
        finally:
            taken.cancel()

    async def _finish(
        self,
        in_hand: _InHand,
        result: PrefillResult | None,
        error: StatorError | None,
        *,
        no_result: str = "failed",
    ) -> None:
        """no_result: what a job without one is counted as."""
        if in_hand.given_up is not None and result is None:
            error = in_hand.given_up
        if error is not None and error.code is ErrorCode.CANCELLED:
            # Another attempt has the job, and this changes nothing, or nobody wants it.
            await self._ack(in_hand.delivery)
            return
        done = PrefillDone(
            job_id=in_hand.job.job_id,
            attempt=in_hand.delivery.attempt,
            prefill_instance=self._host.instance_id,
            result=result,
            error=error.message if error else None,
            crashed=in_hand.crashed,
        )
        accepted = await self._notify(in_hand.job, done)
        outcome = no_result if result is None else "done" if accepted else "unwanted"
        self._prefills[outcome] += 1
        if result is not None and not accepted:
            self._engine.release(TransferId(result.transfer["transfer_id"]))
        await self._ack(in_hand.delivery)

    async def _notify(self, job: PrefillJob, done: PrefillDone) -> bool:
        """Whether the decode worker wants the blocks. A decode worker that cannot be told prefills for itself."""
        target = Target(job.decode_addresses, "prefill_done", job.decode_instance)
        context = CallContext(job.request.request_id, deadline=loop_time() + NOTIFY_TIMEOUT_S)
        try:
            reply: PrefillDoneReply = await call(
                self._host.client, target, done, context=context, item_type=PrefillDoneReply
            )
        except StatorError as error:
            logger.warning("cannot tell %s that %s is prefilled: %s", job.decode_instance, job.job_id, error.message)
            return False
        return reply.accepted

    async def _ack(self, delivery: Delivery) -> None:
        try:
            await self._queue.ack(delivery.job_id, delivery.attempt)
        except StatorError as error:
            # At least once: the job may be delivered again, and its completion will then not be accepted.
            logger.warning("cannot ack prefill job %s: %s", delivery.job_id, error.message)

    async def _nack(self, delivery: Delivery) -> None:
        try:
            await self._queue.nack(delivery.job_id, delivery.attempt)
        except StatorError as error:
            # It comes back anyway, when the ack wait or our lease ends.
            logger.warning("cannot give prefill job %s back: %s", delivery.job_id, error.message)

    async def _extend_jobs(self) -> None:
        """Keep what is in hand, and notice what is no longer ours: cancelled, or given to another consumer."""
        while True:
            await asyncio.sleep(EXTEND_EVERY_S)
            for in_hand in list(self._in_hand.values()):
                try:
                    ours = await self._queue.extend(in_hand.delivery.job_id, in_hand.delivery.attempt)
                except StatorError as error:
                    logger.warning("cannot extend prefill jobs: %s", error.message)
                    break
                if not ours and in_hand.request_id in self._in_hand:
                    self._engine.abort(in_hand.request_id)

    # End

    @property
    def num_open(self) -> int:
        """Jobs in hand; without any, the KV blocks of finished ones that wait to be fetched."""
        return len(self._in_hand) or self._engine.load().num_blocks_held

    def _pull_no_more(self) -> None:
        """A dead engine would refuse job after job, and each refusal counts as a delivery."""
        if self._pulling is not None:
            self._pulling.cancel()

    async def drain(self) -> None:
        """Pull no more, and wait until the jobs in hand are done and their blocks were fetched, released, or held for
        TRANSFER_HOLD_S. The caller bounds the wait."""
        self._draining = True
        if self._pulling is not None:
            self._pulling.cancel()
        while self._in_hand:
            self._changed.clear()
            await self._changed.wait()
        await self._engine.holds_ended()

    async def close(self) -> None:
        """Give back what is in hand, so that another worker takes it at once. What the engine died of is not given
        back; its decode worker is told."""
        self._pull_no_more()
        in_hand = list(self._in_hand.values())
        await asyncio.gather(*(self._nack(each.delivery) for each in in_hand if not each.crashed))
        telling = [each.served for each in in_hand if each.crashed and each.served is not None]
        if telling:
            await asyncio.wait(telling, timeout=NOTIFY_TIMEOUT_S)
        await self._tasks.close()
