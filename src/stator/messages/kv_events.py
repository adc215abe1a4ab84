"""A worker's KV events on their way to a router: a snapshot in chunks, then numbered changes, and digests between.

One stream is

    KvSnapshot 0 .. n (the last one says so), then KvChanges and KvDigest in any mixture

The snapshot stands for the state after change number `sequence`; the first KvChanges has the next number, and so on
without a gap. A KvDigest comes every DIGEST_INTERVAL_S, also when nothing changes, and describes the state after its
`sequence`. So a subscriber sees every loss at the next item, and hears of a silent difference within that time.

Hashes are packed: unsigned 64-bit little-endian, eight bytes each. They are packed once for all subscribers, and
encoding an item for one more of them copies bytes.
"""

import sys
from array import array
from collections.abc import Iterable
from enum import IntEnum
from typing import NewType

import msgspec

PackedHashes = NewType("PackedHashes", bytes)
"""Block hashes: uint64, little-endian; `len(packed) // 8` of them."""

BYTES_PER_HASH = 8

KV_EVENTS_ENDPOINT = "kv_events"

DIGEST_INTERVAL_S = 1.0
MAX_STRIDE = 1024


def pack_hashes(hashes: Iterable[int]) -> PackedHashes:
    """Raises OverflowError for a hash outside 0 .. 2**64-1."""
    words = array("Q", hashes)
    if sys.byteorder == "big":
        words.byteswap()
    return PackedHashes(words.tobytes())


def unpack_hashes(packed: bytes) -> list[int]:
    """Raises ValueError if the bytes are not whole words."""
    words = array("Q")
    words.frombytes(packed)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tolist()


class KvSubscribe(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks a worker for its KV events until cancelled.

    stride: only the blocks at positions stride-1, 2*stride-1, ... of their sequences are reported; 1 .. MAX_STRIDE.
    """

    stride: int = 1


class KvDigest(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """What the worker holds after change number `sequence`: how many (strided) blocks, and the XOR of their hashes.

    epoch: grows whenever the worker starts to count anew; numbers of different epochs have nothing to do with
    each other.
    """

    epoch: int
    sequence: int
    num_blocks: int
    xor: int


class KvSnapshot(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Chunk number `index` of a snapshot, parents before their children.

    digest: of the whole snapshot. closed: see KvChanges.
    """

    digest: KvDigest
    index: int
    last: bool
    hashes: PackedHashes
    closed: bool


class KvChangeKind(IntEnum):
    STORED = 0
    REMOVED = 1
    CLEARED = 2


class KvChange(msgspec.Struct, frozen=True, array_like=True):
    """STORED: blocks that were not held. REMOVED: blocks that were. CLEARED: none is held any more; no hashes."""

    kind: KvChangeKind
    hashes: PackedHashes = PackedHashes(b"")


class KvChanges(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Change number `sequence`: what one engine step, or a few, did, in order.

    closed: after it, every held block's predecessor in its sequence is held too. Engines that evict tails first are
    always closed.
    """

    epoch: int
    sequence: int
    changes: tuple[KvChange, ...]
    closed: bool


KvItem = KvSnapshot | KvChanges | KvDigest
