"""Bytes on each GPU: weights under tensor and pipeline parallelism, KV cache for each token, and the rest. Pure.

Sources are files of vLLM 0.32. `distributed/utils.py` (get_pp_indices) splits the layers, `layers/linear.py`
(QKVParallelLinear) replicates KV heads when there are fewer than ranks, `v1/worker/gpu_worker.py` and
`v1/worker/utils.py` (request_memory) give the KV cache what gpu-memory-utilization of the memory leaves after weights
and a profiled forward pass, `v1/core/kv_cache_utils.py` turns that into blocks, as many as the poorest rank has.
"""

from dataclasses import dataclass
from math import ceil

from stator.core.fit_types import Device, EngineSettings, KvCapacity, StageFit
from stator.core.model_shape import DTYPE_BYTES, LayerShape, ModelShape, Quantization

MIB = 1024 * 1024
GIB = 1024 * MIB

# Assumptions, not measured with vLLM on GPUs: workspaces, CUDA graphs and what NCCL and the all-reduce buffers hold.
# The CUDA context (553 MB on an H100, measured) is not among them: vLLM's budget starts after it.
_FIXED_BYTES = 1 * GIB
_FIXED_BYTES_OF_SEVERAL = 2 * GIB

# 2 for K and V; nvfp4 packs two values in a byte and shares a scale among 16 (torch_utils.py, nvfp4_kv_cache_full_dim).
_KV_BYTES = {"bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "fp8_inc": 1.0,
             "nvfp4": 0.5625, "nvfp4_4over6": 0.5625}  # fmt: skip

# What vLLM quantizes while it loads an unquantized checkpoint: bytes for each weight of a layer's matrices.
ONLINE = {"fp8": 1.0, "fp8_per_tensor": 1.0, "fp8_per_block": 1.0, "fp8_per_channel": 1.0, "mxfp8": 1 + 1 / 32,
          "int8_per_channel_weight_only": 1.0, "experts_int8": 1.0, "nvfp4_per_token": 0.5625}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """total_bytes: of all ranks together, without replicas. stages: bytes on one GPU of each pipeline stage."""

    total_bytes: int
    stages: tuple[int, ...]
    source: str


def run_dtype(model: ModelShape, settings: EngineSettings, device: Device) -> str:
    """config/model.py, _resolve_auto_dtype: `auto` is the checkpoint's, 16 bit for float32, no bfloat16 before 8.0."""
    named = {"half": "float16", "float": "float32"}.get(settings.dtype, settings.dtype)
    if named != "auto":
        return named
    old = device.capability is not None and device.capability < (8, 0)
    preferred = "float16" if old else "bfloat16"
    dtype = model.dtype if model.dtype in ("bfloat16", "float16") else preferred
    return preferred if old and dtype == "bfloat16" else dtype


