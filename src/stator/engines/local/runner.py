"""The model step behind the local engine's scheduler.

The scheduler decides which tokens of which sequences are computed next and where their KV goes; a runner computes.
Two runners share the scheduler: the numpy one (`numpy_runner`), and that of the sim engine (`engines.sim.runner`),
which has no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stator.engines.local.grammar import GrammarCompiler, TokenGrammar
from stator.messages.engine import SamplingParams, TokenScore


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What is needed to pick the next token after a chunk. Sampling depends on (seed, position) and history alone.

    position: index of the token to be sampled among all tokens of the sequence (prompt, then output).
    num_output: output tokens so far (resumed ones included), against min_tokens.
    prompt_ids / output_ids: for penalties; None when the request has none. grammar: needs the output_ids too.
    adapter: what stands for the LoRA adapter's weights where there are none; empty without one.
    """

    params: SamplingParams
    seed: int
    position: int
    num_output: int
    prompt_ids: Sequence[int] | None = None
    output_ids: Sequence[int] | None = None
    grammar: TokenGrammar | None = None
    adapter: bytes = b""


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """Of a chunk's first tokens: next_ids are those that follow them, whose probabilities are wanted, with num_top
    alternatives each."""

    next_ids: Sequence[int]
    num_top: int


@dataclass(slots=True)
class ChunkScores:
    """next: for each of `ScoreSpec.next_ids`. sampled: of the token that was sampled, if its request wants that."""

    next: list[TokenScore]
    sampled: TokenScore | None = None


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
    score: ScoreSpec | None = None


class Runner(Protocol):
    """Blocks are numbered 0 .. num_blocks - 1. Not thread-safe: one call at a time.

    cannot: sampling fields that it does not have. grammars: what compiles them; None if "grammar" is among those.
    scores: of the last step, by the index of the chunk, as far as asked (`Chunk.score`, `SamplingParams.logprobs`);
    each step makes a new mapping.
    """

    block_size: int
    num_blocks: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_model_len: int
    fingerprint: str
    kv_dtype: str
    cannot: tuple[str, ...]
    grammars: GrammarCompiler | None
    scores: Mapping[int, ChunkScores]

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


def export_blocks(runner: Runner, block_ids: Sequence[int], num_bytes: int) -> list[bytes]:
    """Contents of leading blocks until they are num_bytes together, at least one."""
    contents: list[bytes] = []
    for block_id in block_ids:
        contents.append(runner.export_block(block_id))
        num_bytes -= len(contents[-1])
        if num_bytes <= 0:
            break
    return contents


def import_blocks(runner: Runner, blocks: Sequence[tuple[int, bytes]]) -> None:
    """blocks: (block id, content). Raises ValueError as `import_block` does."""
    for block_id, content in blocks:
        runner.import_block(block_id, content)
