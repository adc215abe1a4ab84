"""The model step behind the local engine's scheduler.

The scheduler decides which tokens of which sequences are computed next and where their KV goes; a runner computes.
Two runners share the scheduler: the numpy one (`numpy_runner`), and later the simulated one, which only takes time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stator.messages.engine import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What is needed to pick the next token after a chunk. Sampling depends on (seed, position) and history alone.

    position: index of the token to be sampled among all tokens of the sequence (prompt, then output).
    num_output: output tokens so far (resumed ones included), against min_tokens.
    prompt_ids / output_ids: for penalties; None when the request has none.
    """

    params: SamplingParams
    seed: int
    position: int
    num_output: int
    prompt_ids: Sequence[int] | None = None
    output_ids: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to compute in this step.

    block_ids: the sequence's block table, covering at least `start + len(token_ids)` tokens.
    token_ids: the tokens at positions start .. start + n - 1. Positions before start are already in the blocks.
    sample: how to pick the token that follows, or None when the chunk does not reach the sequence's end.
    """

    block_ids: Sequence[int]
    token_ids: Sequence[int]
    start: int
    sample: SampleSpec | None


class Runner(Protocol):
    """Blocks are numbered 0 .. num_blocks - 1. Not thread-safe: one call at a time."""

    block_size: int
    num_blocks: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_model_len: int
    fingerprint: str
    kv_dtype: str

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        """Compute every chunk, write its keys and values, and return the sampled token of each (None without spec).

        A sequence's result is bit-equal whatever the other chunks are and however its tokens are cut into chunks.
        """
        ...

    def export_block(self, block_id: int) -> bytes:
        """The block's keys and values, all layers; opaque, the same size for every block."""
        ...

    def import_block(self, block_id: int, data: bytes) -> None:
        """Raises ValueError on a wrong size."""
        ...
