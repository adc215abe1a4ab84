"""A running vLLM: everything that touches its objects, in one file. Pinned to a version by engines.vllm.version.

vLLM is not typed for us and may not be installed: its objects are Any here, and nothing is imported before a start.
"""

import asyncio
import contextlib
import functools
import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from stator.engines.vllm import args as vllm_args
from stator.engines.vllm import further_node
from stator.engines.vllm.further_node import FurtherNode

logger = logging.getLogger(__name__)

KILL_EVERY_S = 0.5
"""How often, during a start that was given up, processes that vLLM has started meanwhile are looked for."""

KILLED_S = 5.0
"""For a process to be gone after SIGKILL."""

Record = Callable[[Any, Any, int], None]
"""(SchedulerStats or None, IterationStats or None, data-parallel rank): called after every engine step."""


class Launch(Protocol):
    """How vLLM comes up."""

    def has_gpu(self) -> bool:
        """May import and block."""
        ...

    async def start(self, arguments: list[str], record: Record) -> "StartedVllm":
        """arguments: of vLLM's command line. Raises ConfigError for those that it refuses."""
        ...

    async def start_further_node(self, arguments: list[str]) -> FurtherNode:
        """Of an engine over several nodes; arguments as for `start`."""
        ...


class ProcessLaunch:
    """vLLM as it is meant: this process has its front end, further ones its core and workers."""

    def has_gpu(self) -> bool:
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        return str(current_platform.device_type) == "cuda"

    async def start(self, arguments: list[str], record: Record) -> "StartedVllm":
        # Importing takes seconds, loading may take minutes; leases are renewed meanwhile on this loop.
        started_at = time.monotonic()
        llm = await _in_thread(build, arguments, record)
        logger.info("vLLM is up after %.1f s", time.monotonic() - started_at)
        return StartedVllm(llm)

    async def start_further_node(self, arguments: list[str]) -> FurtherNode:
        return FurtherNode(await _in_thread(further_node.build, arguments))


def build(arguments: list[str], record: Record) -> Any:
    """An AsyncLLM with its processes, in some seconds to minutes. Raises ConfigError for arguments it refuses."""
    from vllm.usage.usage_lib import UsageContext  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    from stator.engines.vllm import nemotron_nas

    nemotron_nas.register()
    parsed = vllm_args.parse(arguments)
    recorder = _stat_logger(record)
    llm = AsyncLLM.from_engine_args(parsed, usage_context=UsageContext.ENGINE_CONTEXT, stat_loggers=[recorder])
    # vLLM adds its Prometheus figures also where they are switched off; nobody reads them here, and they cost a step
    # as much as all of ours.
    manager = llm.logger_manager
    manager.stat_loggers = [each for each in manager.stat_loggers if "Prometheus" not in type(each).__name__]
    return llm


