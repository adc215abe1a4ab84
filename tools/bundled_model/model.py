"""The bundled models as one small torch module: a Llama decoder whose layers may differ, as in Nemotron-NAS models.

Parameter names are those of the published checkpoints, so that the state dict is the safetensors file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Block:
    kv_heads: int  # 0: no attention
    ffn: int  # 0: no FFN


def ffn_width(mult: float, hidden: int) -> int:
    """FFN width of a Nemotron-NAS block."""
    return -(-int(2 * mult * hidden / 3) // 256) * 256


def blocks_of(config: dict[str, Any]) -> list[Block]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if "block_configs" not in config:
        return [Block(config["num_key_value_heads"], config["intermediate_size"])] * config["num_hidden_layers"]
    out = []
    for block in config["block_configs"]:
        attention, ffn = block["attention"], block["ffn"]
        out.append(
            Block(
                0 if attention["no_op"] else heads // attention["n_heads_in_group"],
                0 if ffn["no_op"] else ffn_width(ffn["ffn_mult"], hidden),
            )
        )
    return out


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q = self.q_proj(x).view(n, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(n, t, -1))


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], block: Block) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.block = block
        if block.kv_heads:
            self.input_layernorm = Norm(hidden, eps)
            self.self_attn = Attention(hidden, config["num_attention_heads"], block.kv_heads, config["head_dim"])
        if block.ffn:
            self.post_attention_layernorm = Norm(hidden, eps)
            self.mlp = MLP(hidden, block.ffn)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if self.block.kv_heads:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        if self.block.ffn:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, b) for b in blocks_of(config))
        self.norm = Norm(config["hidden_size"], config["rms_norm_eps"])


class TinyLM(nn.Module):
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = Decoder(config)
        half = config["head_dim"] // 2
        inverse = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(config["max_position_embeddings"], dtype=torch.float64), inverse)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        depth = len(self.model.layers)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            std = 0.02 if "embed" in name else p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # keeps the residual stream's variance independent of the depth
                std /= (2 * depth) ** 0.5
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        t = tokens.shape[1]
        cos, sin = self.cos[:t], self.sin[:t]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
