"""The adapter: vLLM's `AsyncLLM` behind engines.base.Engine.

vLLM's scheduler and workers live in processes of their own; here are requests, their sinks, and what the router is
told. Of vLLM only `AsyncLLM.add_request` and `abort`, `AsyncEngineArgs`, `SamplingParams`, `TokensPrompt` and the
statistics of each step are used, and three seams that the contract suite holds in place: a request's collector is
given another `put`, so that a step's tokens go to the sinks within vLLM's own callback instead of waking a task each;
the split of cached tokens is read off the engine core's outputs; and the end of the output handler tells of a death.
"""

import asyncio
import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stator.core.first_use import FirstUses, uses_of
from stator.core.hashing import block_hashes
from stator.core.public_text import harmless
from stator.core.sequence_limits import resumed_finish
from stator.engines.base import EngineHost, KvListener, NodePlace
from stator.engines.grammar_gate import GrammarGate
from stator.engines.sinks import end_sink, push_last
from stator.engines.vllm import args as vllm_args
from stator.engines.vllm import transfer as handover
from stator.engines.vllm.adapters import Told, VllmAdapters
from stator.engines.vllm.args import VllmSettings
from stator.engines.vllm.endings import StepRoom, in_last_step, is_death, is_refusal, no_ending
from stator.engines.vllm.further_node import FurtherNode
from stator.engines.vllm.holds import Holds
from stator.engines.vllm.kv_feed import KvEventFeed
from stator.engines.vllm.load import LoadCounter
from stator.engines.vllm.pairing import engine_pairing
from stator.engines.vllm.preparation import Preparation, prepare
from stator.engines.vllm.refusals import embedding_refusal, generation_refusal
from stator.engines.vllm.sampling import CANNOT_RESUME, prefill_arguments, sampling_arguments
from stator.engines.vllm.scores import with_scores
from stator.engines.vllm.started import Launch, StartedVllm, launch
from stator.engines.vllm.transfer import VllmTransfer
from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.messages.embeddings import Embedding, EmbedRequest
from stator.messages.engine import (
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    PrefillResult,
    SamplingParams,
    TokenDelta,
)
from stator.messages.lora import LoraAdapter
from stator.messages.tokens import BYTES_PER_TOKEN, num_tokens, unpack
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Sink

logger = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
MAX_TOLD_CHARS = 1000

