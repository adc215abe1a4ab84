"""What a Hugging Face config.json says about a model's size: parameters and KV cache of each layer. Pure.

`read_shape` takes any causal language model. Parameters are counted for the architectures in `_COUNTED`, whose layers
are attention plus a gated FFN (or experts of such); for others the size of the files has to be known. KV cache is
described for plain attention only: what keeps another state (MLA, Mamba, ...) says so in `kv_unknown`.

Sources: vLLM 0.32 `transformers_utils/model_arch_config_convertor.py` (head_dim, KV heads, quantization, context),
`model_executor/models/{llama,qwen2,qwen3,qwen3_moe,mixtral,nemotron_nas}.py` (which matrices a layer has).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

Json = Mapping[str, Any]

DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}

_COUNTED = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "DeciLMForCausalLM",
    "MixtralForCausalLM", "Qwen3MoeForCausalLM",
})  # fmt: skip
_QKV_BIAS = frozenset({"Qwen2ForCausalLM"})
_MOE = frozenset({"MixtralForCausalLM", "Qwen3MoeForCausalLM"})
_NAS_FFN_MULTIPLE = 256
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
                 "max_sequence_length", "max_seq_length", "seq_len")  # fmt: skip
_KV_HEAD_KEYS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
# A factor of these rope types is not a factor of the context (config/model.py, _get_and_verify_max_len).
_ROPE_KEEPS_CONTEXT = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})


class UnknownShape(Exception):
    """config.json lacks what sizes are computed from; the message says what."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """method: as vLLM names it. bytes_per_weight: of the layers' matrices, scales included; None if not known.
    kind: "fp8", "fp4" or "int", what the arithmetic would be; "" if unknown. group_size: weights that share a scale
    along the input, 0 if that does not limit tensor parallelism. activations: those are quantized too."""

    method: str
    bytes_per_weight: float | None
    kind: str = ""
    group_size: int = 0
    activations: bool = False


@dataclass(frozen=True, slots=True)
class LayerShape:
    """linear: weights in matrices that tensor parallelism splits and quantization shrinks, K and V left out.
    kv_weights: of one KV head's K and V projections. plain: replicated weights (norms, routers).
    num_kv_heads: 0 without attention. widths: of the FFNs, which tensor parallelism splits."""

    num_kv_heads: int
    linear: int
    kv_weights: int
    plain: int
    widths: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return self.linear + self.kv_weights * self.num_kv_heads + self.plain


@dataclass(frozen=True, slots=True)
class ModelShape:
    """max_position: tokens of context, None if not said. counted: the layers' parameters are known. tied: lm_head is
    the embedding. kv_unknown: why the KV cache's size cannot be told, if so. kv_cache_dtype: what the checkpoint asks
    for. unsupported: what no layer of vLLM computes."""

    architecture: str
    hidden_size: int
    vocab_size: int
    num_heads: int
    head_dim: int
    layers: tuple[LayerShape, ...]
    dtype: str
    max_position: int | None
    tied: bool
    counted: bool
    quantization: Quantization | None = None
    kv_cache_dtype: str | None = None
    kv_unknown: str | None = None
    windowed: bool = False
    unsupported: str | None = None

    @property
    def embedding(self) -> int:
        """Weights of the embedding, padded to 64 rows as vLLM does (vocab_parallel_embedding.py)."""
        return -(-self.vocab_size // 64) * 64 * self.hidden_size

    @property
    def parameters(self) -> int | None:
        """As in the checkpoint: without padding."""
        if not self.counted:
            return None
        tables = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return tables + self.hidden_size + sum(layer.parameters for layer in self.layers)


def read_shape(config: Json, quantization_file: Json | None = None) -> ModelShape:
    """quantization_file: hf_quant_config.json, which ModelOpt writes beside config.json. Raises UnknownShape."""
    text = _object(config, "text_config") or config
    architectures = cast(Sequence[Any], config.get("architectures") or text.get("architectures") or ())
    architecture = str(architectures[0]) if architectures else ""
    heads, hidden = _integer(text, "num_attention_heads", "n_head"), _integer(text, "hidden_size", "n_embd")
    head_dim = _optional(text, "head_dim") or hidden // heads
    unknown = _kv_unknown(text)
    blocks = cast(Sequence[Json] | None, text.get("block_configs"))
    unsupported = _unsupported(blocks) if blocks else None
    counted = architecture in _COUNTED and unknown is None and unsupported is None
    if blocks and unsupported is None:
        layers = tuple(_nas_layer(block, hidden, heads, head_dim) for block in blocks)
    else:
        layers = _uniform_layers(architecture, text, hidden, heads, head_dim, counted)
    quantized = _object(config, "quantization_config") or _object(text, "quantization_config")
    quantized = quantized or _object(config, "compression_config") or quantization_file
    return ModelShape(
        architecture=architecture,
        hidden_size=hidden,
        vocab_size=_integer(text, "vocab_size"),
        num_heads=heads,
        head_dim=head_dim,
        layers=layers,
        dtype=_dtype(config, text),
        max_position=_context(text),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        counted=counted,
        quantization=read_quantization(quantized) if quantized else None,
        kv_cache_dtype=_kv_cache_dtype(quantized) if quantized else None,
        kv_unknown=unknown or unsupported,
        windowed=_has_windows(text),
        unsupported=unsupported,
    )


def ffn_width(multiple: float, hidden: int) -> int:
    """Nemotron-NAS: nemotron_nas.py, _ffn_mult_to_intermediate_size."""
    return -(-int(2 * multiple * hidden / 3) // _NAS_FFN_MULTIPLE) * _NAS_FFN_MULTIPLE


def _nas_layer(block: Json, hidden: int, heads: int, head_dim: int) -> LayerShape:
    attention, ffn = _object(block, "attention") or {}, _object(block, "ffn") or {}
    kv_heads = 0 if attention.get("no_op") else heads // _integer(attention, "n_heads_in_group")
    width = 0
    if not ffn.get("no_op"):
        multiple = ffn.get("ffn_mult")
        width = ffn_width(float(multiple), hidden) if multiple is not None else _integer(ffn, "intermediate_size")
    linear = 2 * hidden * heads * head_dim * bool(kv_heads) + 3 * hidden * width
    norms = hidden * (bool(kv_heads) + bool(width))
    return LayerShape(kv_heads, linear, 2 * hidden * head_dim, norms, (width,) if width else ())


def _unsupported(blocks: Sequence[Json]) -> str | None:
    for index, block in enumerate(blocks):
        for name in ("attention", "ffn"):
            if (_object(block, name) or {}).get("replace_with_linear"):
                return f"layer {index} replaces its {name} by one matrix (replace_with_linear)"
    return None


def _uniform_layers(
    architecture: str, text: Json, hidden: int, heads: int, head_dim: int, counted: bool
) -> tuple[LayerShape, ...]:
    num = _integer(text, "num_hidden_layers", "n_layer")
    kv_heads = next((value for key in _KV_HEAD_KEYS if (value := _optional(text, key))), heads)
    kv_weights = 2 * hidden * head_dim
    if not counted:
        return (LayerShape(kv_heads, 0, kv_weights, 0, ()),) * num
    bias = heads * head_dim + 2 * kv_heads * head_dim if architecture in _QKV_BIAS or text.get("attention_bias") else 0
    attention = 2 * hidden * heads * head_dim
    plain = 2 * hidden + bias
    if architecture == "Qwen3ForCausalLM" or architecture == "Qwen3MoeForCausalLM":
        plain += 2 * head_dim  # norms of Q and K
    if architecture not in _MOE:
        width = _integer(text, "intermediate_size")
        return (LayerShape(kv_heads, attention + 3 * hidden * width, kv_weights, plain, (width,)),) * num
    experts = _integer(text, "num_local_experts", "num_experts")
    width = _optional(text, "moe_intermediate_size") or _integer(text, "intermediate_size")
    sparse = LayerShape(
        kv_heads, attention + 3 * hidden * width * experts, kv_weights, plain + hidden * experts, (width,)
    )
    dense_width = _optional(text, "intermediate_size") or width
    dense = LayerShape(kv_heads, attention + 3 * hidden * dense_width, kv_weights, plain, (dense_width,))
    step = _optional(text, "decoder_sparse_step") or 1
    only_dense = set(cast(Sequence[int], text.get("mlp_only_layers") or ()))
    return tuple(dense if i in only_dense or (i + 1) % step else sparse for i in range(num))


def _kv_unknown(text: Json) -> str | None:
    """None for plain attention in every layer that has any."""
    if text.get("kv_lora_rank") is not None or text.get("compress_ratios") is not None:
        return "it has latent attention (MLA), whose cache is not a pair of K and V for each head"
    if any("ssm" in key or "mamba" in key or key == "hybrid_override_pattern" for key in text):
        return "it keeps states of another kind (Mamba) besides attention"
    kinds = {*_strings(text.get("layer_types")), *_strings(text.get("layers_block_type"))}
    others = kinds - {"full_attention", "sliding_attention", "attention", "chunked_attention"}
    if others:
        return f"it has layers of other kinds ({', '.join(sorted(others))})"
    return "it has an encoder" if text.get("is_encoder_decoder") else None


def _has_windows(text: Json) -> bool:
    if {"sliding_attention", "chunked_attention"} & set(_strings(text.get("layer_types"))):
        return True
    return bool(text.get("sliding_window")) and text.get("use_sliding_window", True) is not False


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(str, cast(Sequence[Any], value))) if isinstance(value, list) else ()


def _dtype(config: Json, text: Json) -> str:
    """vLLM takes float32 for a config that says nothing, and then loads it as a 16 bit type."""
    value = next((o[k] for o in (config, text) for k in ("dtype", "torch_dtype") if o.get(k) is not None), "float32")
    return str(value).removeprefix("torch.")


def _context(text: Json) -> int | None:
    found = [value for key in _CONTEXT_KEYS if (value := _optional(text, key)) is not None]
    if not found:
        return None
    rope = _object(text, "rope_parameters") or _object(text, "rope_scaling") or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if isinstance(factor, (int, float)) and kind not in _ROPE_KEEPS_CONTEXT and kind not in (None, "default"):
        return int(min(found) * factor)
    return min(found)


def read_quantization(data: Json) -> Quantization | None:
    """Of config.json's `quantization_config`, or of hf_quant_config.json. None if it quantizes nothing."""
    inner = _object(data, "quantization") or {}
    method = str(data.get("quant_method") or "").lower().replace("compressed_tensors", "compressed-tensors")
    algorithm = str(inner.get("quant_algo") or data.get("quant_algo") or "").upper()
    if (_object(data, "producer") or {}).get("name") == "modelopt" or method.startswith("modelopt"):
        return _modelopt(algorithm, inner or data)
    if method in ("awq", "gptq", "auto_awq", "auto_gptq", "awq_marlin", "gptq_marlin"):
        bits, group = _optional(data, "bits", "w_bit") or 4, _optional(data, "group_size", "q_group_size") or 128
        return Quantization(method, bits / 8 + (2 + bits / 8) / group if group > 0 else bits / 8, "int", max(group, 0))
    if method in ("fp8", "fbgemm_fp8"):
        block = data.get("weight_block_size")
        size = int(cast(Sequence[int], block)[-1]) if isinstance(block, list) and block else 0
        return Quantization(method, 1.0, "fp8", size, activations=True)
    if method == "mxfp4":
        return Quantization(method, 0.5 + 1 / 32, "fp4", 32)
    if method == "compressed-tensors":
        return _compressed(data)
    return Quantization(method, None) if method else None


