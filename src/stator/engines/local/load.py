"""Makes the numpy runner that a local engine's settings ask for."""

import msgspec

from stator.config.hub import resolve, resolve_async
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.model_config import ModelConfig, load_model_config
from stator.engines.local.numpy_runner import NumpyRunner
from stator.errors import ConfigError

_KV_ITEM_BYTES = 4


def kv_block_bytes(config: ModelConfig, block_size: int) -> int:
    """Memory of one KV block: keys and values of every attention layer in float32."""
    num_heads = sum(layer.num_kv_heads for layer in config.layers)
    return 2 * num_heads * config.head_dim * block_size * _KV_ITEM_BYTES


async def with_local_model(args: LocalEngineArgs) -> LocalEngineArgs:
    """The model's directory in place of its id on the hub, downloaded if it has to be; the name stays.

    Apart from the runner's factory, since a thread that loads cannot be interrupted, and a download must be.
    """
    resolved = await resolve_async(args.model, args.revision)
    if not resolved.revision:
        return msgspec.structs.replace(args, revision=None)
    return msgspec.structs.replace(args, model=str(resolved.directory), revision=None, served_model_name=args.name)


def numpy_runner(args: LocalEngineArgs) -> NumpyRunner:
    """A RunnerFactory. Raises ConfigError for a model that cannot be loaded, or memory for less than one block."""
    path = resolve(args.model, args.revision).directory
    num_blocks = args.num_gpu_blocks_override
    if num_blocks is None:
        block_bytes = kv_block_bytes(load_model_config(path), args.block_size)
        num_blocks = args.kv_cache_memory_bytes // max(1, block_bytes)
        if num_blocks < 1:
            raise ConfigError(
                f"kv-cache-memory-bytes is {args.kv_cache_memory_bytes}; one KV block of {args.model} with block-size "
                f"{args.block_size} takes {block_bytes}"
            )
    return NumpyRunner(path, block_size=args.block_size, num_blocks=num_blocks)
