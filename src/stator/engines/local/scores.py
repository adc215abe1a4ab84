"""How likely tokens are, from the model's own logits: before penalties, temperature and limits, as vLLM counts."""

import numpy as np
from numpy.typing import NDArray

from stator.core.scheduler import ScheduledChunk
from stator.engines.local.runner import ScoreSpec
from stator.messages.engine import TokenScore
from stator.messages.tokens import num_tokens

F32 = NDArray[np.float32]


def token_score(logits: F32, token_id: int, num_top: int) -> TokenScore:
    """logits: one row, [vocab_size], all finite. Among equals the lower id is first, as for a greedy choice."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    own = row[token_id]
    rank = 1 + int(np.count_nonzero(row > own)) + int(np.count_nonzero(row[:token_id] == own))
    top = _largest(row, num_top)
    return TokenScore(float(own), rank, top.tolist(), row[top].tolist())


def score_spec(chunk: ScheduledChunk) -> ScoreSpec | None:
    """Of the tokens that follow the chunk's own in the prompt, if their probabilities are wanted."""
    sequence = chunk.sequence
    num_top = sequence.request.sampling.prompt_logprobs
    if num_top is None:
        return None
    stop = min(chunk.start + chunk.num_tokens + 1, num_tokens(sequence.request.prompt_ids))
    return ScoreSpec(sequence.token_ids(chunk.start + 1, stop), num_top) if stop > chunk.start + 1 else None


def _largest(row: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Ids of the largest values, largest first."""
    count = min(count, len(row))
    if not count:
        return np.empty(0, np.intp)
    bound = np.partition(row, -count)[-count]
    # More than count where several equal the last one.
    candidates = np.flatnonzero(row >= bound)
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]
