"""What vLLM 0.32 refuses, or does otherwise than one would think, as findings. Pure.

Each rule names the file of vLLM it comes from. A rule refuses only what vLLM itself would refuse for certain.
"""

from collections.abc import Iterator

from stator.core.fit_types import Capability, Device, EngineFacts, EngineSettings, Finding
from stator.core.model_shape import LayerShape, ModelShape, Quantization

_FAMILIES = {
    "awq": "awq", "auto_awq": "awq", "awq_marlin": "awq", "gptq": "gptq", "auto_gptq": "gptq", "gptq_marlin": "gptq",
    "fp8": "fp8", "compressed-tensors": "compressed-tensors", "modelopt": "modelopt", "modelopt_fp4": "modelopt",
    "modelopt_mxfp8": "modelopt", "modelopt_mixed": "modelopt",
}  # fmt: skip
_FROM_CHECKPOINT = frozenset({"awq", "gptq", "compressed-tensors", "modelopt"})
_DEPRECATED = frozenset({"fbgemm_fp8", "fp_quant"})
_KV_ROLES = ("kv_producer", "kv_consumer", "kv_both")
_NATIVE_FP8: Capability = (8, 9)
_NATIVE_FP4: Capability = (10, 0)


def architecture_rules(model: ModelShape, settings: EngineSettings, facts: EngineFacts) -> Iterator[Finding]:
    """model_executor/models/registry.py."""
    name, kinds = model.architecture, facts.architectures
    serving = kinds.get("text", frozenset()) | kinds.get("multimodal", frozenset())
    if not name:
        yield Finding("warn", "model", "its config.json names no architecture, so vLLM cannot tell what it is")
    elif name not in serving:
        yield Finding("warn", "model", _unknown_architecture(name, facts))
    if model.unsupported is not None:
        yield Finding("refuse", "model", f"{model.unsupported}, and vLLM {facts.version} computes no such layer")
    if name in facts.no_pipeline and settings.pipeline_parallel_size > 1:
        yield Finding(
            "refuse", "pipeline_parallel_size",
            f"is {settings.pipeline_parallel_size}, but vLLM {facts.version} runs {name} in one stage only; expected 1",
        )  # fmt: skip


def _unknown_architecture(name: str, facts: EngineFacts) -> str:
    if name in facts.dropped:
        return f"vLLM ran {name} until {facts.dropped[name]}, and {facts.version} does not"
    for kind, what in (("pooling", "embeds or classifies; it writes no text"), ("speculative", "drafts for another")):
        if name in facts.architectures.get(kind, ()):
            return f"{name} is a model that {what}"
    return (
        f"vLLM {facts.version} has no {name} of its own; it may run it through transformers, slower, "
        f"or refuse it when it starts"
    )


def parallel_rules(model: ModelShape, settings: EngineSettings) -> Iterator[Finding]:
    """config/model.py (verify_with_parallel_config), layers/linear.py (QKVParallelLinear, ColumnParallelLinear)."""
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    if pp > len(model.layers):
        yield Finding(
            "refuse", "pipeline_parallel_size", f"is {pp}, but the model has only {len(model.layers)} layers to split"
        )
    if tp == 1:
        return
    if model.num_heads % tp:
        divisors = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0 and n <= 2 * tp]
        yield Finding(
            "refuse", "tensor_parallel_size",
            f"is {tp}, which does not divide the model's {model.num_heads} attention heads; expected one of "
            f"{', '.join(map(str, divisors))}",
        )  # fmt: skip
        return
    yield from _layer_rules(model, settings)


def _layer_rules(model: ModelShape, settings: EngineSettings) -> Iterator[Finding]:
    """The first layer that cannot be split tells; in Nemotron-NAS they differ."""
    tp = settings.tensor_parallel_size
    replicated: set[int] = set()
    for index, layer in enumerate(model.layers):
        heads = layer.num_kv_heads
        if heads and heads % tp and tp % heads:
            yield Finding(
                "refuse" if model.counted else "warn", "tensor_parallel_size",
                f"is {tp}, but layer {index} has {heads} KV heads: they can neither be dealt out to {tp} GPUs nor "
                f"copied evenly",
            )  # fmt: skip
            return
        width = next((width for width in layer.widths if width % tp), None)
        if width is not None:
            yield Finding(
                "refuse", "tensor_parallel_size",
                f"is {tp}, which does not divide the {width} channels of layer {index}'s FFN",
            )  # fmt: skip
            return
        if heads and heads < tp:
            replicated.add(heads)
    if replicated:
        heads = min(replicated)
        yield Finding(
            "note", "tensor_parallel_size",
            f"is {tp} with {heads} KV heads: each is held {tp // heads} times, and so is its KV cache",
        )  # fmt: skip