def _modelopt(algorithm: str, data: Json) -> Quantization | None:
    """modelopt.py, LINEAR_ALGOS: which class of vLLM owns an algorithm. FP4: 16 weights share one byte of scale."""
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return Quantization("modelopt", 1.0, "fp8", activations=True)
    if algorithm == "FP8_PB_WO":
        return Quantization("modelopt", 1.0, "fp8", 128, activations=True)
    if "NVFP4" in algorithm:
        group = _optional(data, "group_size") or 16
        return Quantization(
            "modelopt_fp4", 0.5 + 1 / group, "fp4", group, activations=not algorithm.startswith("W4A16")
        )
    if algorithm == "MXFP8":
        return Quantization("modelopt_mxfp8", 1 + 1 / 32, "fp8", 32, activations=True)
    return Quantization("modelopt_mixed", None) if algorithm else None


def _compressed(data: Json) -> Quantization:
    groups = cast(Mapping[str, Json], data.get("config_groups") or {})
    first = next(iter(groups.values()), {})
    weights = _object(first, "weights") or {}
    bits, group = _optional(weights, "num_bits"), _optional(weights, "group_size") or 0
    if bits is None:
        return Quantization("compressed-tensors", None)
    floating = weights.get("type") == "float"
    size = bits / 8 + (2 / group if group > 0 else 0)
    kind = {8: "fp8", 4: "fp4"}.get(bits, "") if floating else "int"
    active = _object(first, "input_activations") is not None
    return Quantization("compressed-tensors", size, kind, max(group, 0), activations=active)


