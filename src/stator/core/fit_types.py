"""What the question "can this model run here" is made of, and its answer. Pure data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["refuse", "warn", "note"]
Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Finding:
    """refuse: vLLM would not start, or could not serve one request. warn: it runs, with a consequence. note: worth
    knowing. option: whose value it is about, with underscores; None for the worker as a whole."""

    level: Level
    option: str | None
    message: str


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """A worker's flags, under vLLM's names; None is vLLM's default. allow_long: VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    nnodes: int = 1
    max_model_len: int | None = None
    block_size: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_dtype: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool = True
    cpu_offload_gb: float = 0
    decode_context_parallel_size: int = 1
    allow_deprecated_quantization: bool = False
    allow_long: bool = False
    connector: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """What one rank of the worker runs on. memory_bytes: all that CUDA reports, or the machine's RAM; 0 if not known.
    capability: CUDA's (major, minor); None for a CPU, or a GPU that is not known."""

    name: str
    memory_bytes: int
    capability: Capability | None = None
    is_cpu: bool = False


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Of one version of vLLM: architectures by kind, those without pipeline parallelism, those it dropped and when,
    the least capability (major * 10 + minor) of each quantization, names of KV connectors."""

    version: str
    architectures: Mapping[str, frozenset[str]]
    no_pipeline: frozenset[str] = frozenset()
    dropped: Mapping[str, str] = field(default_factory=dict[str, str])
    quantization: Mapping[str, int] = field(default_factory=dict[str, int])
    connectors: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StageFit:
    """One GPU of a pipeline stage. layers: first, and one past the last. Bytes are of that GPU."""

    layers: tuple[int, int]
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class KvCapacity:
    """source: what decided the size, in words. bytes_per_token: of the model, on all GPUs together, replicas included.
    requests: of max_model_len tokens, at the same time."""

    dtype: str
    block_size: int
    bytes_per_token: int
    blocks: int
    tokens: int
    requests: float
    bytes_per_gpu: int
    source: str


@dataclass(frozen=True, slots=True)
class FitReport:
    """weight_source: "files" or "config". overhead_bytes: an estimate of what else a GPU holds, see fit_memory.
    budget_bytes: gpu-memory-utilization of a GPU. None: not known, and a finding says why."""

    architecture: str | None
    parameters: int | None
    weight_bytes: int | None
    weight_source: str | None
    max_model_len: int | None
    device: str
    device_bytes: int | None
    budget_bytes: int | None
    overhead_bytes: int | None
    stages: tuple[StageFit, ...]
    kv: KvCapacity | None
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        return any(finding.level == "refuse" for finding in self.findings)