def group_rules(model: ModelShape, settings: EngineSettings) -> Iterator[Finding]:
    """distributed/utils.py, verify_group_size_divides_partition; fp8_utils.py, validate_fp8_block_shape."""
    method, tp = model.quantization, settings.tensor_parallel_size
    if method is None or method.group_size <= 1 or tp == 1:
        return
    for index, layer in enumerate(model.layers):
        for what, size in _split_inputs(model, layer):
            if size % tp == 0 and (size // tp) % method.group_size:
                yield Finding(
                    "refuse", "tensor_parallel_size",
                    f"is {tp}: it leaves each GPU {size // tp} channels of layer {index}'s {what}, no whole number of "
                    f"the checkpoint's {method.method} groups of {method.group_size}; expected a smaller size",
                )  # fmt: skip
                return


def _split_inputs(model: ModelShape, layer: LayerShape) -> Iterator[tuple[str, int]]:
    yield from (("FFN", width) for width in layer.widths)
    if layer.num_kv_heads:
        yield "attention", model.num_heads * model.head_dim


def quantization_rules(
    model: ModelShape, settings: EngineSettings, device: Device, facts: EngineFacts
) -> Iterator[Finding]:
    """config/model.py (_verify_quantization), config/vllm.py (get_min_capability of each method)."""
    asked, stored = settings.quantization, model.quantization
    family = _FAMILIES.get(asked or "", "")
    if stored is None and family in _FROM_CHECKPOINT:
        yield Finding(
            "refuse", "quantization",
            f"is {asked}, but the checkpoint is not quantized ({model.dtype}); expected none, or fp8, with which vLLM "
            f"quantizes while it loads",
        )  # fmt: skip
        return
    if stored is not None and family and _differs(family, stored):
        yield Finding(
            "refuse", "quantization", f"is {asked}, but the checkpoint is quantized with {stored.method}; expected that"
        )
        return
    method = stored.method if stored is not None else asked
    if method is None:
        return
    if method not in facts.quantization:
        yield Finding(
            "refuse", "quantization" if asked else "model", f"vLLM {facts.version} has no quantization {method}"
        )
        return
    if method in _DEPRECATED and not settings.allow_deprecated_quantization:
        yield Finding(
            "refuse", "quantization" if asked else "model",
            f"vLLM {facts.version} runs the deprecated {method} only with allow-deprecated-quantization: true",
        )  # fmt: skip
    yield from _generation_rules(method, asked, stored, device, facts)


def _differs(family: str, stored: Quantization) -> bool:
    """ModelOpt's checkpoints override whatever was asked for."""
    kept = _FAMILIES.get(stored.method)
    return kept not in (None, "modelopt", family)


def _generation_rules(
    method: str, asked: str | None, stored: Quantization | None, device: Device, facts: EngineFacts
) -> Iterator[Finding]:
    """platforms/cuda.py (supports_fp8), kernels/linear/scaled_mm/marlin.py, kernels/linear/nvfp4/marlin.py, and what
    marlin_utils_fp8.py warns of: without the arithmetic, Marlin unpacks weights to 16 bit as it multiplies."""
    option = "quantization" if asked else "model"
    kind = stored.kind if stored is not None else "fp8" if method.startswith(("fp8", "mxfp8")) else ""
    if device.is_cpu:
        if kind in ("fp8", "fp4"):
            yield Finding(
                "warn", option, f"{method}: vLLM's CPU build lacks kernels of {kind.upper()} checkpoints (the ModelOpt "
                f"FP8 one fails as it loads); use one of 16 bit"
            )  # fmt: skip
        return
    have = device.capability
    if have is None:
        return
    least = facts.quantization[method]
    if have[0] * 10 + have[1] < least:
        yield Finding(
            "refuse", option,
            f"{method} needs compute capability {least // 10}.{least % 10}, and {device.name} has {have[0]}.{have[1]}",
        )  # fmt: skip
    elif kind == "fp8" and have < _NATIVE_FP8:
        yield Finding("warn", option, _weight_only(method, "FP8", "8.9 (Ada, Hopper)", device, have))
    elif kind == "fp4" and have < _NATIVE_FP4:
        yield Finding("warn", option, _weight_only(method, "FP4", "10.0 (Blackwell)", device, have))


def _weight_only(method: str, name: str, native: str, device: Device, have: Capability) -> str:
    return (
        f"{method}: {device.name} (compute capability {have[0]}.{have[1]}) cannot compute in {name}, which starts at "
        f"{native}. vLLM keeps the weights in {name} and multiplies in 16 bit (Marlin): they take as little memory as "
        f"planned, but work that computes much, such as long prompts and large batches, may be slower than with 16 bit "
        f"weights, and texts may differ slightly from those of GPUs with {name}"
    )


def dtype_rules(model: ModelShape, settings: EngineSettings, device: Device) -> Iterator[Finding]:
    """platforms/cuda.py (check_if_supports_dtype), config/model.py (_resolve_auto_dtype), attention backends."""
    have = device.capability
    if have is None:
        return
    shown = f"{device.name} has compute capability {have[0]}.{have[1]}"
    if have < (8, 0):
        if settings.dtype == "bfloat16":
            yield Finding("refuse", "dtype", f"is bfloat16, which needs 8.0, and {shown}; expected float16")
        elif settings.dtype == "auto" and model.dtype == "bfloat16":
            yield Finding("warn", "model", f"is in bfloat16, which needs 8.0, and {shown}: vLLM loads it as float16")
    if have < (7, 5):
        yield Finding("warn", None, f"{shown}: vLLM's own kernels and most quantizations start at 7.5")
    if settings.kv_cache_dtype.startswith("fp8") and have < _NATIVE_FP8:
        # triton_attn.py raises; FlashAttention has FP8 caches from Hopper; FlashInfer may take it on 8.0.
        yield Finding(
            "warn" if have >= (8, 0) else "refuse", "kv_cache_dtype",
            f"is {settings.kv_cache_dtype}, and {shown}: most of vLLM's attention backends read an FP8 cache from 8.9 "
            f"on; expected {'float16' if have < (8, 0) else 'auto, unless FlashInfer is installed'}",
        )  # fmt: skip


def cache_rules(model: ModelShape, settings: EngineSettings, device: Device) -> Iterator[Finding]:
    """get_supported_kernel_block_sizes of v1/attention/backends/*; config/model.py (_get_and_verify_max_len)."""
    multiple = 32 if device.is_cpu else 16
    size = settings.block_size
    if size is not None and size % multiple:
        near = max(multiple, round(size / multiple) * multiple)
        where = "on CPUs" if device.is_cpu else "on GPUs"
        yield Finding(
            "refuse",
            "block_size",
            f"is {size}; vLLM's attention {where} expects a multiple of {multiple}, such as {near}",
        )
    wanted, context = settings.max_model_len, model.max_position
    if wanted is not None and context is not None and wanted > context:
        yield Finding(
            "warn" if settings.allow_long else "refuse", "max_model_len",
            f"is {wanted}, longer than the model's context of {context}; expected at most that"
            + ("" if not settings.allow_long else " (VLLM_ALLOW_LONG_MAX_MODEL_LEN lets it pass: texts may go wrong)"),
        )  # fmt: skip
    if device.is_cpu and settings.kv_cache_memory_bytes is None:
        yield Finding(
            "warn", "kv_cache_memory_bytes",
            "is not set: on a CPU vLLM asks for 92 % of the memory and does not start when less is free; set it, for "
            "instance to 4G",
        )  # fmt: skip


def scheduler_rules(settings: EngineSettings, max_model_len: int | None) -> Iterator[Finding]:
    """config/scheduler.py, verify_max_model_len."""
    tokens, seqs = settings.max_num_batched_tokens, settings.max_num_seqs
    if tokens is None:
        return
    if seqs is not None and tokens < seqs:
        yield Finding(
            "refuse", "max_num_batched_tokens",
            f"is {tokens}, less than max-num-seqs {seqs}; expected at least one token of each sequence in a step",
        )  # fmt: skip
    if max_model_len is not None and tokens < max_model_len and not settings.enable_chunked_prefill:
        yield Finding(
            "refuse", "max_num_batched_tokens",
            f"is {tokens}, less than max-model-len {max_model_len}, and chunked prefill is off: longer prompts could "
            f"not be computed; expected at least {max_model_len}",
        )  # fmt: skip


def connector_rules(settings: EngineSettings, device: Device, facts: EngineFacts) -> Iterator[Finding]:
    """config/kv_transfer.py, distributed/kv_transfer/kv_connector/factory.py; the idle core was measured."""
    connector = settings.connector
    if connector is None:
        return
    name, role = connector.get("kv_connector"), connector.get("kv_role")
    option = "kv_transfer_config"
    if role is not None and role not in _KV_ROLES:
        yield Finding("refuse", option, f"kv_role is {role}; expected one of {', '.join(_KV_ROLES)}")
    if isinstance(name, str) and name not in facts.connectors and not connector.get("kv_connector_module_path"):
        yield Finding("warn", option, f"kv_connector is {name}, which vLLM {facts.version} does not bring")
    if device.is_cpu and isinstance(name, str) and name.startswith("Nixl"):
        yield Finding(
            "note", option,
            f"{name} keeps one core of each worker busy, even when idle (its progress thread spins)",
        )  # fmt: skip