def pipeline_stages(num_layers: int, size: int) -> list[tuple[int, int]]:
    """get_pp_indices: what does not divide goes to the stages before the last, one each."""
    counts = [num_layers // size] * size
    for i in range(2, num_layers % size + 2):
        counts[-i] += 1
    ends = [sum(counts[: i + 1]) for i in range(size)]
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def model_weights(
    model: ModelShape, file_bytes: int | None, settings: EngineSettings, device: Device
) -> Weights | None:
    """None if neither the layers nor the files are known.

    With both, the files say what a quantized weight takes, whatever the method, and the layers how it is spread.
    """
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    wide = DTYPE_BYTES[run_dtype(model, settings, device)]
    narrow = _bytes_per_weight(model, file_bytes, settings, wide)
    if not model.counted or narrow is None:
        if file_bytes is None:
            return None
        return Weights(file_bytes, (ceil(file_bytes / (tp * pp)),) * pp, "files")
    stages = tuple(
        _stage_bytes(model, span, position, pp, tp, wide, narrow)
        for position, span in enumerate(pipeline_stages(len(model.layers), pp))
    )
    total = sum(_layer_bytes(layer, 1, wide, narrow) for layer in model.layers)
    total += ((1 if model.tied else 2) * model.vocab_size + 1) * model.hidden_size * wide
    return Weights(round(total), stages, "config" if file_bytes is None else "files")


def _bytes_per_weight(model: ModelShape, file_bytes: int | None, settings: EngineSettings, wide: int) -> float | None:
    method: Quantization | None = model.quantization
    if method is None:
        return ONLINE.get(settings.quantization) if settings.quantization else float(wide)
    if file_bytes is None or not model.counted:
        return method.bytes_per_weight
    stored = DTYPE_BYTES.get(model.dtype, 2)
    linear = sum(layer.linear + layer.kv_weights * layer.num_kv_heads for layer in model.layers)
    plain = (model.parameters or 0) - linear
    found = (file_bytes - plain * stored) / linear
    return found if 0.3 < found < 8 else method.bytes_per_weight


def _layer_bytes(layer: LayerShape, tp: int, wide: int, narrow: float) -> float:
    kv_heads = layer.num_kv_heads / tp if layer.num_kv_heads >= tp else min(layer.num_kv_heads, 1)
    return (layer.linear / tp + layer.kv_weights * kv_heads) * narrow + layer.plain * wide


def _stage_bytes(
    model: ModelShape, span: tuple[int, int], position: int, pp: int, tp: int, wide: int, narrow: float
) -> int:
    size = sum(_layer_bytes(layer, tp, wide, narrow) for layer in model.layers[slice(*span)])
    table = model.embedding / tp * wide
    is_last = position == pp - 1
    size += table if position == 0 else 0
    # A tied lm_head is the first stage's embedding; the last stage of several has a copy.
    size += table if is_last and (not model.tied or pp > 1) else 0
    return ceil(size + model.hidden_size * wide * is_last)


def overhead(model: ModelShape, settings: EngineSettings, device: Device) -> int:
    """An estimate: activations of the largest step and the logits of its sequences, and a fixed part (see above).

    Activations: the residual and its normalized copy, Q, K, V and the attention's output, and an FFN's two halves and
    their product, each for all tokens of a step. Logits: 32 bit, with one copy for sampling.
    """
    tp, tokens, seqs = settings.tensor_parallel_size, step_tokens(settings, device), step_sequences(settings, device)
    ffn = max((width for layer in model.layers for width in layer.widths), default=4 * model.hidden_size)
    kv = max((layer.num_kv_heads for layer in model.layers), default=1)
    attention = (2 * model.num_heads + 2 * max(kv, tp)) * model.head_dim
    activations = tokens * (2 * model.hidden_size + max(attention, 3 * ffn) / tp) * 2
    logits = min(seqs, tokens) * model.vocab_size * 4 * 2
    ranks = settings.tensor_parallel_size * settings.pipeline_parallel_size
    return round(activations + logits) + (_FIXED_BYTES if ranks == 1 else _FIXED_BYTES_OF_SEVERAL)


def step_tokens(settings: EngineSettings, device: Device) -> int:
    """max-num-batched-tokens or its default for a server (arg_utils.py, get_batch_defaults)."""
    default = 16384 if device.memory_bytes >= 160 * GIB else 8192 if _is_large(device) else 2048
    return settings.max_num_batched_tokens or default


def step_sequences(settings: EngineSettings, device: Device) -> int:
    return settings.max_num_seqs or (1024 if _is_large(device) else 256)


def _is_large(device: Device) -> bool:
    return not device.is_cpu and device.memory_bytes >= 70 * GIB and "a100" not in device.name.lower()


def kv_dtype(model: ModelShape, settings: EngineSettings, device: Device) -> str:
    if settings.kv_cache_dtype != "auto":
        return settings.kv_cache_dtype
    return model.kv_cache_dtype or run_dtype(model, settings, device)


def kv_bytes_per_token(model: ModelShape, tp: int, dtype: str, span: tuple[int, int] | None = None) -> int | None:
    """On one GPU, of the layers of `span`. None for a dtype whose layout is not known here."""
    size = 4.0 if dtype == "float32" else _KV_BYTES.get(dtype)
    if size is None:
        return None
    layers = model.layers if span is None else model.layers[slice(*span)]
    heads = sum(max(1, layer.num_kv_heads // tp) for layer in layers if layer.num_kv_heads)
    return ceil(2 * heads * model.head_dim * size)


def default_block_size(device: Device) -> int:
    """config/cache.py, DEFAULT_BLOCK_SIZE; platforms/cpu.py."""
    return 128 if device.is_cpu else 16


def stage_fits(
    model: ModelShape, weights: Weights | None, settings: EngineSettings, device: Device
) -> tuple[StageFit, ...]:
    """Empty if neither weights nor KV cache can be told."""
    dtype = kv_dtype(model, settings, device)
    spans = pipeline_stages(len(model.layers), settings.pipeline_parallel_size)
    sizes = (0,) * len(spans) if weights is None else weights.stages
    unknown = model.kv_unknown is not None
    return tuple(
        StageFit(
            span, size, 0 if unknown else kv_bytes_per_token(model, settings.tensor_parallel_size, dtype, span) or 0
        )
        for span, size in zip(spans, sizes, strict=True)
    )


def kv_capacity(
    stages: tuple[StageFit, ...],
    settings: EngineSettings,
    device: Device,
    *,
    dtype: str,
    max_model_len: int,
    overhead_bytes: int,
) -> KvCapacity | None:
    """None if nothing says how large the cache is. blocks may be 0. The poorest GPU decides for all."""
    block_size = settings.block_size or default_block_size(device)
    per_token = [stage.kv_bytes_per_token for stage in stages]
    if not any(per_token):
        return None
    if settings.num_gpu_blocks_override is not None:
        blocks, source = settings.num_gpu_blocks_override, "num-gpu-blocks-override"
        room = blocks * block_size * max(per_token)
    elif settings.kv_cache_memory_bytes is not None:
        room, source = settings.kv_cache_memory_bytes, "kv-cache-memory-bytes"
        blocks = room // (block_size * max(per_token))
    elif device.is_cpu or not device.memory_bytes:
        return None
    else:
        budget = ceil(device.memory_bytes * settings.gpu_memory_utilization)
        rooms = [(max(0, budget - stage.weight_bytes - overhead_bytes), stage.kv_bytes_per_token) for stage in stages]
        blocks, room = min((room // (block_size * each), room) for room, each in rooms if each)
        source = f"what gpu-memory-utilization {settings.gpu_memory_utilization:g} leaves"
    ranks = settings.tensor_parallel_size
    requests = blocks / ceil(max_model_len / block_size)
    return KvCapacity(dtype, block_size, ranks * sum(per_token), blocks, blocks * block_size, requests, room, source)
