"""The sim engine: the local engine's scheduler and blocks, steps that take the time of other hardware, and no model.

Everything on the engine's event loop: no thread, and no time but the loop's, so that it runs on a virtual clock too,
equally for an equal seed.
"""

import logging
import random

import msgspec

from stator.config.hub import Needs, resolve_async
from stator.config.models import resolve_model
from stator.config.step_times import SIM_ENGINE, simulated_device
from stator.core.scheduler import SchedulerConfig
from stator.engines.base import EngineHost
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.engine import LocalEngine, RunnerFactory
from stator.engines.lora import not_enabled, on_node, read_adapter
from stator.engines.sim.args import SimEngineArgs
from stator.engines.sim.executor import SimExecutor
from stator.engines.sim.faults import StepFaults
from stator.engines.sim.runner import SimRunner
from stator.engines.sim.vocabulary import load_vocabulary
from stator.errors import ConfigError, StatorError
from stator.messages.engine import EngineInfo, EngineRequest
from stator.messages.lora import LoraAdapter

logger = logging.getLogger(__name__)


class SimEngine(LocalEngine):
    """faults: what a test does to its steps. executor: knows the time that steps took."""

    def __init__(
        self, args: SimEngineArgs, *, rng: random.Random | None = None, runner_factory: RunnerFactory | None = None
    ) -> None:
        """runner_factory: what is sampled; by default plain words of the model's tokenizer."""
        self.faults = StepFaults()
        self._simulated = args.simulated
        self._speed = args.sim_speed
        self._max_lora_rank = args.max_lora_rank if args.enable_lora or args.lora_modules else 0
        self._lora_modules = args.lora_modules
        self.executor = SimExecutor(self._simulated, speed=self._speed, faults=self.faults)
        super().__init__(
            args,
            runner_factory=runner_factory or sim_runner,
            prepare=None if runner_factory is not None else with_local_tokenizer,
            executor_factory=lambda: self.executor,
            rng=rng,
        )

    async def start(self, host: EngineHost) -> EngineInfo:
        info = await super().start(host)
        try:
            for name, path in self._lora_modules.items():
                await self.load_adapter(name, on_node(path))
        except StatorError as error:
            await self.stop()
            raise ConfigError(f"lora-modules: {error.message}") from None
        logger.info(
            "simulating %s at speed %g: %d KV blocks of %d tokens; constants: %s; KV: %s",
            self._simulated.name, self._speed, info.num_blocks, info.block_size,
            self._simulated.row.source, self._simulated.kv.source,
        )  # fmt: skip
        return info

    async def load_adapter(self, name: str, path: str) -> LoraAdapter:
        if not self._max_lora_rank:
            raise not_enabled()
        adapter = read_adapter(name, path, max_rank=self._max_lora_rank, needs_weights=False)
        self.adapters[name] = adapter
        return adapter

    async def unload_adapter(self, name: str) -> None:
        self.adapters.pop(name, None)

    def _weights_of(self, request: EngineRequest) -> bytes:
        adapter = None if request.lora_name is None else self.adapters.get(request.lora_name)
        return b"" if adapter is None else adapter.digest.encode()

    async def stop(self) -> None:
        """At once, also in a step that takes long or hangs: as the end of a process."""
        self.faults.release()
        self.executor.hurry()
        await super().stop()

    def _describe(self, config: SchedulerConfig) -> EngineInfo:
        info = super()._describe(config)
        return msgspec.structs.replace(
            info,
            engine=SIM_ENGINE,
            device=simulated_device(self._simulated.name, self._speed),
            pairing={
                **info.pairing,
                "engine": f"{SIM_ENGINE} {info.version}",
                # The same model on unlike GPUs pairs, another model or KV dtype does not.
                "kv_dtype": f"{self._simulated.kv.bytes_per_token} simulated bytes a token",
            },
        )


async def with_local_tokenizer(args: LocalEngineArgs) -> LocalEngineArgs:
    """The model's directory in place of its id on the hub. Downloads tokenizer and config if need be; no weights."""
    assert isinstance(args, SimEngineArgs)
    resolved = await resolve_async(args.model, args.revision, needs=Needs.TOKENIZER)
    return msgspec.structs.replace(
        args,
        model=str(resolved.directory),
        revision=None,
        served_model_name=args.name,
        step_times=args.simulated.name,
    )


def sim_runner(args: LocalEngineArgs) -> SimRunner:
    """A RunnerFactory, for SimEngineArgs whose model is a directory. Raises ConfigError for one without a usable
    tokenizer, or whose output cannot end as is asked."""
    assert isinstance(args, SimEngineArgs)
    directory = resolve_model(args.model)
    vocabulary = load_vocabulary(directory)
    if args.sim_mean_output_tokens is not None and not vocabulary.eos_token_ids:
        raise ConfigError(
            f"sim-mean-output-tokens is {args.sim_mean_output_tokens:g}, but {directory} names no eos_token_id in "
            f"generation_config.json or config.json, so no output can end by itself; leave it out"
        )
    return SimRunner(
        vocabulary,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        # Another model's tokenizer may be used: its context is not that of what is simulated.
        max_model_len=max(args.max_model_len or 0, vocabulary.max_model_len),
        mean_output_tokens=args.sim_mean_output_tokens,
    )
