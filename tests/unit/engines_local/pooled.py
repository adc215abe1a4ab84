"""Mean pooling in the plainest way, for comparison."""

from collections.abc import Sequence

import numpy as np

from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk


def mean_pooled(runner: NumpyRunner, token_ids: Sequence[int]) -> list[float]:
    """Of one input, computed in the runner's own blocks as one chunk."""
    table = tuple(range(runner.num_blocks))
    hidden = runner._compute([Chunk(table, token_ids, 0, None)])
    mean = runner._decoder.final_states(hidden).astype(np.float64).mean(axis=0)
    return (mean / np.linalg.norm(mean)).tolist()