def _kv_cache_dtype(data: Json) -> str | None:
    """torch_utils.py, get_kv_cache_quant_algo_string: only ModelOpt's checkpoints change vLLM's `auto`."""
    inner = _object(data, "quantization") or {}
    named = (_object(data, "producer") or {}).get("name") == "modelopt"
    if not named and not str(data.get("quant_method") or "").startswith("modelopt"):
        return None
    scheme = inner.get("kv_cache_scheme") or data.get("kv_cache_scheme")
    scheme = scheme or inner.get("kv_cache_quant_algo") or data.get("kv_cache_quant_algo")
    if isinstance(scheme, dict):
        bits = cast(Json, scheme).get("num_bits")
        return {8: "fp8_e4m3", 4: "nvfp4"}.get(bits) if isinstance(bits, int) else None
    return {"fp8": "fp8_e4m3", "nvfp4": "nvfp4"}.get(str(scheme).lower())


def _object(data: Json, key: str) -> Json | None:
    value = data.get(key)
    return cast(Json, value) if isinstance(value, Mapping) else None


def _optional(data: Json, *keys: str) -> int | None:
    for key in keys:
        value = data.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _integer(data: Json, *keys: str) -> int:
    value = _optional(data, *keys)
    if value is None or value <= 0:
        raise UnknownShape(f"config.json has no {keys[0]} that is a positive number")
    return value
