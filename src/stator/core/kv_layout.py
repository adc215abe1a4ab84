"""What one KV block is made of in an engine's cache tensors, from their shapes and strides alone.

A block of the engine is one slice of each layer's tensor. Where that slice is depends on the attention backend: blocks
come first ([num_blocks, ...]) or after a leading 2 for keys and values ([2, num_blocks, ...]), and an attention kernel
may use smaller blocks than the engine (then several consecutive rows are one block).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How to see a tensor as rows, one per block.

    block_dim: the dimension of its shape that counts blocks. rows_per_block: kernel blocks in one engine block; the
    dimension is first split into (num_blocks, rows_per_block). order: then the permutation of dimensions, blocks first
    and the others as they lie in memory. row_bytes: of one block in this tensor.
    """

    block_dim: int
    rows_per_block: int
    order: tuple[int, ...]
    row_bytes: int


def row_layout(shape: Sequence[int], strides: Sequence[int], item_bytes: int, num_blocks: int) -> RowLayout:
    """strides: in elements. Raises ValueError for a tensor whose blocks cannot be told."""
    block_dim = _block_dim(shape, num_blocks)
    rows_per_block = shape[block_dim] // num_blocks
    # As if the dimension were split in two, the rows within a block right after the blocks.
    lengths = (*shape[:block_dim], num_blocks, rows_per_block, *shape[block_dim + 1 :])
    steps = (*strides[:block_dim], strides[block_dim] * rows_per_block, strides[block_dim], *strides[block_dim + 1 :])
    others = [dim for dim in range(len(lengths)) if dim != block_dim]
    # Stable, so that dimensions of length 1, whose strides mean nothing, cannot make two equal tensors differ.
    others.sort(key=lambda dim: (lengths[dim] == 1, -steps[dim] if lengths[dim] != 1 else dim))
    row_items = math.prod(lengths[dim] for dim in others)
    return RowLayout(block_dim, rows_per_block, (block_dim, *others), row_items * item_bytes)


def layout_digest(layers: Sequence[tuple[str, str, Sequence[int], RowLayout]], num_blocks: int) -> str:
    """Equal if and only if a block's bytes mean the same to two engines.

    layers: (name, dtype, shape, layout) in the order in which a block's bytes are joined. num_blocks: left out of the
    shapes, since engines may differ in it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, dtype, shape, layout in layers:
        rest = [length for dim, length in enumerate(shape) if dim != layout.block_dim]
        digest.update(repr((name, dtype, rest, layout)).encode())
    return digest.hexdigest()


def _block_dim(shape: Sequence[int], num_blocks: int) -> int:
    def counts_blocks(dim: int) -> bool:
        return len(shape) > dim and shape[dim] >= num_blocks and shape[dim] % num_blocks == 0

    if num_blocks < 1:
        raise ValueError(f"a KV cache of {num_blocks} blocks")
    split = len(shape) > 2 and shape[0] == 2 and counts_blocks(1)
    first = counts_blocks(0)
    if split and first:
        raise ValueError(
            f"a KV cache tensor of shape {list(shape)} for {num_blocks} blocks: both of its first two dimensions may "
            "count blocks; give the engine more blocks"
        )
    if not split and not first:
        raise ValueError(
            f"a KV cache tensor of shape {list(shape)} has no dimension that counts {num_blocks} blocks; this "
            "connector does not know its layout, use NixlConnector"
        )
    return 1 if split else 0
