"""Token ids as one buffer.

A prompt crosses every hop, and at 100k tokens a list of Python integers costs more than the routing decision, so
from the tokenizer to the engine it is one `bytes` object: unsigned 32-bit little-endian, one word per token.
Streamed deltas are a handful of tokens and stay plain lists.
"""

import sys
from array import array
from collections.abc import Iterable
from typing import NewType

TokenBuffer = NewType("TokenBuffer", bytes)
"""Packed token ids: uint32, little-endian; `len(buffer) // 4` tokens."""

EMPTY = TokenBuffer(b"")
BYTES_PER_TOKEN = 4


def pack(token_ids: Iterable[int]) -> TokenBuffer:
    """Raises OverflowError for an id outside 0 .. 2**32-1."""
    words = array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return TokenBuffer(words.tobytes())


def unpack(buffer: TokenBuffer) -> list[int]:
    """Raises ValueError if the buffer is not whole words."""
    words = array("I")
    words.frombytes(buffer)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tolist()


def num_tokens(buffer: TokenBuffer) -> int:
    return len(buffer) // BYTES_PER_TOKEN
