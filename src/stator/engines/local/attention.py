"""Attention over paged keys and values, with results that do not depend on the batch.

Rules that make a query's result bit-equal whatever is computed with it:
- Queries are cut into tiles of a fixed number of rows (tokens times the query heads of one KV head). A tile times one
  block's keys, and its weights times the block's values, are products of one fixed shape.
- The maximum of the scores is exact in any order. Weights, their sum and the weighted values are computed per block,
  and blocks are added one after the other in the order of their positions.
- Keys that a query may not see weigh exactly 0, and adding 0 changes nothing; so it does not matter by how many blocks
  a table is padded to match its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Int = NDArray[np.int64]

_PIECE_TOKENS = 64
"""Query tokens of one chunk that are computed together: causality wastes half a piece, python's cost is per piece."""

_GROUP_BLOCKS = 64
"""Blocks gathered at once for sequences that decode, so that scores and gathered keys stay in the CPU's cache."""


class KvCache:
    """Keys and values of one attention layer.

    keys: [num_blocks, kv_heads, head_dim, block_size], transposed so that scores need no transposed product.
    values: [num_blocks, kv_heads, block_size, head_dim].
    """

    def __init__(self, num_blocks: int, kv_heads: int, head_dim: int, block_size: int) -> None:
        self.keys = np.zeros((num_blocks, kv_heads, head_dim, block_size), np.float32)
        self.values = np.zeros((num_blocks, kv_heads, block_size, head_dim), np.float32)


@dataclass(frozen=True, slots=True)
class Span:
    """One chunk's place in the step. first_row: of its first token among the step's rows. table: its blocks in order,
    exactly those that hold positions 0 .. start + num_tokens - 1."""

    first_row: int
    start: int
    num_tokens: int
    table: Int


@dataclass(frozen=True, slots=True)
class Group:
    """Query tiles that are computed together.

    rows: [tiles, tokens] indices into the step's rows; a short tile repeats its last row, whose result is the same.
    tables: [tiles or 1, blocks]; one table for all tiles of one chunk.
    mask: [tiles, masked_blocks, 1, tokens * heads per KV head, block_size], true where a key of the last
    masked_blocks blocks may not be seen. Blocks before them are seen in full.
    """

    rows: Int
    tables: Int
    mask: NDArray[np.bool_]


def tile_tokens(tile: int, heads_per_kv: int) -> int:
    """Query tokens per tile. One token may need more rows than a tile has; then its tile is several."""
    return max(1, tile // heads_per_kv)


def plan_groups(spans: Sequence[Span], block_size: int, tile: int, heads_per_kv: int) -> list[Group]:
    """Cut the step's queries into groups. The same for all layers with this many query heads per KV head."""
    tokens = tile_tokens(tile, heads_per_kv)
    groups: list[Group] = []
    singles: list[tuple[int, int, Int]] = []
    for span in spans:
        for offset in range(0, span.num_tokens, _PIECE_TOKENS):
            count = min(_PIECE_TOKENS, span.num_tokens - offset)
            last = span.start + offset + count - 1
            table = span.table[: last // block_size + 1]
            if count == 1:
                singles.append((span.first_row + offset, last, table))
                continue
            index = np.minimum(np.arange(-(-count // tokens) * tokens), count - 1).reshape(-1, tokens)
            positions = span.start + offset + index
            mask = _mask(positions, len(table), block_size, heads_per_kv)
            groups.append(Group(span.first_row + offset + index, table[None, :], mask))
    groups.extend(_single_groups(singles, block_size, heads_per_kv))
    return groups


def _single_groups(singles: list[tuple[int, int, Int]], block_size: int, heads_per_kv: int) -> list[Group]:
    """Group single queries (decoding sequences), each with its own table; similar lengths together."""
    singles.sort(key=lambda single: len(single[2]), reverse=True)
    groups: list[Group] = []
    first = 0
    while first < len(singles):
        num_blocks = len(singles[first][2])
        members = singles[first : first + max(1, _GROUP_BLOCKS // num_blocks)]
        first += len(members)
        # a padded table repeats the sequence's own first block: nobody else's values may be multiplied, even by 0
        tables = np.repeat(np.array([[table[0]] for _, _, table in members]), num_blocks, axis=1)
        for padded, (_, _, table) in zip(tables, members, strict=True):
            padded[: len(table)] = table
        positions = np.array([[position] for _, position, _ in members])
        rows = np.array([[row] for row, _, _ in members])
        groups.append(Group(rows, tables, _mask(positions, num_blocks, block_size, heads_per_kv)))
    return groups


def _mask(positions: Int, num_blocks: int, block_size: int, heads_per_kv: int) -> NDArray[np.bool_]:
    first = int(positions.min()) // block_size
    keys = np.arange(first * block_size, num_blocks * block_size).reshape(-1, block_size)
    hidden = keys[None, :, None, :] > positions[:, None, :, None]
    return np.repeat(hidden, heads_per_kv, axis=2)[:, :, None]


def attend(queries: F32, groups: Sequence[Group], cache: KvCache, tile: int) -> F32:
    """Softmax attention of every query over its table's keys.

    queries: [rows, heads, head_dim], rotated and scaled. Returns [rows, heads, head_dim]; rows in no group are zero.
    """
    _, heads, head_dim = queries.shape
    kv_heads = cache.keys.shape[1]
    out = np.zeros(queries.shape, np.float32)
    for group in groups:
        num_tiles, tokens = group.rows.shape
        used = tokens * heads // kv_heads
        by_head = queries[group.rows].reshape(num_tiles, tokens, kv_heads, -1, head_dim).transpose(0, 2, 1, 3, 4)
        tiles = np.zeros((num_tiles, 1, kv_heads, _tile_rows(heads // kv_heads, tile), head_dim), np.float32)
        tiles[:, 0, :, :used].reshape(by_head.shape, copy=False)[...] = by_head
        result = _attend_tiles(tiles, used, group, cache)
        by_token = result.reshape(by_head.shape).transpose(0, 2, 1, 3, 4)
        out[group.rows] = by_token.reshape(num_tiles, tokens, heads, head_dim)
    return out


def _tile_rows(heads_per_kv: int, tile: int) -> int:
    """Rows of the products, the same for a single query and a full tile of them."""
    return -(-tile_tokens(tile, heads_per_kv) * heads_per_kv // tile) * tile


def _attend_tiles(tiles: F32, used: int, group: Group, cache: KvCache) -> F32:
    """tiles: [tiles, 1, kv_heads, tile rows, head_dim], of which `used` rows count. Returns [tiles, kv_heads, used,
    head_dim]."""
    # rows beyond `used` stay finite and are dropped at the end, as rows of a product do not touch each other
    weights = np.matmul(tiles, cache.keys[group.tables])
    scores = weights[:, :, :, :used]
    np.copyto(scores[:, -group.mask.shape[1] :], -np.inf, where=group.mask)
    scores -= scores.max(axis=-1).max(axis=1)[:, None, :, :, None]
    np.exp(scores, out=scores)
    block_sums = scores.sum(axis=-1)
    block_values = np.matmul(weights, cache.values[group.tables])
    total = np.zeros(block_sums[:, 0].shape, np.float32)
    result = np.zeros((*total.shape, tiles.shape[-1]), np.float32)
    for block in range(block_sums.shape[1]):
        total += block_sums[:, block]
        result += block_values[:, block, :, :used]
    result /= total[..., None]
    return result
