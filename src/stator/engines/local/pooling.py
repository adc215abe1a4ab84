"""Embeddings of the local engine's models: the mean of an input's last hidden states, of length 1.

An input is computed in parts of a fixed size, over keys and values of its own: sequences and their blocks are not
touched, and the result depends on model and input alone.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

PART_TOKENS = 64
"""For so long a step of running sequences may have to wait."""


@runtime_checkable
class EmbeddingRunner(Protocol):
    """What a Runner has whose model can make embeddings."""

    def embed(self, token_ids: Sequence[int]) -> Iterator[bytes | None]:
        """None after each part but the last, then the vector, as float32, little-endian. Each part is a call of its
        own: as all of a runner's, one at a time. Tokens have been checked against vocabulary and context."""
        ...


class MeanPool:
    """The mean of rows that come in parts. The sum is in float64 and in the rows' order."""

    def __init__(self, width: int) -> None:
        self._sum = np.zeros(width, np.float64)
        self._count = 0

    def add(self, rows: F32) -> None:
        """rows: [n, width]."""
        self._sum += np.add.reduce(rows, axis=0, dtype=np.float64)
        self._count += len(rows)

    def vector(self) -> bytes:
        """At least one row was added. A mean of zeros stays one."""
        mean = self._sum / self._count
        norm = float(np.sqrt(np.add.reduce(mean * mean)))
        return (mean / (norm or 1.0)).astype("<f4").tobytes()
