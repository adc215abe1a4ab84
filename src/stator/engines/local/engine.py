"""The local engine: the scheduler of `core.scheduler` around a runner.

One task plans a step, has the executor compute it, applies the result and pushes all sinks within one callback of the
loop. When there is nothing to compute it waits for an event; nothing polls. All state is the event loop's; the
executor, a thread by default, only ever sees a step's chunks and block contents.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from stator import __version__
from stator.core.blocks import BlockManager
from stator.core.resuming import first_used
from stator.core.scheduler import LiveSequence, Plan, ScheduledChunk, Scheduler, SchedulerConfig, StepOutcome
from stator.core.sequence_limits import (
    cannot_embed,
    cannot_truncate,
    computes_whole_prompt,
    lacks,
    validate_embedding,
)
from stator.engines.base import EngineHost, KvListener
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.capacity import scheduler_config
from stator.engines.local.compiling import Compiling
from stator.engines.local.embedding import EmbeddingLine
from stator.engines.local.executor import ExecutorFactory
from stator.engines.local.grammar import TokenGrammar
from stator.engines.local.pooling import EmbeddingRunner
from stator.engines.local.runner import Chunk, ChunkScores, Runner, SampleSpec, export_blocks
from stator.engines.local.scores import score_spec
from stator.engines.local.transfer import CONNECTOR, TransferParams, as_dict, parse_transfer
from stator.engines.local.worker_thread import WorkerThread
from stator.engines.lora import not_loaded
from stator.engines.sinks import end_sink, push_last
from stator.engines.transfer.fetcher import BlockFetcher
from stator.engines.transfer.messages import digest_tokens
from stator.engines.transfer.server import BlockServer
from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.messages.embeddings import EmbedRequest
from stator.messages.engine import (
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    KvEvent,
    PrefillResult,
    SamplingParams,
    TokenDelta,
    TokenScore,
)
from stator.messages.lora import LoraAdapter
from stator.messages.tokens import num_tokens, unpack
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Sink

logger = logging.getLogger(__name__)

RunnerFactory = Callable[[LocalEngineArgs], Runner]
"""Loads the model; runs on the engine's executor. Raises ConfigError for one that cannot be used."""

Prepare = Callable[[LocalEngineArgs], Awaitable[LocalEngineArgs]]
"""What has to be waited for before the model can be loaded; may be cancelled. Returns what the runner is made from."""


@dataclass(slots=True, eq=False)
class _Stream:
    """A request's sink and sequence. started: a delta was pushed. prompt_ids: unpacked, once penalties asked for it.

    transfer: set until the prefill engine was told that its blocks are needed no more. num_peer_cached: leading tokens
    that it had in its prefix cache, once its blocks are here. prompt_scores: of the prompt's tokens but the first, as
    far as they are computed.
    """

    sink: Sink
    sequence: LiveSequence
    transfer: TransferParams | None = None
    fetch: asyncio.Task[None] | None = None
    num_peer_cached: int = 0
    started: bool = False
    prompt_ids: list[int] | None = None
    prompt_scores: list[TokenScore] = field(default_factory=list[TokenScore])
    grammar: TokenGrammar | None = None


