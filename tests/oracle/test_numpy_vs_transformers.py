"""The numpy runner's logits against `transformers` on torch, on small random models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from stator.engines.local.model_config import ffn_width
from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk
from unit.engines_local.local_models import block, decilm_config, random_tensors, write_model

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama_settings(**changes: Any) -> LlamaConfig:
    base: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(base | changes))


def random_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """Random in every parameter, also in those that start as zeros or ones."""
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.2 * noise
    return model


def token_ids(count: int = 150) -> list[int]:
    return np.random.default_rng(1).integers(0, 100, count).tolist()


def numpy_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """In two chunks over a shuffled block table."""
    runner = NumpyRunner(path, block_size=16, num_blocks=20)
    table = np.random.default_rng(2).permutation(20).tolist()
    first = runner.logits([Chunk(table, tokens[:70], 0, None)])
    return np.concatenate([first, runner.logits([Chunk(table, tokens[70:], 70, None)])])


@torch.no_grad()
def assert_equal_to(model: nn.Module, path: Path) -> None:
    tokens = token_ids()
    expected = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(numpy_logits(path, tokens), expected, atol=TOLERANCE, rtol=0)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 20},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": LLAMA3},
        {"rms_norm_eps": 0.01},
    ],
    ids=str,
)
def test_llama_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_llama(llama_settings(**changes))
    model.save_pretrained(tmp_path)
    assert_equal_to(model, tmp_path)


def test_llama3_rope_in_the_older_config_style(tmp_path: Path) -> None:
    model = random_llama(llama_settings(rope_parameters=LLAMA3))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    path.write_text(json.dumps(config | {"rope_scaling": scaling}))
    assert_equal_to(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_storage_types_and_shards(tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    model = random_llama(llama_settings()).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size != "5GB")
    # the stored values, computed in float32, as the runner does
    assert_equal_to(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), tmp_path)


class Logits:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class DeciLayer(nn.Module):
    def __init__(self, config: LlamaConfig, index: int, blocks: dict[str, Any]) -> None:
        super().__init__()
        attention, ffn = blocks["attention"], blocks["ffn"]
        own = LlamaConfig(**config.to_dict())
        if attention["replace_with_linear"]:
            linear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.self_attn = nn.ModuleDict({"linear_attn": linear})
        elif not attention["no_op"]:
            own.num_key_value_heads = config.num_attention_heads // attention["n_heads_in_group"]
            own._attn_implementation = "eager"
            self.self_attn = LlamaAttention(own, index)
        if hasattr(self, "self_attn"):
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if ffn["replace_with_linear"]:
            self.mlp = nn.ModuleDict({"linear_mlp": nn.Linear(config.hidden_size, config.hidden_size, bias=False)})
        elif not ffn["no_op"]:
            own.intermediate_size = ffn_width(ffn["ffn_mult"], config.hidden_size)
            self.mlp = LlamaMLP(own)
        if hasattr(self, "mlp"):
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "self_attn"):
            normed = self.input_layernorm(x)
            linear = isinstance(self.self_attn, nn.ModuleDict)
            x = x + (self.self_attn["linear_attn"](normed) if linear else self.self_attn(normed, rope, mask)[0])
        if hasattr(self, "mlp"):
            normed = self.post_attention_layernorm(x)
            x = x + (self.mlp["linear_mlp"](normed) if isinstance(self.mlp, nn.ModuleDict) else self.mlp(normed))
        return x


class DeciModel(nn.Module):
    """Nemotron-NAS assembled from Llama's own modules; parameter names are those of its checkpoints."""

    def __init__(self, config: LlamaConfig, blocks: list[dict[str, Any]]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(DeciLayer(config, i, b) for i, b in enumerate(blocks))
        self.model.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = LlamaRotaryEmbedding(config)

    def forward(self, tokens: torch.Tensor) -> Logits:
        x = self.model.embed_tokens(tokens)
        rope = self.rope(x, torch.arange(tokens.shape[1])[None])
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        for layer in self.model.layers:
            x = layer(x, rope, mask)
        return Logits(self.lm_head(self.model.norm(x)))


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 10000.0}, LLAMA3], ids=["default", "llama3"])
def test_nemotron_nas(tmp_path: Path, rope: dict[str, Any]) -> None:
    blocks = [
        block(2, 4.5),
        block(None, 1.3),
        block(4),
        block(1, 10.0),
        block(linear="attention"),
        block(4, linear="ffn"),
        block(linear="attention ffn"),
        block(),
    ]
    theta = {"rope_theta": rope["rope_theta"], "rope_scaling": rope if rope is LLAMA3 else None}
    config = decilm_config(blocks, hidden_size=48, head_dim=12, vocab_size=128, **theta)
    tensors = random_tensors(config)
    settings = llama_settings(num_hidden_layers=len(blocks), rope_parameters=rope, rms_norm_eps=config["rms_norm_eps"])
    model = DeciModel(settings, blocks).eval()
    model.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    write_model(tmp_path, config, {})
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert_equal_to(model, tmp_path)


@torch.no_grad()
def test_embeddings_are_the_mean_of_the_last_hidden_states(tmp_path: Path) -> None:
    model = random_llama(llama_settings())
    model.save_pretrained(tmp_path)
    tokens = token_ids()
    states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    expected = torch.nn.functional.normalize(states.mean(dim=0), dim=0).numpy()
    *_, vector = NumpyRunner(tmp_path, block_size=16, num_blocks=1).embed(tokens)
    assert vector is not None
    np.testing.assert_allclose(np.frombuffer(vector, "<f4"), expected, atol=1e-6, rtol=0)
