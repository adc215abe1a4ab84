"""A runner without a model: quick, deterministic, and sensitive to every mistake in block tables and transfers."""

from collections.abc import Mapping, Sequence

import xxhash

from stator.engines.local.grammar import GrammarCompiler
from stator.engines.local.runner import Chunk, ChunkScores, SampleSpec
from stator.engines.sim.vocabulary import Vocabulary
from stator.messages.engine import SamplingParams
from stator.messages.tokens import BYTES_PER_TOKEN, pack

_UNWRITTEN = b"\xff" * BYTES_PER_TOKEN
"""No token: ids are below 2^24, so these bytes are nowhere else, not even across two ids."""

_HALF = 1 << 64


class SimRunner:
    """The next token is a hash of all tokens before it, as they are found in the sequence's blocks.

    A block stores the token ids that were written to it, so a wrong block table, a block freed too early, a wrong
    transfer or a chunk out of place changes the text; a slot that was never written is an AssertionError. Sampling
    with temperature adds (seed, position); penalties add the histories, a LoRA adapter its digest.
    Text does not depend on the block size.

    Tokens are taken from `vocabulary.words`. With mean_output_tokens M, each token from `min_tokens` on is eos with
    probability 1/M, by the same hash, unless the request ignores eos; without M only if eos is among the words.
    num_steps, num_tokens: computed so far.
    """

    kv_dtype = "token-ids"
    cannot: tuple[str, ...] = ("logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids", "grammar")
    grammars: GrammarCompiler | None = None
    scores: Mapping[int, ChunkScores] = {}

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        block_size: int,
        num_blocks: int,
        max_model_len: int | None = None,
        mean_output_tokens: float | None = None,
    ) -> None:
        """max_model_len: None for the vocabulary's."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocabulary.vocab_size
        self.eos_token_ids = vocabulary.eos_token_ids
        self.max_model_len = max_model_len or vocabulary.max_model_len
        self.fingerprint = vocabulary.fingerprint
        self.num_steps = 0
        self.num_tokens = 0
        self._words = vocabulary.words
        self._eos = min(vocabulary.eos_token_ids, default=None)
        self._end_below = 0 if mean_output_tokens is None else int(_HALF / mean_output_tokens)
        # Made when they are first written: a simulated cache may have a million blocks.
        self._blocks: dict[int, bytearray] = {}

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        self.num_steps += 1
        for chunk in chunks:
            self._write(chunk)
        return [None if chunk.sample is None else self._sample(chunk, chunk.sample) for chunk in chunks]

    def export_block(self, block_id: int) -> bytes:
        return bytes(self._block(block_id))

    def import_block(self, block_id: int, data: bytes) -> None:
        if len(data) != self.block_size * BYTES_PER_TOKEN:
            raise ValueError(f"a block has {self.block_size * BYTES_PER_TOKEN} bytes, got {len(data)}")
        self._block(block_id)[:] = data

    def _block(self, block_id: int) -> bytearray:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"there is no block {block_id}; there are {self.num_blocks}")
        block = self._blocks.get(block_id)
        if block is None:
            block = self._blocks[block_id] = bytearray(_UNWRITTEN * self.block_size)
        return block

    def _write(self, chunk: Chunk) -> None:
        assert chunk.token_ids, "an empty chunk"
        self.num_tokens += len(chunk.token_ids)
        data = memoryview(pack(chunk.token_ids))
        index, slot = divmod(chunk.start, self.block_size)
        at = slot * BYTES_PER_TOKEN
        block_bytes = self.block_size * BYTES_PER_TOKEN
        while data:
            part = data[: block_bytes - at]
            self._block(chunk.block_ids[index])[at : at + len(part)] = part
            data, index, at = data[len(part) :], index + 1, 0

    def _history(self, chunk: Chunk, end: int) -> bytes:
        num_blocks = -(-end // self.block_size)
        try:
            blocks = b"".join(map(self._blocks.__getitem__, chunk.block_ids[:num_blocks]))
        except KeyError as error:
            raise AssertionError(f"block {error} was never written") from error
        history = blocks[: end * BYTES_PER_TOKEN]
        assert len(history) == end * BYTES_PER_TOKEN, "the block table does not cover the sequence"
        assert _UNWRITTEN not in history, "a block holds a token that was never written"
        return history

    def _sample(self, chunk: Chunk, spec: SampleSpec) -> int:
        end = chunk.start + len(chunk.token_ids)
        assert end == spec.position, "the chunk does not end where the next token belongs"
        params = spec.params
        key = xxhash.xxh3_128(self._history(chunk, end))
        if params.temperature > 0.0:
            key.update(b"seed %d %d" % (spec.seed, spec.position))
        if spec.output_ids is not None and spec.prompt_ids is not None:
            key.update(b"histories " + pack(spec.prompt_ids) + b"," + pack(spec.output_ids))
        if spec.adapter:
            key.update(b"adapter " + spec.adapter)
        end_draw, word_draw = divmod(key.intdigest(), _HALF)
        may_end = spec.num_output >= params.min_tokens
        if end_draw < self._end_below and may_end and not params.ignore_eos and self._eos is not None:
            return self._eos
        return self._word(word_draw, None if may_end else params)

    def _word(self, draw: int, ends: SamplingParams | None) -> int:
        """ends: the request, while neither eos nor its stop tokens may come."""
        words, index = self._words, draw % len(self._words)
        if ends is None:
            return words[index]
        barred = self.eos_token_ids.union(ends.stop_token_ids)
        rotated = (words[(index + n) % len(words)] for n in range(len(words)))
        return next((word for word in rotated if word not in barred), words[index])
