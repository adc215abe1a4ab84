"""What a Hugging Face model directory says about a model, for the architectures the numpy runner computes.

Llama and DeciLM (Nemotron-NAS) are one structure here: a list of decoder layers that may differ. Sources: the
configuration fields of `transformers`' Llama, and of the published Nemotron-NAS checkpoints (`block_configs`).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from stator.errors import ConfigError

Json = dict[str, Any]
F64 = NDArray[np.float64]

_FFN_MULTIPLE = 256


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """kind: "default", "linear" or "llama3"; the other fields are used by the kinds that define them."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer. `linear`: the whole sublayer is one matrix [hidden, hidden] (Nemotron-NAS).

    num_kv_heads: 0 when the layer has no attention. ffn_width: 0 when it has no FFN.
    """

    num_kv_heads: int
    ffn_width: int
    attention_linear: bool = False
    ffn_linear: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: RopeConfig
    layers: tuple[LayerConfig, ...]
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: frozenset[int]


class _Fields:
    """A JSON object whose fields are read with type checks; errors name the file and the field."""

    def __init__(self, where: str, data: Json) -> None:
        self.where = where
        self._data = data

    def raw(self, name: str) -> Any:
        return self._data.get(name)

    def error(self, name: str, expected: str) -> ConfigError:
        found = json.dumps(self._data[name]) if name in self._data else "nothing"
        return ConfigError(f"{self.where}: '{name}' must be {expected}, found {found}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._data.get(name, default)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(name, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._data.get(name)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise self.error(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def object(self, name: str) -> "_Fields":
        value = self._data.get(name)
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return _Fields(f"{self.where}: {name}", cast(Json, value))


def read_json(path: Path) -> Json:
    """Raises ConfigError when the file is missing or is no JSON object."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return cast(Json, data)


def load_model_config(model_dir: Path) -> ModelConfig:
    """Reads config.json and, for end tokens, generation_config.json. Raises ConfigError naming file and field."""
    path = model_dir / "config.json"
    fields = _Fields(str(path), read_json(path))
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    if fields.raw("head_dim") is None and hidden % heads:
        raise ConfigError(f"{path}: 'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads}")
    head_dim = fields.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise fields.error("head_dim", "even")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=fields.integer("max_position_embeddings", 2048),
        rope=_rope(fields),
        layers=_ARCHITECTURES[architecture](fields, heads, hidden),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        eos_token_ids=_eos_token_ids(model_dir, fields),
    )


