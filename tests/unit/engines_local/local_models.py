"""Small random models as Hugging Face directories, made with numpy alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from stator.engines.local.model_config import ffn_width
from stator.engines.local.runner import Chunk, SampleSpec
from stator.messages.engine import SamplingParams


def llama_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    } | changes


def block(group: int | None = None, ffn: float | None = None, *, linear: str = "") -> dict[str, Any]:
    """One entry of block_configs. linear: which of "attention" and "ffn" are replaced by a matrix."""
    return {
        "attention": {
            "n_heads_in_group": group,
            "no_op": group is None and "attention" not in linear,
            "replace_with_linear": "attention" in linear,
        },
        "ffn": {"ffn_mult": ffn, "no_op": ffn is None and "ffn" not in linear, "replace_with_linear": "ffn" in linear},
    }


def decilm_config(blocks: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    base = llama_config(
        architectures=["DeciLMForCausalLM"],
        model_type="nemotron-nas",
        num_key_value_heads=None,
        intermediate_size=None,
        block_configs=blocks,
        num_hidden_layers=len(blocks),
    )
    return base | changes


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a checkpoint of this config has, by the published names."""
    hidden, vocab, heads, dim = (config[k] for k in ("hidden_size", "vocab_size", "num_attention_heads", "head_dim"))
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        kv_heads, width = config["num_key_value_heads"], config["intermediate_size"]
        linear_attention = linear_ffn = False
        if "block_configs" in config:
            attention, ffn = (config["block_configs"][index][part] for part in ("attention", "ffn"))
            linear_attention, linear_ffn = attention["replace_with_linear"], ffn["replace_with_linear"]
            kv_heads = heads // attention["n_heads_in_group"] if attention["n_heads_in_group"] else 0
            width = ffn_width(ffn["ffn_mult"], hidden) if ffn["ffn_mult"] else 0
        projections: dict[str, tuple[int, int]] = {}
        if kv_heads:
            projections |= {
                "self_attn.q_proj": (heads * dim, hidden),
                "self_attn.k_proj": (kv_heads * dim, hidden),
                "self_attn.v_proj": (kv_heads * dim, hidden),
                "self_attn.o_proj": (hidden, heads * dim),
            }
        if width:
            projections |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden)}
            projections["mlp.down_proj"] = (hidden, width)
        if linear_attention:
            projections["self_attn.linear_attn"] = (hidden, hidden)
        if linear_ffn:
            projections["mlp.linear_mlp"] = (hidden, hidden)
        prefix = f"model.layers.{index}."
        if kv_heads or linear_attention:
            yield prefix + "input_layernorm.weight", (hidden,)
        if width or linear_ffn:
            yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, shape in projections.items():
            yield f"{prefix}{name}.weight", shape
            biased = config.get("attention_bias" if "attn" in name else "mlp_bias", False)
            if biased and name != "mlp.linear_mlp":
                yield f"{prefix}{name}.bias", shape[:1]


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Norms near one, the rest scaled so that activations neither vanish nor explode."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in tensor_shapes(config):
        values = random.standard_normal(shape)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif len(shape) == 2 and "embed" not in name:
            values /= shape[1] ** 0.5
        tensors[name] = values.astype(np.float32)
    return tensors


def write_model(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config) if tensors is None else tensors, directory / "model.safetensors")
    return directory


def greedy_spec(position: int, *, num_output: int = 0, **params: Any) -> SampleSpec:
    sampling = SamplingParams(max_tokens=1, **({"temperature": 0.0} | params))
    return SampleSpec(sampling, seed=1, position=position, num_output=num_output)


def prompt_chunk(token_ids: list[int], block_ids: list[int], start: int = 0) -> Chunk:
    return Chunk(block_ids, token_ids, start, greedy_spec(start + len(token_ids)))