_FINISHED = {"stop": FinishReason.STOP, "repetition": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(slots=True, eq=False)
class _Stream:
    """A request in the engine. core_id: under which vLLM knows it, once it does. transfer: set until its blocks at the
    prefill engine are needed no more. transfer_id: of a prefill, under which its blocks will be held. scored: its
    deltas carry probabilities. pooling: parameters of a request for an embedding, which is none for text."""

    request: EngineRequest
    sink: Sink
    core_id: str | None = None
    transfer: VllmTransfer | None = None
    transfer_id: TransferId | None = None
    scored: bool = False
    pooling: dict[str, Any] | None = None
    started: bool = False
    ended: bool = False


class VllmEngine:
    """Implements engines.base.Engine; all methods are for the event loop on which `start` was called."""

    def __init__(self, settings: VllmSettings, *, hold_s: float = 30.0, launcher: Launch = launch) -> None:
        """hold_s: for how long a finished prefill's blocks wait. launcher: starts vLLM; tests start it another way."""
        self._settings = settings
        self._hold_s = hold_s
        self._launcher = launcher
        self.num_nodes = settings.num_nodes
        self.master_port = settings.master_port
        self.place: NodePlace | None = None
        self._further_node: FurtherNode | None = None
        self._streams: dict[RequestId, _Stream] = {}
        self._ended: StatorError | None = StatorError(ErrorCode.ENGINE_DEAD, "the engine has not been started")
        self._llm: StartedVllm | None = None
        self._feed: KvEventFeed | None = None
        self._stop_lock = asyncio.Lock()
        self._counter = LoadCounter(0)
        self._first_uses = FirstUses()
        self._holds = Holds(hold_s, self._counter, lambda: self.load().num_blocks_held)
        self._eos: frozenset[int] = frozenset()
        self._supported: frozenset[str] = frozenset()
        self._suspects: frozenset[_Stream] | None = None
        self._loras = VllmAdapters(settings)
        self._gate: GrammarGate | None = None

    async def start(self, host: EngineHost) -> EngineInfo:
        await asyncio.to_thread(self._loras.read_modules)
        await self._begin(host)
        try:
            prepared = await self._prepare(host)
            llm = self._llm = await self._launcher.start(prepared.command_line, self._counter.record)
            self._counter.num_blocks = llm.num_blocks
            self._eos = llm.eos_token_ids
            self._supported = await llm.supported_tasks()
            if prepared.kv_endpoints:
                self._feed = KvEventFeed(self._settings.name, llm.block_size, prepared.kv_endpoints)
                await self._feed.start()
            # Reads samples of the weights.
            pairing = await asyncio.to_thread(engine_pairing, llm.config, self._plan.name, engine_version=llm.version)
        except BaseException:
            await self._clean_up()
            raise
        self._ended = None
        llm.on_dead(self._die)
        return self._info(llm, pairing)

    def shared_settings(self) -> dict[str, str]:
        return vllm_args.shared_settings(self._settings)

    async def start_further_node(self, host: EngineHost) -> None:
        await self._begin(host)
        try:
            node = await self._launcher.start_further_node((await self._prepare(host)).command_line)
        except BaseException:
            await self._clean_up()
            raise
        self._further_node = node
        node.on_dead(host.on_dead)

    async def _begin(self, host: EngineHost) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._tasks = TaskOwner("vLLM engine")
        # Short, for the sockets in it: their paths have 107 bytes at most.
        self._directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="stator-vllm-"))

    async def _prepare(self, host: EngineHost) -> Preparation:
        prepared = await prepare(
            self._settings,
            host,
            place=self.place,
            gpu=await asyncio.to_thread(self._launcher.has_gpu),
            directory=self._directory,
            hold_s=self._hold_s,
        )
        self._plan, self._gate = prepared.plan, prepared.gate
        return prepared

    def _info(self, llm: StartedVllm, pairing: dict[str, str]) -> EngineInfo:
        return EngineInfo(
            engine="vllm",
            version=llm.version,
            model=self._settings.name,
            block_size=llm.block_size,
            num_blocks=llm.num_blocks * self._settings.dp_ranks,
            max_num_seqs=llm.max_num_seqs * self._settings.dp_ranks,
            max_num_batched_tokens=llm.max_num_batched_tokens,
            max_model_len=llm.max_model_len,
            pairing=pairing,
            cannot_resume=CANNOT_RESUME,
            model_id=self._settings.model,
            device=llm.device,
            steps_while_waiting=True,
            can_embed="embed" in self._supported,
        )

    # Requests

    def generate(self, request: EngineRequest, sink: Sink) -> None:
        if (error := self._refusal(request)) is not None:
            asyncio.get_running_loop().call_soon(end_sink, sink, error)
            return
        reason = resumed_finish(request, self._eos)
        if reason is not None:
            self._loop.call_soon(push_last, sink, TokenDelta([], reason, 0))
            return
        sampling = request.sampling
        stream = _Stream(
            request,
            sink,
            transfer=self._usable_transfer(request),
            scored=sampling.logprobs is not None or sampling.prompt_logprobs is not None,
        )
        self._begin_stream(stream, uses_of(request))

    def prefill(self, request: EngineRequest, sink: Sink) -> None:
        if (error := self._refusal(request)) is not None:
            asyncio.get_running_loop().call_soon(end_sink, sink, error)
            return
        stream = _Stream(request, sink, transfer_id=TransferId(f"{self._host.instance_id}.{secrets.token_hex(12)}"))
        self._begin_stream(stream, frozenset({"prefill"}))

    def embed(self, request: EmbedRequest, sink: Sink) -> None:
        if (error := self._embedding_refusal(request)) is not None:
            asyncio.get_running_loop().call_soon(end_sink, sink, error)
            return
        pooling = {"task": "embed", "dimensions": request.dimensions}
        given = EngineRequest(
            request.request_id,
            request.prompt_ids,
            SamplingParams(max_tokens=1),
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        self._begin_stream(_Stream(given, sink, pooling=pooling), frozenset({"embed"}))

    def _begin_stream(self, stream: _Stream, uses: frozenset[str]) -> None:
        request_id = stream.request.request_id
        self._streams[request_id] = stream
        self._first_uses.begin(request_id, uses)
        self._tasks.spawn(self._submit(stream), f"submit {request_id}")

    def abort(self, request_id: RequestId) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        self._drop(stream)
        # Not from inside the caller's call, which may be in the midst of a change of its own.
        error = StatorError(ErrorCode.CANCELLED, "the request was cancelled")
        self._loop.call_soon(end_sink, stream.sink, error)

    def release(self, transfer_id: TransferId) -> None:
        handed = self._holds.take(transfer_id)
        if handed is not None and self._ended is None:
            self._tasks.spawn(self._release_own(handed), f"release {transfer_id}")

    async def holds_ended(self) -> None:
        await self._holds.ended()

    def load(self) -> EngineLoad:
        return self._counter.load(len(self._streams), self._first_uses.num_open)

    def cached_prefix_tokens(self, request: EngineRequest) -> int:
        cached, _ = self._cached(request)
        return cached

    def watch_kv(self, listener: KvListener) -> Callable[[], None]:
        if self._feed is None:
            listener([])
            return lambda: None
        return self._feed.watch(listener)

    def core_pids(self) -> list[int]:
        """Of vLLM's processes that this one started."""
        return [] if self._llm is None else self._llm.core_pids()

    async def kv_events_settled(self) -> None:
        """Until what vLLM has published so far is applied; for tests and shut-downs, since it asks vLLM."""
        if self._feed is not None:
            await self._feed.sync()

    async def reset_prefix_cache(self) -> bool:
        llm, feed = self._llm, self._feed
        if llm is None or self._ended is not None:
            return False
        mark = feed.clear_mark() if feed is not None else None
        done = await llm.reset_prefix_cache()
        if done and feed is not None:
            feed.clear(mark)
        return done

    @property
    def adapters(self) -> Mapping[str, LoraAdapter]:
        return self._loras.loaded

    async def load_adapter(self, name: str, path: str) -> LoraAdapter:
        llm = self._llm
        if llm is None or self._ended is not None:
            raise StatorError(ErrorCode.ENGINE_DEAD, "the engine does not run")
        adapter = await asyncio.to_thread(self._loras.read, name, path)
        told = self._loras.next_told(adapter)
        # vLLM makes no step while it reads the weights, from a disk that may be slow.
        loading = f"adapter {name}"
        self._first_uses.begin(loading, frozenset({loading}))
        try:
            await llm.add_lora(told)
        except Exception as error:
            if is_death(error):
                raise StatorError(ErrorCode.ENGINE_DEAD, "the engine's core process ended") from error
            message = f"vLLM cannot load the adapter at {path}: {str(error)[:MAX_TOLD_CHARS]}"
            raise StatorError(ErrorCode.INVALID_REQUEST, message) from error
        finally:
            self._first_uses.end(loading)
        self._loras.add(adapter, told)
        return adapter

    async def unload_adapter(self, name: str) -> None:
        told, llm = self._loras.remove(name), self._llm
        if told is not None and llm is not None and self._ended is None:
            await llm.remove_lora(told)

    async def stop(self) -> None:
        async with self._stop_lock:
            if self._llm is None and self._further_node is None:
                return
            self._end_all(StatorError(ErrorCode.ENGINE_DEAD, "the engine was stopped"))
            await self._clean_up()

    async def _clean_up(self) -> None:
        await self._tasks.close()
        llm, self._llm = self._llm, None
        if llm is not None:
            await llm.shut_down(SHUTDOWN_S)
            self._counter.ranks.clear()
        node, self._further_node = self._further_node, None
        if node is not None:
            await node.shut_down()
        gate, self._gate = self._gate, None
        if gate is not None:
            await gate.close()
        if self._feed is not None:
            await self._feed.close()
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    # From a request to vLLM

    async def _submit(self, stream: _Stream) -> None:
        """Hand the request over. Its stream may end meanwhile; vLLM is then told to abort it."""
        llm = self._llm
        assert llm is not None
        try:
            arguments = await self._arguments(stream)
            if stream.ended:
                return
            await llm.add(
                stream.request.request_id,
                unpack(stream.request.prompt_ids) + unpack(stream.request.resume_ids),
                arguments,
                on_output=lambda output: self._on_output(stream, output),
                on_added=lambda core_id: setattr(stream, "core_id", core_id),
                cache_salt=stream.request.cache_salt,
                lora=self._lora(stream.request),
                priority=stream.request.priority,
                dp_rank=self._cached(stream.request)[1] if self._settings.dp_ranks > 1 else None,
                pooling=stream.pooling is not None,
            )
        except StatorError as error:
            self._fail(stream, error)
        except Exception as error:
            self._fail(stream, self._as_error(error, stream))
        if stream.ended and stream.core_id is not None:
            await llm.abort(stream.core_id)

    async def _arguments(self, stream: _Stream) -> dict[str, Any]:
        if stream.pooling is not None:
            return stream.pooling
        if stream.transfer_id is not None:
            return prefill_arguments(handover.prefill_params(self._plan.name, stream.transfer_id))
        llm, grammar = self._llm, stream.request.sampling.grammar
        if grammar is not None and self._gate is not None:
            # vLLM compiles in this process too, to see whether it can: with llguidance, what xgrammar does not take.
            await self._gate.check(grammar)
        special_tokens = {} if llm is None or grammar is None else llm.special_tokens
        arguments = sampling_arguments(stream.request, special_tokens)
        if stream.transfer is not None:
            params = dict(stream.transfer.params)
            if await handover.peer_alive(params):
                arguments["extra_args"] = {"kv_transfer_params": params}
            else:
                self._no_transfer(stream.request, "the prefill engine cannot be reached")
                stream.transfer = None
        return arguments

    def _usable_transfer(self, request: EngineRequest) -> VllmTransfer | None:
        if request.transfer is None:
            return None
        try:
            return handover.parse_transfer(request, connector=self._plan.name)
        except ValueError as error:
            self._no_transfer(request, str(error))
            return None

    def _no_transfer(self, request: EngineRequest, reason: str) -> None:
        logger.warning(
            "request %s: no KV blocks from the prefill engine (%s); computing here", request.request_id, reason
        )

    def _lora(self, request: EngineRequest) -> Told | None:
        return None if request.lora_name is None else self._loras.told(request.lora_name)

    def _cached(self, request: EngineRequest) -> tuple[int, int | None]:
        """(tokens not to be computed, the data-parallel rank that has them; None if any will do)."""
        llm, feed = self._llm, self._feed
        if llm is None or feed is None:
            return 0, None
        tokens = request.prompt_ids + request.resume_ids
        chain = block_hashes(
            tokens,
            llm.block_size,
            model=self._settings.name,
            lora_name=request.lora_name,
            cache_salt=request.cache_salt,
        )
        blocks, rank = feed.longest_prefix(chain)
        # vLLM looks up one token less than there are, since it needs the last one's logits.
        usable = min(blocks, (len(tokens) // BYTES_PER_TOKEN - 1) // llm.block_size)
        return usable * llm.block_size, rank if usable else None

    def _not_ready(self, request_id: RequestId) -> StatorError | None:
        if self._ended is not None:
            return StatorError(self._ended.code, self._ended.message)
        if request_id in self._streams:
            message = f"request {request_id} is already running on this engine; use another request id"
            return StatorError(ErrorCode.INVALID_REQUEST, message, param="request_id")
        return None

    def _embedding_refusal(self, request: EmbedRequest) -> StatorError | None:
        if (error := self._not_ready(request.request_id)) is not None:
            return error
        assert self._llm is not None
        return embedding_refusal(request, self._llm, supported=self._supported)

    def _refusal(self, request: EngineRequest) -> StatorError | None:
        if (error := self._not_ready(request.request_id)) is not None:
            return error
        assert self._llm is not None
        return generation_refusal(request, self._llm, supported=self._supported, adapters=self._loras.loaded)

    # From vLLM to the sinks: runs for every sequence and step

    def _on_output(self, stream: _Stream, output: Any) -> None:
        if stream.ended:
            return
        if isinstance(output, Exception):
            self._fail(stream, self._as_error(output, stream))
            return
        if stream.pooling is not None:
            self._embedded(stream, output)
            return
        completion = output.outputs[0]
        reason = completion.finish_reason
        if reason is not None and reason not in _FINISHED:
            self._fail(stream, no_ending(reason, fetching=stream.transfer is not None))
            return
        if stream.transfer_id is not None:
            if reason is not None:
                self._prefilled(stream, stream.transfer_id, output)
            return
        finish = _FINISHED[reason] if reason is not None else None
        first = not stream.started
        if first:
            stream.started = True
            self._first_uses.made(stream.request.request_id)
            delta = self._first_delta(stream, output, completion, finish)
        else:
            delta = TokenDelta(list(completion.token_ids), finish)
        if stream.scored:
            delta = with_scores(delta, stream.request, output, first=first)
        if finish is None:
            self._push(stream, delta)
            return
        self._forget(stream)
        push_last(stream.sink, delta)

    def _embedded(self, stream: _Stream, output: Any) -> None:
        if output.error is not None:
            self._fail(stream, StatorError(ErrorCode.INTERNAL, "vLLM failed to make this embedding; its log says why"))
            return
        self._first_uses.made(stream.request.request_id)
        self._forget(stream)
        vector = output.outputs.data.float().cpu().numpy().astype("<f4").tobytes()
        push_last(stream.sink, Embedding(vector, num_tokens(stream.request.prompt_ids)))

    def _first_delta(self, stream: _Stream, output: Any, completion: Any, finish: FinishReason | None) -> TokenDelta:
        assert self._llm is not None
        local, external = self._llm.cached_split(output, stream.core_id)
        peer_cached = 0
        if stream.transfer is not None and external:
            peer_cached = min(stream.transfer.num_cached_tokens, local + external)
        num_cached = min(num_tokens(stream.request.prompt_ids), max(local, peer_cached))
        return TokenDelta(list(completion.token_ids), finish, num_cached, external)

    def _prefilled(self, stream: _Stream, transfer_id: TransferId, output: Any) -> None:
        assert self._llm is not None
        request = stream.request
        self._first_uses.made(request.request_id)
        self._forget(stream)
        num_cached = sum(self._llm.cached_split(output, stream.core_id))
        try:
            handed = handover.result_transfer(
                output.kv_transfer_params,
                connector=self._plan.name,
                transfer_id=transfer_id,
                request=request,
                num_cached_tokens=num_cached,
            )
        except ValueError as error:
            end_sink(stream.sink, StatorError(ErrorCode.TRANSFER_FAILED, str(error)))
            return
        self._holds.keep(transfer_id, handed, self._loop.time())
        num_prompt = num_tokens(request.prompt_ids)
        push_last(stream.sink, PrefillResult(handed, num_prompt, min(num_cached, num_prompt)))

    def _push(self, stream: _Stream, delta: TokenDelta) -> None:
        try:
            stream.sink.items([delta])
        except Exception:
            logger.exception("the sink of request %s failed; aborting it", stream.request.request_id)
            self.abort(stream.request.request_id)

    async def _release_own(self, handed: dict[str, Any]) -> None:
        llm = self._llm
        if llm is not None:
            await handover.release(self._host.client, handed, call_workers=llm.call_workers)

    # Ends

    def _forget(self, stream: _Stream) -> None:
        stream.ended = True
        if self._streams.get(stream.request.request_id) is stream:
            del self._streams[stream.request.request_id]
            self._first_uses.end(stream.request.request_id)

    def _drop(self, stream: _Stream) -> None:
        """Forget it, here and in vLLM. One that vLLM does not have yet is aborted by `_submit`."""
        self._forget(stream)
        if stream.core_id is not None and self._llm is not None:
            self._tasks.spawn(self._llm.abort(stream.core_id), f"abort {stream.request.request_id}")
        elif stream.transfer is not None:
            # vLLM never heard of it, so nobody else will tell the prefill engine.
            handed = stream.request.transfer or {}
            self._tasks.spawn(handover.release(self._host.client, handed), f"release {stream.transfer.transfer_id}")

    def _fail(self, stream: _Stream, error: StatorError) -> None:
        if not stream.ended:
            self._forget(stream)
            end_sink(stream.sink, error)

    def _as_error(self, error: Exception, stream: _Stream) -> StatorError:
        if is_refusal(error) and stream.request.sampling.grammar is not None:
            message = f"the form of the answer that was asked for cannot be used: {harmless(str(error))}"
            return StatorError(ErrorCode.INVALID_REQUEST, message, param="grammar")
        if not is_death(error):
            # Its text may quote anything, of the machine or of the request.
            logger.error("vLLM failed in request %s", stream.request.request_id, exc_info=error)
            return StatorError(ErrorCode.INTERNAL, "vLLM failed in this request; its worker's log says why")
        suspect = stream in self._suspects_of_death()
        code = ErrorCode.ENGINE_CRASHED if suspect else ErrorCode.ENGINE_DEAD
        return StatorError(code, "the engine's core process ended")

    def _suspects_of_death(self) -> frozenset[_Stream]:
        """Asked at the first sign of the core's death, before streams are forgotten; the same afterwards."""
        if self._suspects is None:
            llm, ranks = self._llm, self._settings.dp_ranks
            if llm is None or llm.was_killed():
                self._suspects = frozenset()
            else:
                room = StepRoom(llm.max_num_seqs * ranks, llm.max_num_batched_tokens * ranks)
                self._suspects = in_last_step(self._streams.values(), room, self._to_compute)
        return self._suspects

    def _to_compute(self, stream: _Stream) -> int:
        request = stream.request
        return num_tokens(request.prompt_ids) + num_tokens(request.resume_ids) - self.cached_prefix_tokens(request)

    def _die(self, reason: str) -> None:
        if self._ended is None:
            self._suspects_of_death()
            self._end_all(StatorError(ErrorCode.ENGINE_DEAD, "the engine failed; its worker's log says why"))
            self._host.on_dead(reason)

    def _end_all(self, error: StatorError) -> None:
        if self._ended is None:
            self._ended = error
        self._holds.clear()
        suspects = self._suspects or ()
        for stream in list(self._streams.values()):
            code = ErrorCode.ENGINE_CRASHED if stream in suspects else error.code
            self._fail(stream, StatorError(code, error.message))