def _architecture(fields: _Fields) -> str:
    names = fields.raw("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise fields.error("architectures", "a list with one name")
    if names[0] not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ConfigError(f"{fields.where}: architecture '{names[0]}' is not known to the local engine; known: {known}")
    return names[0]


def _refuse_unsupported(fields: _Fields) -> None:
    if fields.raw("hidden_act") not in (None, "silu", "swish"):
        raise fields.error("hidden_act", "'silu', the only activation the local engine computes")
    if fields.raw("quantization_config") is not None:
        raise ConfigError(
            f"{fields.where}: 'quantization_config': the local engine reads F32, F16 and BF16 weights only"
        )
    if fields.raw("partial_rotary_factor") not in (None, 1, 1.0):
        raise fields.error("partial_rotary_factor", "1.0, the only one the local engine computes")


def _llama_layers(fields: _Fields, heads: int, hidden: int) -> tuple[LayerConfig, ...]:
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    layer = LayerConfig(num_kv_heads=kv_heads, ffn_width=fields.integer("intermediate_size"))
    return (layer,) * fields.integer("num_hidden_layers")


def _decilm_layers(fields: _Fields, heads: int, hidden: int) -> tuple[LayerConfig, ...]:
    blocks = fields.raw("block_configs")
    count = fields.integer("num_hidden_layers")
    if not isinstance(blocks, list) or len(cast(list[Any], blocks)) != count:
        raise fields.error("block_configs", f"a list of num_hidden_layers ({count}) objects")
    layers: list[LayerConfig] = []
    for index, block in enumerate(cast(list[Any], blocks)):
        where = f"{fields.where}: block_configs[{index}]"
        if not isinstance(block, dict):
            raise ConfigError(f"{where} must be an object")
        parts = _Fields(where, cast(Json, block))
        kv_heads, attention_linear = _decilm_attention(parts.object("attention"), heads)
        width, ffn_linear = _decilm_ffn(parts.object("ffn"), hidden)
        layers.append(LayerConfig(kv_heads, width, attention_linear, ffn_linear))
    return tuple(layers)


def _decilm_attention(attention: _Fields, heads: int) -> tuple[int, bool]:
    if attention.flag("no_op"):
        return 0, False
    if attention.flag("replace_with_linear"):
        return 0, True
    if attention.raw("window_length") is not None:
        raise attention.error("window_length", "null: the local engine has no window attention")
    group = attention.integer("n_heads_in_group")
    if heads % group:
        raise attention.error("n_heads_in_group", f"a divisor of num_attention_heads {heads}")
    return heads // group, False


def _decilm_ffn(ffn: _Fields, hidden: int) -> tuple[int, bool]:
    if ffn.flag("no_op"):
        return 0, False
    if ffn.flag("replace_with_linear"):
        return 0, True
    if ffn.raw("hidden_act") not in (None, "silu", "swish"):
        raise ffn.error("hidden_act", "'silu', the only activation the local engine computes")
    if ffn.raw("ffn_mult") is None:
        return ffn.integer("intermediate_size"), False
    return ffn_width(ffn.number("ffn_mult"), hidden), False


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """FFN width of a Nemotron-NAS layer: two thirds of `ffn_mult * hidden_size`, rounded up to a multiple of 256.

    Source: vLLM 0.32, model_executor/models/nemotron_nas.py; equal to the published checkpoints' tensor shapes.
    """
    return -(-int(2 * ffn_mult * hidden_size / 3) // _FFN_MULTIPLE) * _FFN_MULTIPLE


_ARCHITECTURES = {"LlamaForCausalLM": _llama_layers, "DeciLMForCausalLM": _decilm_layers}


def _rope(fields: _Fields) -> RopeConfig:
    """Old style: `rope_theta` beside `rope_scaling`. New style: one object `rope_parameters`."""
    name = next((n for n in ("rope_parameters", "rope_scaling") if fields.raw(n) is not None), None)
    scaling = fields.object(name) if name else _Fields(fields.where, {})
    outer = fields if scaling.raw("rope_theta") is None else scaling
    theta = outer.number("rope_theta", 10000.0)
    kind = scaling.raw("rope_type") or scaling.raw("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, factor=scaling.number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
            original_max_position=scaling.integer("original_max_position_embeddings"),
        )
    raise ConfigError(f"{scaling.where}: rope type {kind!r} is not supported; supported: default, linear, llama3")


def rope_frequencies(rope: RopeConfig, head_dim: int) -> F64:
    """Angle per position of each pair of dimensions, shape [head_dim / 2].

    "llama3" leaves short wavelengths alone, divides long ones by `factor`, and blends in between.
    Source: Llama 3.1 model card and `transformers`' modeling_rope_utils.
    """
    half = head_dim // 2
    frequencies = rope.theta ** (-np.arange(half, dtype=np.float64) / half)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        rotations = rope.original_max_position * frequencies / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((rotations - rope.low_freq_factor) / span, 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / rope.factor)
    return frequencies


def _eos_token_ids(model_dir: Path, fields: _Fields) -> frozenset[int]:
    """End tokens of generation_config.json if it names any, else those of config.json."""
    path = model_dir / "generation_config.json"
    sources = [_Fields(str(path), read_json(path))] if path.exists() else []
    for source in (*sources, fields):
        found = source.raw("eos_token_id")
        if found is None:
            continue
        ids = cast(list[Any], found) if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise source.error("eos_token_id", "a token id or a list of them")
        return frozenset(cast(list[int], ids))
    return frozenset()
