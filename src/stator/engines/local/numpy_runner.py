"""The local engine's model step in numpy (`runner.Runner`)."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stator.engines.local.attention import KvCache, Span
from stator.engines.local.forward import Decoder, Step
from stator.engines.local.grammar import GrammarCompiler
from stator.engines.local.model_config import ModelConfig, load_model_config
from stator.engines.local.pooling import PART_TOKENS, MeanPool
from stator.engines.local.runner import Chunk, ChunkScores
from stator.engines.local.sampler import sample_tokens
from stator.engines.local.scores import token_score
from stator.engines.local.tiles import use_one_blas_thread
from stator.engines.local.weights import Weights
from stator.errors import ConfigError

F32 = NDArray[np.float32]

MAX_SCORED_ROWS = 32
"""A vocabulary's logits are large: those of a long prompt are not held all at once."""


class NumpyRunner:
    """A Llama or DeciLM model of a Hugging Face directory, with its own KV blocks, on one CPU core.

    Raises ConfigError, naming file and field or tensor, when the model cannot be loaded. Sets the process's BLAS to
    one thread. Not thread-safe: one call at a time.
    """

    kv_dtype = "float32"
    cannot: tuple[str, ...] = ()

    def __init__(self, model_dir: Path | str, *, block_size: int, num_blocks: int) -> None:
        if block_size < 1 or num_blocks < 1:
            raise ConfigError(f"block size and number of blocks must be positive, found {block_size} and {num_blocks}")
        use_one_blas_thread()
        path = Path(model_dir)
        config = load_model_config(path)
        weights = Weights(path)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = config.vocab_size
        self.eos_token_ids = config.eos_token_ids
        self.max_model_len = config.max_position
        self._decoder = Decoder(weights, config, block_size)
        self._caches = self._decoder.new_caches(num_blocks)
        self.fingerprint = _fingerprint(config, weights)
        self.grammars: GrammarCompiler | None = GrammarCompiler(
            path / "tokenizer.json", config.vocab_size, config.eos_token_ids
        )
        self.scores: Mapping[int, ChunkScores] = {}

    @property
    def block_bytes(self) -> int:
        """Size of an exported block, and memory per block."""
        return sum(array[0].nbytes for array in self._arrays())

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        """As `Runner.step`. Raises ValueError for a chunk that does not fit its blocks, the context or the vocabulary;
        nothing has been written then."""
        sampled = [(index, chunk.sample) for index, chunk in enumerate(chunks) if chunk.sample is not None]
        hidden = self._compute(chunks)
        result: list[int | None] = [None] * len(chunks)
        scores = self.scores = self._score_prompts(chunks, hidden)
        if sampled:
            ends = np.cumsum([len(chunk.token_ids) for chunk in chunks]) - 1
            logits = self._decoder.logits(hidden[ends[[index for index, _ in sampled]]])
            wanted = [row for row, (_, spec) in enumerate(sampled) if spec.params.logprobs is not None]
            # Sampling changes the logits in place.
            unchanged = {row: logits[row].copy() for row in wanted}
            tokens = sample_tokens(logits, [spec for _, spec in sampled], self.eos_token_ids)
            for (index, _), token in zip(sampled, tokens, strict=True):
                result[index] = token
            for row, own in unchanged.items():
                index, spec = sampled[row]
                score = token_score(own, tokens[row], spec.params.logprobs or 0)
                scores.setdefault(index, ChunkScores([])).sampled = score
        return result

    def _score_prompts(self, chunks: Sequence[Chunk], hidden: F32) -> dict[int, ChunkScores]:
        scores: dict[int, ChunkScores] = {}
        begin = 0
        for index, chunk in enumerate(chunks):
            if chunk.score is not None:
                made = scores[index] = ChunkScores([])
                next_ids, num_top = chunk.score.next_ids, chunk.score.num_top
                for first in range(0, len(next_ids), MAX_SCORED_ROWS):
                    some = next_ids[first : first + MAX_SCORED_ROWS]
                    logits = self._decoder.logits(hidden[begin + first : begin + first + len(some)])
                    made.next += [token_score(row, token, num_top) for row, token in zip(logits, some, strict=True)]
            begin += len(chunk.token_ids)
        return scores

    def logits(self, chunks: Sequence[Chunk]) -> F32:
        """Compute the chunks as `step` does and return the logits after every token, [all tokens, vocab_size]; the
        same bits that `step` samples from."""
        return self._decoder.logits(self._compute(chunks))

    def embed(self, token_ids: Sequence[int]) -> Iterator[bytes | None]:
        """As `pooling.EmbeddingRunner.embed`."""
        pool = MeanPool(self._decoder.config.hidden_size)
        num_blocks = -(-len(token_ids) // self.block_size)
        caches, table = self._decoder.new_caches(num_blocks), range(num_blocks)
        for start in range(0, len(token_ids), PART_TOKENS):
            if start:
                yield None
            part = Chunk(table, token_ids[start : start + PART_TOKENS], start, None)
            hidden = self._decoder.hidden_states(self._lay_out([part]), caches)
            pool.add(self._decoder.final_states(hidden))
        yield pool.vector()

    def export_block(self, block_id: int) -> bytes:
        self._check_block(block_id)
        return b"".join(array[block_id].tobytes() for array in self._arrays())

    def import_block(self, block_id: int, data: bytes) -> None:
        self._check_block(block_id)
        if len(data) != self.block_bytes:
            raise ValueError(f"a KV block of this model has {self.block_bytes} bytes, got {len(data)}")
        offset = 0
        for array in self._arrays():
            block = array[block_id]
            block[...] = np.frombuffer(data, np.float32, count=block.size, offset=offset).reshape(block.shape)
            offset += block.nbytes

    def _compute(self, chunks: Sequence[Chunk]) -> F32:
        if not chunks:
            return np.zeros((0, self._decoder.config.hidden_size), np.float32)
        for chunk in chunks:
            self._check_chunk(chunk)
        return self._decoder.hidden_states(self._lay_out(chunks), self._caches)

    def _lay_out(self, chunks: Sequence[Chunk]) -> Step:
        spans: list[Span] = []
        blocks: list[NDArray[np.int64]] = []
        fresh: list[int] = []
        row = 0
        for chunk in chunks:
            end = chunk.start + len(chunk.token_ids)
            table = np.array(chunk.block_ids[: -(-end // self.block_size)], np.int64)
            spans.append(Span(row, chunk.start, len(chunk.token_ids), table))
            blocks.append(table[np.arange(chunk.start, end) // self.block_size])
            if end % self.block_size and chunk.start <= end - end % self.block_size:
                fresh.append(int(table[-1]))
            row += len(chunk.token_ids)
        positions = np.concatenate([np.arange(s.start, s.start + s.num_tokens) for s in spans])
        return Step(
            tokens=np.concatenate([np.array(chunk.token_ids, np.int64) for chunk in chunks]),
            positions=positions,
            blocks=np.concatenate(blocks),
            offsets=positions % self.block_size,
            fresh_blocks=np.array(fresh, np.int64),
            spans=spans,
        )

    def _check_chunk(self, chunk: Chunk) -> None:
        end = chunk.start + len(chunk.token_ids)
        if not len(chunk.token_ids) or chunk.start < 0:
            raise ValueError("a chunk needs at least one token and a start of at least 0")
        if end > self.max_model_len:
            raise ValueError(f"{end} tokens do not fit the model's context of {self.max_model_len}")
        needed = -(-end // self.block_size)
        if len(chunk.block_ids) < needed:
            raise ValueError(f"{end} tokens need {needed} blocks, the table has {len(chunk.block_ids)}")
        if not 0 <= min(chunk.block_ids[:needed]) <= max(chunk.block_ids[:needed]) < self.num_blocks:
            raise ValueError(f"block ids must be 0 to {self.num_blocks - 1}")
        if not 0 <= min(chunk.token_ids) <= max(chunk.token_ids) < self.vocab_size:
            raise ValueError(f"token ids must be 0 to {self.vocab_size - 1}")

    def _check_block(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block {block_id} does not exist; blocks are 0 to {self.num_blocks - 1}")

    def _arrays(self) -> list[F32]:
        caches: list[KvCache] = [cache for cache in self._caches if cache is not None]
        return [array for cache in caches for array in (cache.keys, cache.values)]


def _fingerprint(config: ModelConfig, weights: Weights) -> str:
    """Equal for runners whose KV blocks mean the same, wherever the model lies and however its files are cut."""
    identity = f"{replace(config, eos_token_ids=frozenset())!r} {weights.digest(weights.names)}"
    return hashlib.sha256(identity.encode()).hexdigest()[:32]