def _stat_logger(record_step: Record) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase  # pyright: ignore[reportMissingImports]

    class StepRecorder(StatLoggerBase):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._rank = engine_index

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
            **_later_fields: Any,
        ) -> None:
            record_step(scheduler_stats, iteration_stats, engine_idx)

        def log_engine_initialized(self) -> None:
            pass

    return StepRecorder


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """As asyncio.to_thread, but a cancelled wait waits on: what is half started must be there to be shut down. vLLM's
    processes are killed for it: they may be waiting for a peer that never comes."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            while not (await asyncio.wait([task], timeout=KILL_EVERY_S))[0]:
                for process in multiprocessing.active_children():
                    process.kill()
            llm = await task
            await asyncio.to_thread(llm.shutdown)
        raise


class StartedVllm:
    """num_blocks: that sequences may use, of each data-parallel rank (one block of vLLM's is never used)."""

    def __init__(self, llm: Any) -> None:
        self._llm: Any = llm
        self._splits: dict[str, tuple[int, int]] = {}
        self._stopping = False
        config = self.config = llm.vllm_config
        model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
        self.block_size: int = cache.block_size
        # vLLM's number is that of all data-parallel ranks together.
        self.num_blocks: int = (cache.num_gpu_blocks or 1) // config.parallel_config.data_parallel_size - 1
        self.max_num_seqs: int = scheduler.max_num_seqs
        self.max_num_batched_tokens: int = scheduler.max_num_batched_tokens
        self.max_model_len: int = model.max_model_len
        self.vocab_size: int = model.get_vocab_size()
        self.version = _version()
        self.device = _device(config)
        self.eos_token_ids = _eos_token_ids(model)
        self._watch_first_outputs()

    def on_dead(self, callback: Callable[[str], None]) -> None:
        """Once, on the loop, when the engine's core has ended without being asked to."""
        self._llm._run_output_handler()
        handler: asyncio.Task[None] = self._llm.output_handler

        def ended(_: asyncio.Task[None]) -> None:
            if not self._stopping:
                callback("its core process ended; vLLM's messages above have the cause")

        handler.add_done_callback(ended)

    async def add(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: dict[str, Any],
        *,
        on_output: Callable[[Any], None],
        on_added: Callable[[str], None],
        cache_salt: str | None,
        lora: tuple[str, int, str] | None,
        priority: int,
        dp_rank: int | None,
        pooling: bool = False,
    ) -> None:
        """sampling: of SamplingParams, or of PoolingParams if pooling. on_output: of RequestOutputs or
        PoolingRequestOutputs, or of the Exception that ends the request; from vLLM's own callback. on_added: with the
        id for `abort`, before the first of them."""
        from vllm import PoolingParams, SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
            StructuredOutputsParams,
        )

        structured = sampling.pop("structured_outputs", None)
        if structured is not None:
            sampling["structured_outputs"] = StructuredOutputsParams(**structured)
        prompt = TokensPrompt(prompt_token_ids=token_ids)
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        collector = await self._llm.add_request(
            request_id,
            prompt,
            PoolingParams(**sampling) if pooling else SamplingParams(output_kind=RequestOutputKind.DELTA, **sampling),
            lora_request=None if lora is None else LoRARequest(lora[0], lora[1], lora[2]),
            priority=priority,
            data_parallel_rank=dp_rank,
        )
        on_added(collector.request_id)
        collector.put = on_output
        try:
            early = collector.get_nowait()
        except Exception as error:
            early = error
        if early is not None:
            on_output(early)

    async def supported_tasks(self) -> frozenset[str]:
        """Kinds of pooling, embed among them, or generate."""
        return frozenset(await self._llm.get_supported_tasks())

    def has_dimensions(self, dimensions: int) -> bool:
        """Whether the model's embeddings may be cut to so many."""
        model = self.config.model_config
        if not model.is_matryoshka:
            return False
        known = model.matryoshka_dimensions
        return dimensions in known if known is not None else 1 <= dimensions <= model.embedding_size

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text to id."""
        added = getattr(self._llm.tokenizer, "added_tokens_decoder", {})
        return {token.content: token_id for token_id, token in added.items() if token.special}

    async def abort(self, core_id: str) -> None:
        """Unknown ids are ignored."""
        self._splits.pop(core_id, None)
        await self._llm.abort(core_id, internal=True)

    async def add_lora(self, lora: tuple[str, int, str]) -> None:
        """lora: name, number and path of a LoRARequest. Raises vLLM's error for one that it cannot load."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        await self._llm.add_lora(LoRARequest(*lora))

    async def remove_lora(self, lora: tuple[str, int, str]) -> None:
        """Not an error for one that vLLM has put out to make room for others."""
        await self._llm.remove_lora(lora[1])

    async def reset_prefix_cache(self) -> bool:
        return bool(await self._llm.reset_prefix_cache())

    async def call_workers(self, method: str, arguments: tuple[Any, ...]) -> Sequence[Any]:
        return await self._llm.collective_rpc(method, args=arguments)

    def core_pids(self) -> list[int]:
        return [process.pid for process in self._llm.engine_core.resources.engine_manager.processes]

    def was_killed(self) -> bool:
        """Whether somebody killed the core: SIGKILL, by hand or for want of memory. Any other end is its own (vLLM
        sends SIGTERM to what is left after one). A killed worker process of the core cannot be told from a failure."""
        manager = self._llm.engine_core.resources.engine_manager
        return any(process.exitcode == -signal.SIGKILL for process in getattr(manager, "processes", ()))

    def cached_split(self, output: Any, core_id: str | None) -> tuple[int, int]:
        """(tokens from the engine's own prefix cache, tokens from a peer) of the prompt that was just computed."""
        split = self._splits.pop(core_id or "", None)
        return split if split is not None else (output.num_cached_tokens or 0, 0)

    async def shut_down(self, timeout_s: float) -> None:
        self._stopping = True
        llm, self._llm = self._llm, None
        if llm.output_handler is not None:
            # Before the core ends, or it would be told of a death.
            llm.output_handler.cancel()
            await asyncio.gather(llm.output_handler, return_exceptions=True)
        await asyncio.to_thread(_shut_down, llm, timeout_s)
        # Its __del__ shuts down again, at the interpreter's end with half of vLLM's modules gone.
        llm.shutdown = _nothing

    def _watch_first_outputs(self) -> None:
        """RequestOutput has one number for what was cached, here and at a peer; the core's own outputs have both."""
        process: Callable[..., Any] = self._llm.output_processor.process_outputs
        splits = self._splits

        def process_outputs(outputs: Any, *arguments: Any, **keywords: Any) -> Any:
            for output in outputs:
                stats = output.prefill_stats
                if stats is not None:
                    splits[output.request_id] = (stats.num_local_cached_tokens, stats.num_external_cached_tokens)
            return process(outputs, *arguments, **keywords)

        self._llm.output_processor.process_outputs = process_outputs


def _shut_down(llm: Any, timeout_s: float) -> None:
    """vLLM kills a core that did not end in time, and does not wait for it."""
    processes = list(getattr(llm.engine_core.resources.engine_manager, "processes", ()))
    llm.shutdown(timeout_s)
    for process in processes:
        process.join(KILLED_S)


def _nothing(*_: object) -> None:
    pass


def _version() -> str:
    import vllm  # pyright: ignore[reportMissingImports]

    return str(vllm.__version__).split("+")[0]


def _device(config: Any) -> str:
    """As step_time.toml names devices: `8 x NVIDIA H100 80GB HBM3`, or cpu."""
    kind = str(config.device_config.device_type)
    if kind != "cuda":
        return kind
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    count = config.parallel_config.world_size
    name = str(current_platform.get_device_name())
    return name if count == 1 else f"{count} x {name}"


def _eos_token_ids(model: Any) -> frozenset[int]:
    found: set[int] = set()
    generation = model.try_get_generation_config() if hasattr(model, "try_get_generation_config") else {}
    for value in (generation.get("eos_token_id"), getattr(model.hf_text_config, "eos_token_id", None)):
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)


launch = ProcessLaunch()
