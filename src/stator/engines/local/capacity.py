"""What a local engine's sequences may have, of what its settings ask for and its runner has."""

import logging

from stator.core.scheduler import SchedulerConfig
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.runner import Runner
from stator.errors import ConfigError

logger = logging.getLogger(__name__)


def scheduler_config(args: LocalEngineArgs, runner: Runner) -> SchedulerConfig:
    """Raises ConfigError for a context that the model or its KV blocks do not have."""
    capacity = runner.num_blocks * runner.block_size
    max_model_len = args.max_model_len
    if max_model_len is None:
        max_model_len = min(runner.max_model_len, capacity)
        if capacity < runner.max_model_len:
            logger.warning(
                "max-model-len is %d: the model has %d, but %d KV blocks of %d tokens hold no more",
                capacity,
                runner.max_model_len,
                runner.num_blocks,
                runner.block_size,
            )
    elif max_model_len > runner.max_model_len:
        raise ConfigError(f"max-model-len is {max_model_len}; the model has at most {runner.max_model_len}")
    elif max_model_len > capacity:
        raise ConfigError(
            f"max-model-len is {max_model_len}, but {runner.num_blocks} KV blocks of {runner.block_size} tokens hold "
            f"{capacity}; lower it, or raise kv-cache-memory-bytes or num-gpu-blocks-override"
        )
    return SchedulerConfig(
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=max_model_len,
        vocab_size=runner.vocab_size,
        eos_token_ids=runner.eos_token_ids,
    )