class LocalEngine:
    """Implements engines.base.Engine; all methods are for the event loop on which `start` was called."""

    def __init__(
        self,
        args: LocalEngineArgs,
        *,
        runner_factory: RunnerFactory,
        prepare: Prepare | None = None,
        executor_factory: ExecutorFactory = WorkerThread,
        rng: random.Random | None = None,
    ) -> None:
        """executor_factory: where steps are computed; the default starts a thread, and nothing else does.

        rng: draws transfer ids, and seeds for requests without one; by default seeded by args.seed, else by the
        system."""
        self._args = args
        self._runner_factory = runner_factory
        self._prepare = prepare
        self._executor_factory = executor_factory
        self._rng = rng if rng is not None else random.Random(args.seed)
        self._streams: dict[RequestId, _Stream] = {}
        self._listeners: dict[int, KvListener] = {}
        self._num_listeners = 0
        self._num_transfer_failures = 0
        self._ended: StatorError | None = None
        self._embeddings: EmbeddingLine | None = None
        self._computing: Sequence[ScheduledChunk] = ()
        self.adapters: dict[str, LoraAdapter] = {}
        self._started = False
        self._stop_lock = asyncio.Lock()

    async def start(self, host: EngineHost) -> EngineInfo:
        args = self._args
        args.check()
        if self._prepare is not None:
            args = await self._prepare(args)
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._executor = self._executor_factory()
        self._tasks = TaskOwner("local engine")
        try:
            self._runner = await self._executor.run(self._runner_factory, args)
            config = scheduler_config(args, self._runner)
        except BaseException:
            await self._executor.close()
            raise
        self._blocks = BlockManager(
            self._runner.num_blocks,
            self._runner.block_size,
            model=args.name,
            enable_prefix_caching=args.enable_prefix_caching,
        )
        self._scheduler = Scheduler(config, self._blocks)
        self._compiling = Compiling(self._runner.grammars, self._add, end_sink)
        if isinstance(self._runner, EmbeddingRunner):
            self._embeddings = EmbeddingLine(self._runner, self._executor)
        self._server = BlockServer(
            blocks_of=self._scheduler.held_blocks,
            free=self._free_held,
            export=self._export_blocks,
            hold_s=args.transfer_hold_s,
        )
        self._server.register(host)
        self._fetcher = BlockFetcher(host.client, self._import_blocks, timeout_s=args.transfer_timeout_s)
        self._started = True
        self._steps = self._tasks.spawn(self._run(), "steps")
        info = self._describe(config)
        self._name, self._max_model_len = info.engine, info.max_model_len
        return info

    def generate(self, request: EngineRequest, sink: Sink) -> None:
        if (error := self._refusal(request)) is not None:
            asyncio.get_running_loop().call_soon(end_sink, sink, error)
            return
        if request.sampling.grammar is None:
            self._add(request, sink, None)
            return
        try:
            self._compiling.begin(request, sink)
        except StatorError as error:
            self._loop.call_soon(end_sink, sink, error)

    def _add(self, request: EngineRequest, sink: Sink, grammar: TokenGrammar | None) -> None:
        reason = self._scheduler.finished_on_arrival(request)
        if reason is not None:
            self._loop.call_soon(push_last, sink, TokenDelta([], reason, 0))
            return
        transfer = self._usable_transfer(request)
        num_fetchable = transfer.num_tokens if transfer is not None else 0
        if computes_whole_prompt(request.sampling):
            num_fetchable = 0
        sequence = self._scheduler.add(request, seed=self._seed_of(request.sampling), num_fetchable=num_fetchable)
        self._streams[request.request_id] = _Stream(sink, sequence, transfer, grammar=grammar)
        self._wake.set()

    def prefill(self, request: EngineRequest, sink: Sink) -> None:
        if (error := self._refusal(request)) is not None:
            asyncio.get_running_loop().call_soon(end_sink, sink, error)
            return
        transfer_id = TransferId(f"{self._host.instance_id}.{self._rng.getrandbits(96):024x}")
        sequence = self._scheduler.add(request, seed=0, hold_as=transfer_id)
        self._streams[request.request_id] = _Stream(sink, sequence)
        self._wake.set()

    def embed(self, request: EmbedRequest, sink: Sink) -> None:
        try:
            self._check_embedding(request).begin(request, sink)
        except StatorError as error:
            asyncio.get_running_loop().call_soon(end_sink, sink, error)

    def _check_embedding(self, request: EmbedRequest) -> EmbeddingLine:
        if (error := self._not_ready(request.request_id)) is not None:
            raise error
        if self._embeddings is None:
            raise cannot_embed(self._name)
        if request.dimensions is not None:
            raise cannot_truncate(self._name, request.dimensions)
        validate_embedding(request, self._runner.vocab_size, self._max_model_len)
        return self._embeddings

    def abort(self, request_id: RequestId) -> None:
        error = StatorError(ErrorCode.CANCELLED, "the request was cancelled")
        sink = self._compiling.cancel(request_id)
        if sink is None and self._embeddings is not None:
            sink = self._embeddings.cancel(request_id)
        if sink is not None:
            self._loop.call_soon(end_sink, sink, error)
            return
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return
        self._drop(stream)
        # Not from inside the caller's call, which may be in the midst of a change of its own.
        self._loop.call_soon(end_sink, stream.sink, error)
        self._wake.set()

    def release(self, transfer_id: TransferId) -> None:
        if self._started:
            self._server.release(transfer_id)

    async def holds_ended(self) -> None:
        if self._started:
            await self._server.holds_ended()

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    @property
    def num_transfer_failures(self) -> int:
        """Requests with a transfer whose blocks could not be fetched and whose prompt was computed here instead."""
        return self._num_transfer_failures

    def cached_prefix_tokens(self, request: EngineRequest) -> int:
        return self._scheduler.cached_prefix_tokens(request)

    def watch_kv(self, listener: KvListener) -> Callable[[], None]:
        self._publish_kv()
        listener(self._blocks.snapshot())
        self._num_listeners += 1
        key = self._num_listeners
        self._listeners[key] = listener

        def unwatch() -> None:
            self._listeners.pop(key, None)

        return unwatch

    async def reset_prefix_cache(self) -> bool:
        emptied = self._blocks.reset_cache()
        self._publish_kv()
        return emptied

    async def stop(self) -> None:
        async with self._stop_lock:
            if not self._started:
                return
            self._end_all(StatorError(ErrorCode.ENGINE_DEAD, "the engine was stopped"))
            self._wake.set()
            # A step under way cannot be interrupted; its result finds no sequence.
            await asyncio.wait([self._steps])
            await self._server.close()
            await self._tasks.close()
            await self._compiling.close()
            if self._embeddings is not None:
                await self._embeddings.close()
            await self._executor.close()
            self._publish_kv()
            self._listeners.clear()

    async def _run(self) -> None:
        try:
            while self._ended is None:
                plan = self._scheduler.plan()
                for sequence in plan.fetches:
                    self._start_fetch(sequence)
                self._publish_kv()
                if not plan.chunks:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                chunks = [self._chunk(chunk) for chunk in plan.chunks]
                self._computing = plan.chunks
                sampled = await self._executor.step(self._runner, chunks)
                self._computing = ()
                self._finish_step(plan, sampled, self._runner.scores)
        except Exception as error:
            logger.exception("the local engine failed")
            self._die(f"{type(error).__name__} in the engine's step: {error}")

    def _finish_step(self, plan: Plan, sampled: Sequence[int | None], scores: Mapping[int, ChunkScores]) -> None:
        outcomes = self._scheduler.apply(plan, sampled)
        self._publish_kv()
        sampled_scores = self._take_scores(plan, scores) if scores else {}
        for outcome in outcomes:
            self._deliver(outcome, sampled_scores)

    def _take_scores(self, plan: Plan, scores: Mapping[int, ChunkScores]) -> dict[RequestId, TokenScore]:
        """Keeps those of prompts with their streams; returns those of the tokens that were sampled."""
        found: dict[RequestId, TokenScore] = {}
        for index, made in scores.items():
            chunk = plan.chunks[index]
            stream = self._streams.get(chunk.sequence.request_id)
            if stream is None or stream.sequence is not chunk.sequence:
                continue
            if made.next:
                # A sequence that was preempted computes its prompt again.
                stream.prompt_scores[chunk.start :] = made.next
            if made.sampled is not None:
                found[chunk.sequence.request_id] = made.sampled
        return found

    def _deliver(self, outcome: StepOutcome, scores: Mapping[RequestId, TokenScore]) -> None:
        sequence = outcome.sequence
        # A sink may abort other requests of the same step.
        stream = self._streams.get(sequence.request_id)
        if stream is None or stream.sequence is not sequence:
            return
        if sequence.hold_as is not None:
            self._deliver_prefill(stream, sequence, sequence.hold_as)
            return
        assert outcome.token_id is not None
        score = scores.get(sequence.request_id) if scores else None
        delta = self._delta(stream, outcome.token_id, outcome.finish_reason, None if score is None else [score])
        if outcome.finish_reason is None:
            self._push(stream, delta)
            return
        del self._streams[sequence.request_id]
        self._release_at_peer(stream)
        push_last(stream.sink, delta)

    def _delta(
        self, stream: _Stream, token_id: int, reason: FinishReason | None, scores: list[TokenScore] | None
    ) -> TokenDelta:
        if stream.started:
            return TokenDelta([token_id], reason) if scores is None else TokenDelta([token_id], reason, scores=scores)
        stream.started = True
        # What was not fetched was in the own prefix cache: nobody needs the peer's blocks any more.
        self._release_at_peer(stream)
        sequence = stream.sequence
        num_local = sequence.num_cached
        num_peer = min(stream.num_peer_cached, num_local + sequence.num_transferred)
        num_prompt = num_tokens(sequence.request.prompt_ids)
        num_cached = min(num_prompt, max(num_local, num_peer))
        prompt_scores = stream.prompt_scores if computes_whole_prompt(sequence.request.sampling) else None
        return TokenDelta([token_id], reason, num_cached, sequence.num_transferred, scores, prompt_scores)

    def _deliver_prefill(self, stream: _Stream, sequence: LiveSequence, transfer_id: TransferId) -> None:
        del self._streams[sequence.request_id]
        self._server.hold(transfer_id)
        params = TransferParams(
            connector=CONNECTOR,
            transfer_id=transfer_id,
            instance_id=self._host.instance_id,
            addresses=self._host.addresses,
            num_tokens=sequence.num_tokens,
            num_cached_tokens=sequence.num_cached,
            digest=digest_tokens(sequence.request, sequence.num_tokens),
        )
        num_prompt = num_tokens(sequence.request.prompt_ids)
        push_last(stream.sink, PrefillResult(as_dict(params), num_prompt, min(sequence.num_cached, num_prompt)))

    def _push(self, stream: _Stream, delta: TokenDelta) -> None:
        try:
            stream.sink.items([delta])
        except Exception:
            logger.exception("the sink of request %s failed; aborting it", stream.sequence.request_id)
            self.abort(stream.sequence.request_id)

    def _chunk(self, chunk: ScheduledChunk) -> Chunk:
        sequence = chunk.sequence
        token_ids = sequence.token_ids(chunk.start, chunk.start + chunk.num_tokens)
        sample = self._sample_spec(sequence) if chunk.samples else None
        # Copies: the executor reads them while the loop may change the table.
        return Chunk(tuple(sequence.table.block_ids), token_ids, chunk.start, sample, score_spec(chunk))

    def _sample_spec(self, sequence: LiveSequence) -> SampleSpec:
        params = sequence.request.sampling
        prompt_ids = output_ids = None
        stream = self._streams[sequence.request_id]
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            if stream.prompt_ids is None:
                stream.prompt_ids = unpack(sequence.request.prompt_ids)
            prompt_ids, output_ids = stream.prompt_ids, list(sequence.output_ids)
        elif stream.grammar is not None:
            output_ids = list(sequence.output_ids)
        num_output = len(sequence.output_ids)
        return SampleSpec(
            params,
            sequence.seed,
            sequence.num_tokens,
            num_output,
            prompt_ids,
            output_ids,
            stream.grammar,
            self._weights_of(sequence.request),
        )

    def _weights_of(self, request: EngineRequest) -> bytes:
        """See SampleSpec.adapter; for an engine that has adapters."""
        return b""

    def _start_fetch(self, sequence: LiveSequence) -> None:
        stream = self._streams[sequence.request_id]
        assert stream.transfer is not None, "only a sequence with a transfer enters FETCHING"
        stream.fetch = self._tasks.spawn(self._fetch(stream, stream.transfer), "fetch")

    async def _fetch(self, stream: _Stream, transfer: TransferParams) -> None:
        """Fill a FETCHING sequence's blocks, or let its prompt be computed here. Cancelled when the request ends."""
        sequence = stream.sequence
        indexes = self._scheduler.fetch_range(sequence)
        block_ids = [sequence.table.block_ids[index] for index in indexes]
        try:
            await self._fetcher.fetch(transfer, sequence.request_id, indexes, block_ids)
        except StatorError as error:
            self._count_transfer_failure(sequence.request_id, error.message)
            self._scheduler.fetch_failed(sequence)
        except Exception:
            logger.exception("importing KV blocks for request %s failed", sequence.request_id)
            self._count_transfer_failure(sequence.request_id, "they could not be imported")
            self._scheduler.fetch_failed(sequence)
        else:
            stream.num_peer_cached = transfer.num_cached_tokens
            self._scheduler.fetched(sequence)
        self._release_at_peer(stream)
        self._publish_kv()
        self._wake.set()

    def _usable_transfer(self, request: EngineRequest) -> TransferParams | None:
        if request.transfer is None:
            return None
        try:
            return parse_transfer(request)
        except ValueError as error:
            self._count_transfer_failure(request.request_id, str(error))
            return None

    def _count_transfer_failure(self, request_id: RequestId, reason: str) -> None:
        self._num_transfer_failures += 1
        logger.warning("request %s: no KV blocks from the prefill engine (%s); computing here", request_id, reason)

    def _release_at_peer(self, stream: _Stream) -> None:
        transfer, stream.transfer = stream.transfer, None
        if transfer is not None:
            self._fetcher.release(transfer, stream.sequence.request_id)

    def _free_held(self, transfer_id: TransferId) -> None:
        self._scheduler.release_held(transfer_id)
        self._wake.set()

    async def _export_blocks(self, block_ids: Sequence[int], num_bytes: int) -> list[bytes]:
        return await self._executor.run(export_blocks, self._runner, block_ids, num_bytes)

    async def _import_blocks(self, blocks: list[tuple[int, bytes]]) -> None:
        await self._executor.receive(self._runner, blocks)

    def _not_ready(self, request_id: RequestId) -> StatorError | None:
        if not self._started:
            return StatorError(ErrorCode.ENGINE_DEAD, "the engine has not been started")
        if self._ended is not None:
            return StatorError(self._ended.code, self._ended.message)
        embedding = self._embeddings is not None and request_id in self._embeddings
        if request_id in self._streams or request_id in self._compiling or embedding:
            message = f"request {request_id} is already running on this engine; use another request id"
            return StatorError(ErrorCode.INVALID_REQUEST, message, param="request_id")
        return None

    def _refusal(self, request: EngineRequest) -> StatorError | None:
        if (error := self._not_ready(request.request_id)) is not None:
            return error
        if request.lora_name is not None and request.lora_name not in self.adapters:
            return not_loaded(request.lora_name, self.adapters)
        field = first_used(request.sampling, self._runner.cannot)
        if field is not None:
            return lacks(self._name, field)
        try:
            self._scheduler.check(request)
        except StatorError as error:
            return error
        return None

    def _seed_of(self, params: SamplingParams) -> int:
        return params.seed if params.seed is not None else self._rng.getrandbits(63)

    def _publish_kv(self) -> None:
        events: Sequence[KvEvent] = self._blocks.take_events()
        if not events:
            return
        for listener in list(self._listeners.values()):
            try:
                listener(events)
            except Exception:
                logger.exception("a listener to KV events failed")

    def _die(self, reason: str) -> None:
        """ENGINE_CRASHED for those whose prompt or first token the failed step was computing, ENGINE_DEAD for
        others."""
        failed = {chunk.sequence for chunk in self._computing}
        suspects = [s.sequence for s in self._streams.values() if s.sequence in failed and not s.started]
        # The reason may quote anything; it goes to the log, and to whoever runs the worker.
        self._end_all(StatorError(ErrorCode.ENGINE_DEAD, "the engine failed; its worker's log says why"), suspects)
        self._host.on_dead(reason)

    def _end_all(self, error: StatorError, suspects: Collection[LiveSequence] = ()) -> None:
        if self._ended is None:
            self._ended = error
        embedding = [] if self._embeddings is None else self._embeddings.cancel_all()
        for sink in (*self._compiling.cancel_all(), *embedding):
            end_sink(sink, StatorError(error.code, error.message))
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            self._drop(stream)
            code = ErrorCode.ENGINE_CRASHED if stream.sequence in suspects else error.code
            end_sink(stream.sink, StatorError(code, error.message))

    def _drop(self, stream: _Stream) -> None:
        """Free what the engine and a prefill engine hold for a stream that is no longer in `_streams`."""
        self._scheduler.abort(stream.sequence.request_id)
        if stream.fetch is not None:
            stream.fetch.cancel()
        self._release_at_peer(stream)

    def _describe(self, config: SchedulerConfig) -> EngineInfo:
        runner = self._runner
        pairing = {
            "block_size": str(runner.block_size),
            "kv_dtype": runner.kv_dtype,
            "model": runner.fingerprint,
            "engine": f"local {__version__}",
            "connector": CONNECTOR,
        }
        return EngineInfo(
            engine="local",
            version=__version__,
            model=self._args.name,
            block_size=runner.block_size,
            num_blocks=runner.num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            pairing=pairing,
            model_id=self._args.model,
            device="cpu",
            cannot=runner.cannot,
            can_embed=self._embeddings is not None,
        )
