"""The decoder: token ids and block tables in, hidden states and logits out, in float32.

Llama's structure; a layer may lack attention or FFN, or have a matrix in place of either (Nemotron-NAS). Every
operation is per row, exact in any grouping (`tiles`, `attention`), or elementwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stator.engines.local.attention import Group, KvCache, Span, attend, plan_groups
from stator.engines.local.model_config import LayerConfig, ModelConfig, rope_frequencies
from stator.engines.local.tiles import Matrix, choose_tile, pad_rows
from stator.engines.local.weights import Weights

F32 = NDArray[np.float32]
Int = NDArray[np.int64]

_SLAB_ROWS = 64
"""Rows the FFN computes at once, so that its wide intermediate stays in the CPU's cache."""


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of one step, all sequences one after the other.

    tokens, positions, blocks, offsets: [num_tokens]; the last two say where each token's keys and values go.
    fresh_blocks: blocks that this step begins to fill and does not fill up.
    """

    tokens: Int
    positions: Int
    blocks: Int
    offsets: Int
    fresh_blocks: Int
    spans: Sequence[Span]


def rms_norm(rows: F32, weight: F32, eps: float) -> F32:
    squares = np.add.reduce(rows * rows, axis=-1, keepdims=True)
    squares /= np.float32(rows.shape[-1])
    squares += np.float32(eps)
    normed: F32 = rows * np.reciprocal(np.sqrt(squares))
    normed *= weight
    return normed


def rotate(heads: F32, cos: F32, sin: F32) -> F32:
    """Rotary embedding, halves convention. heads: [rows, heads, head_dim]; cos, sin: [rows, 1, head_dim / 2]."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    out = np.empty(heads.shape, np.float32)
    np.multiply(first, cos, out=out[..., :half])
    out[..., :half] -= second * sin
    np.multiply(second, cos, out=out[..., half:])
    out[..., half:] += first * sin
    return out


