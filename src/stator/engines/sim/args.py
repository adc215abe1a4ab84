"""Settings of the sim engine: those of the local engine, what is simulated, and how output ends."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from stator.config.step_times import NamedRow, shipped_step_times
from stator.engines.local.args import LocalEngineArgs, read_section
from stator.engines.lora import DEFAULT_MAX_RANK
from stator.errors import ConfigError


class SimEngineArgs(LocalEngineArgs, frozen=True, kw_only=True):
    """model: only its tokenizer and config are read. kv_cache_memory_bytes: of the simulated model's KV; counts only if
    the section has it. num_gpu_blocks_override: None for what the simulated GPUs hold.

    step_times: what is simulated, a name of `config/step_times.toml`; None for the first that fits the model.
    sim_speed: simulated seconds a second. sim_mean_output_tokens: outputs end by themselves after so many tokens in the
    mean, their lengths spread geometrically; None: at max_tokens only.

    enable_lora, max_lora_rank, lora_modules (names and directories): adapters, of which only adapter_config.json must
    be there; each has a text of its own.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    step_times: str | None = None
    sim_speed: float = 1.0
    sim_mean_output_tokens: float | None = None
    enable_lora: bool = False
    max_lora_rank: int = DEFAULT_MAX_RANK
    lora_modules: dict[str, str] = {}

    @property
    def simulated(self) -> NamedRow:
        """Raises ConfigError for an unknown name, or a model without step times."""
        return shipped_step_times().to_simulate(self.step_times, self.model)

    @property
    def num_blocks(self) -> int:
        """KV blocks; at least one."""
        if self.num_gpu_blocks_override is not None:
            return self.num_gpu_blocks_override
        return max(1, self.simulated.kv.num_tokens // self.block_size)

    def check(self) -> None:
        super().check()
        if not 0 < self.sim_speed < math.inf:
            raise ConfigError(f"sim-speed is {self.sim_speed}; it must be above 0 (2 is twice as fast as the hardware)")
        mean = self.sim_mean_output_tokens
        if mean is not None and not 1 <= mean < math.inf:
            raise ConfigError(f"sim-mean-output-tokens is {mean}; it must be at least 1")
        _ = self.simulated


def args_from_section(values: Mapping[str, Any]) -> SimEngineArgs:
    """The engine keys of a worker's section, spelled with dashes or underscores.

    Raises ConfigError for an unknown key, a missing model, a value of a wrong type or range, or unknown step times.
    """
    args = read_section(values, SimEngineArgs, "sim")
    has_bytes = any(key.replace("-", "_") == "kv_cache_memory_bytes" for key in values)
    if has_bytes and args.num_gpu_blocks_override is None:
        block_bytes = args.simulated.kv.bytes_per_token * args.block_size
        num_blocks = args.kv_cache_memory_bytes // block_bytes
        if num_blocks < 1:
            raise ConfigError(
                f"kv-cache-memory-bytes is {args.kv_cache_memory_bytes}; one KV block of {args.simulated.name} with "
                f"block-size {args.block_size} takes {block_bytes}"
            )
        return msgspec.structs.replace(args, num_gpu_blocks_override=num_blocks)
    return args
