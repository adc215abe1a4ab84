"""Chained block hashes: the name under which everybody knows a block of KV cache.

The definition, so that it can be recomputed elsewhere:

    root  = xxh3_64(b"stator-kv-1" + field(model) + field(lora_name) + field(cache_salt))
    hash0 = xxh3_64(le64(root)    + tokens of block 0)
    hashN = xxh3_64(le64(hashN-1) + tokens of block N)

with xxh3_64 unseeded, `field(text)` the length of its UTF-8 bytes as 4 bytes little-endian and then those bytes
(length 0xFFFFFFFF and no bytes for None), `le64` 8 bytes little-endian, and a block's tokens as in
`messages.tokens.TokenBuffer`: 4 bytes little-endian each. Only full blocks have a hash. `model` is the served name
(`EngineInfo.model`), never a path, which differs from node to node.

A hash names a block to a router. It does not prove what a block holds: 64 bits without a key can be made to collide,
so whoever reuses KV compares token ids as well (`core.blocks`).
"""

from collections.abc import Callable

import xxhash

from stator.ids import BlockHash
from stator.messages.tokens import BYTES_PER_TOKEN

BlockHasher = Callable[[int, bytes], BlockHash]
"""(hash of the parent or the root, the block's packed tokens) -> the block's hash."""

_DOMAIN = b"stator-kv-1"
_ABSENT = b"\xff\xff\xff\xff"


def _field(text: str | None) -> bytes:
    if text is None:
        return _ABSENT
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(4, "little") + raw


def chain_root(model: str, lora_name: str | None = None, cache_salt: str | None = None) -> BlockHash:
    """What the first block chains on: sequences with different roots share no block."""
    return BlockHash(xxhash.xxh3_64_intdigest(_DOMAIN + _field(model) + _field(lora_name) + _field(cache_salt)))


def hash_block(parent: int, tokens: bytes) -> BlockHash:
    return BlockHash(xxhash.xxh3_64_intdigest(parent.to_bytes(8, "little") + tokens))


def extend_hashes(
    hashes: list[BlockHash],
    tokens: bytes | bytearray,
    block_size: int,
    root: int,
    *,
    hasher: BlockHasher = hash_block,
) -> None:
    """Append to `hashes` those of the full blocks of `tokens` that it lacks.

    hashes: the chain of the leading blocks of the same tokens, as far as known; may be empty.
    tokens: packed token ids of the whole sequence so far. block_size: tokens.
    """
    size = block_size * BYTES_PER_TOKEN
    parent = hashes[-1] if hashes else root
    for index in range(len(hashes), len(tokens) // size):
        parent = hasher(parent, bytes(tokens[index * size : (index + 1) * size]))
        hashes.append(parent)


def block_hashes(
    buffer: bytes,
    block_size: int,
    *,
    model: str,
    lora_name: str | None = None,
    cache_salt: str | None = None,
) -> list[BlockHash]:
    """Hashes of the full blocks of a prompt, first block first; shape [num_tokens // block_size]."""
    hashes: list[BlockHash] = []
    extend_hashes(hashes, buffer, block_size, chain_root(model, lora_name, cache_salt))
    return hashes