class _Attention:
    def __init__(self, weights: Weights, prefix: str, config: ModelConfig, kv_heads: int, tile: int) -> None:
        hidden, dim = config.hidden_size, config.head_dim
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, kv_heads, dim
        self._scale = np.float32(dim**-0.5)
        sizes = {"q_proj": config.num_heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
        bias = config.attention_bias
        self._qkv = _load_matrix(weights, prefix, sizes, hidden, bias, tile)
        self._out = _load_matrix(weights, prefix, {"o_proj": hidden}, config.num_heads * dim, bias, tile)
        self._tile = tile

    def __call__(self, rows: F32, step: Step, groups: Sequence[Group], rope: tuple[F32, F32], cache: KvCache) -> F32:
        num_rotated = self.num_heads + self.kv_heads
        heads = self._qkv(rows).reshape(len(rows), num_rotated + self.kv_heads, self.head_dim)
        rotated = rotate(heads[:, :num_rotated], *rope)
        num_tokens = len(step.tokens)
        # what an earlier owner left in the rest of a block is multiplied by 0, which only works on finite numbers
        cache.keys[step.fresh_blocks] = 0
        cache.values[step.fresh_blocks] = 0
        cache.keys[step.blocks, :, :, step.offsets] = rotated[:num_tokens, self.num_heads :]
        cache.values[step.blocks, :, step.offsets] = heads[:num_tokens, num_rotated:]
        attended = attend(rotated[:, : self.num_heads] * self._scale, groups, cache, self._tile)
        return self._out(attended.reshape(len(rows), -1))


class _Ffn:
    def __init__(self, weights: Weights, prefix: str, config: ModelConfig, width: int, tile: int) -> None:
        hidden, bias = config.hidden_size, config.mlp_bias
        self._width = width
        self._gate_up = _load_matrix(weights, prefix, {"gate_proj": width, "up_proj": width}, hidden, bias, tile)
        self._down = _load_matrix(weights, prefix, {"down_proj": hidden}, width, bias, tile)

    def __call__(self, rows: F32) -> F32:
        """down(silu(gate(rows)) * up(rows)), where silu(x) = x / (1 + exp(-x))."""
        both = self._gate_up(rows)
        gate, up = both[:, : self._width], both[:, self._width :]
        inner = np.negative(gate)
        np.exp(inner, out=inner)
        inner += np.float32(1)
        np.divide(gate, inner, out=inner)
        inner *= up
        return self._down(inner)


class _Layer:
    """input norm, attention, residual; post-attention norm, FFN, residual. Absent parts are None."""

    def __init__(self, weights: Weights, index: int, config: ModelConfig, layer: LayerConfig, tile: int) -> None:
        prefix, hidden = f"model.layers.{index}.", config.hidden_size
        self._eps = config.rms_norm_eps
        self.attention: _Attention | None = None
        self._linear_attention: Matrix | None = None
        self._ffn: _Ffn | Matrix | None = None
        if layer.num_kv_heads:
            self.attention = _Attention(weights, prefix + "self_attn.", config, layer.num_kv_heads, tile)
        elif layer.attention_linear:
            bias = config.attention_bias
            self._linear_attention = _load_matrix(
                weights, prefix + "self_attn.", {"linear_attn": hidden}, hidden, bias, tile
            )
        if layer.num_kv_heads or layer.attention_linear:
            self._input_norm = weights.load(prefix + "input_layernorm.weight", (hidden,))
        if layer.ffn_width:
            self._ffn = _Ffn(weights, prefix + "mlp.", config, layer.ffn_width, tile)
        elif layer.ffn_linear:
            self._ffn = _load_matrix(weights, prefix + "mlp.", {"linear_mlp": hidden}, hidden, False, tile)
        if self._ffn is not None:
            self._post_norm = weights.load(prefix + "post_attention_layernorm.weight", (hidden,))

    def __call__(
        self, rows: F32, step: Step, groups: Sequence[Group], rope: tuple[F32, F32], cache: KvCache | None
    ) -> None:
        """Updates rows in place."""
        if self.attention is not None and cache is not None:
            rows += self.attention(rms_norm(rows, self._input_norm, self._eps), step, groups, rope, cache)
        elif self._linear_attention is not None:
            rows += self._linear_attention(rms_norm(rows, self._input_norm, self._eps))
        if self._ffn is not None:
            for first in range(0, len(rows), _SLAB_ROWS):
                slab = rows[first : first + _SLAB_ROWS]
                slab += self._ffn(rms_norm(slab, self._post_norm, self._eps))


class Decoder:
    """Weights of one model, packed for the tile of this machine's BLAS. Holds no sequence state."""

    def __init__(self, weights: Weights, config: ModelConfig, block_size: int) -> None:
        self.config = config
        self.block_size = block_size
        self.tile = choose_tile(_matrix_shapes(config), _attention_shapes(config, block_size))
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.load("model.embed_tokens.weight", shape)
        self._layers = [_Layer(weights, i, config, layer, self.tile) for i, layer in enumerate(config.layers)]
        self._norm = weights.load("model.norm.weight", (config.hidden_size,))
        head = self._embedding if config.tie_embeddings else weights.load("lm_head.weight", shape)
        self._head = Matrix(head, None, self.tile)
        angles = np.outer(np.arange(config.max_position), rope_frequencies(config.rope, config.head_dim))
        self._cos = np.cos(angles).astype(np.float32)[:, None, :]
        self._sin = np.sin(angles).astype(np.float32)[:, None, :]

    def new_caches(self, num_blocks: int) -> list[KvCache | None]:
        """One per layer; None for layers that keep no keys and values."""
        return [
            KvCache(num_blocks, layer.num_kv_heads, self.config.head_dim, self.block_size)
            if layer.num_kv_heads
            else None
            for layer in self.config.layers
        ]

    def hidden_states(self, step: Step, caches: Sequence[KvCache | None]) -> F32:
        """Compute the step's tokens and write their keys and values. Returns [num_tokens, hidden_size], before the
        final norm."""
        rows = pad_rows(self._embedding[step.tokens], self.tile)
        padded = np.zeros(len(rows), np.int64)
        padded[: len(step.tokens)] = step.positions
        rope = (self._cos[padded], self._sin[padded])
        plans: dict[int, list[Group]] = {}
        with np.errstate(over="ignore", under="ignore"):
            for layer, cache in zip(self._layers, caches, strict=True):
                groups: list[Group] = []
                if layer.attention is not None:
                    per_kv = layer.attention.num_heads // layer.attention.kv_heads
                    if per_kv not in plans:
                        plans[per_kv] = plan_groups(step.spans, self.block_size, self.tile, per_kv)
                    groups = plans[per_kv]
                layer(rows, step, groups, rope, cache)
        return rows[: len(step.tokens)]

    def final_states(self, hidden: F32) -> F32:
        """hidden: [n, hidden_size] of `hidden_states`. Returns [n, hidden_size], after the final norm."""
        return rms_norm(hidden, self._norm, self.config.rms_norm_eps)

    def logits(self, hidden: F32) -> F32:
        """hidden: [n, hidden_size] of `hidden_states`. Returns [n, vocab_size]."""
        rows = pad_rows(hidden, self.tile)
        return self._head(rms_norm(rows, self._norm, self.config.rms_norm_eps))[: len(hidden)]


def _load_matrix(weights: Weights, prefix: str, columns: dict[str, int], inner: int, bias: bool, tile: int) -> Matrix:
    """Several projections of the same input as one matrix. columns: width of each by name, in order."""
    parts = [weights.load(f"{prefix}{name}.weight", (width, inner)) for name, width in columns.items()]
    biases = [weights.load(f"{prefix}{name}.bias", (width,)) for name, width in columns.items()] if bias else []
    return Matrix(np.concatenate(parts), np.concatenate(biases) if bias else None, tile)


def _matrix_shapes(config: ModelConfig) -> set[tuple[int, int]]:
    hidden, dim = config.hidden_size, config.head_dim
    shapes = {(hidden, config.vocab_size)}
    for layer in config.layers:
        if layer.num_kv_heads:
            shapes |= {(hidden, (config.num_heads + 2 * layer.num_kv_heads) * dim), (config.num_heads * dim, hidden)}
        if layer.ffn_width:
            shapes |= {(hidden, 2 * layer.ffn_width), (layer.ffn_width, hidden)}
        if layer.attention_linear or layer.ffn_linear:
            shapes.add((hidden, hidden))
    return shapes


def _attention_shapes(config: ModelConfig, block_size: int) -> set[tuple[int, int]]:
    if not any(layer.num_kv_heads for layer in config.layers):
        return set()
    return {(config.head_dim, block_size), (block_size, config.head_dim)}
