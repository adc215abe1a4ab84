"""Settings of the local engine: vLLM's flag names, as far as they mean something here."""

import difflib
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from stator.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_KV_CACHE_MEMORY_BYTES = 256 * 1024 * 1024

WITHOUT_MEANING_HERE = frozenset(
    {
        "data_parallel_size",
        "disable_log_requests",
        "disable_log_stats",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_dtype",
        "kv_transfer_config",
        "lora_modules",
        "load_format",
        "max_seq_len_to_capture",
        "nnodes",
        "node_rank",
        "pipeline_parallel_size",
        "quantization",
        "swap_space",
        "tensor_parallel_size",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "trust_remote_code",
    }
)
"""vLLM flags that a file shared with vLLM workers may hold; the local engine accepts and ignores them."""


class LocalEngineArgs(msgspec.Struct, frozen=True, kw_only=True):
    """model: a Hugging Face directory, its id on the hub, or `stator:NAME`. revision: branch, tag or commit on the hub.
    served_model_name: what clients ask for; default `model`.

    block_size: tokens per KV block. max_num_seqs: sequences computed at once. max_num_batched_tokens: tokens per step.
    max_model_len: prompt and output tokens; None for the model's, or what the KV blocks hold if that is less.
    num_gpu_blocks_override: number of KV blocks; None for as many as kv_cache_memory_bytes hold.
    seed: of the seeds drawn for requests without one; None for an unpredictable one.
    transfer_hold_s / transfer_timeout_s: how long a finished prefill waits to be fetched, and a fetch may take.
    """

    model: str
    revision: str | None = None
    served_model_name: str | None = None
    block_size: int = 64
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int = DEFAULT_KV_CACHE_MEMORY_BYTES
    enable_prefix_caching: bool = True
    dtype: str = "auto"
    seed: int | None = None
    transfer_hold_s: float = 30.0
    transfer_timeout_s: float = 20.0

    @property
    def name(self) -> str:
        """The model's name to clients, and in block hashes."""
        return self.served_model_name or self.model

    def check(self) -> None:
        """Raises ConfigError for values that cannot work, naming the flag, the value and what is expected."""
        positive = ("block_size", "max_num_seqs", "max_model_len", "num_gpu_blocks_override", "kv_cache_memory_bytes")
        for field in (*positive, "transfer_hold_s", "transfer_timeout_s"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ConfigError(f"{_flag(field)} is {value}; it must be above 0")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max-num-batched-tokens is {self.max_num_batched_tokens}; it must be at least max-num-seqs "
                f"({self.max_num_seqs}), since every running sequence needs one token a step"
            )
        if self.dtype not in ("auto", "float32"):
            raise ConfigError(f"dtype is {self.dtype!r}; the local engine computes in float32 (or say auto)")


A = TypeVar("A", bound=LocalEngineArgs)


def _flag(field: str) -> str:
    return field.replace("_", "-")


def args_from_section(values: Mapping[str, Any]) -> LocalEngineArgs:
    """The engine keys of a worker's section, spelled with dashes or underscores.

    Raises ConfigError for an unknown key, a missing model, or a value of a wrong type or range.
    """
    return read_section(values, LocalEngineArgs, "local")


def read_section(values: Mapping[str, Any], args_type: type[A], engine: str) -> A:
    """`args_from_section` for an engine with further settings of its own."""
    known = {field.name for field in msgspec.structs.fields(args_type)}
    chosen: dict[str, Any] = {}
    ignored: list[str] = []
    for key, value in values.items():
        field = key.replace("-", "_")
        if field in known:
            chosen[field] = value
        elif field in WITHOUT_MEANING_HERE:
            ignored.append(_flag(field))
        else:
            raise ConfigError(f"the {engine} engine has no setting {key!r}{_suggest(field, known)}")
    if ignored:
        logger.info("the %s engine ignores %s", engine, ", ".join(sorted(ignored)))
    if isinstance(names := chosen.get("served_model_name"), list) and names:
        chosen["served_model_name"] = names[0]
    try:
        args = msgspec.convert(chosen, args_type, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{engine} engine: {error}") from error
    args.check()
    return args


def _suggest(field: str, known: set[str]) -> str:
    close = difflib.get_close_matches(field, known, n=1)
    if close:
        return f"; did you mean {_flag(close[0])!r}?"
    return f"; it has {', '.join(sorted(_flag(name) for name in known))}"
