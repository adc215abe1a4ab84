"""A runner without a model: quick, deterministic, and sensitive to every mistake in block tables and transfers."""

import struct
import threading
from collections.abc import Callable, Sequence

import xxhash

from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.runner import Chunk, SampleSpec

DEFAULT_NUM_BLOCKS = 64


class FakeRunner:
    """The next token is a hash of all tokens before it, as they are found in the sequence's blocks.

    A block stores the token ids that were written to it, so a wrong block table, a block freed too early, a wrong
    transfer or a chunk out of place changes the text. Token 0 is never sampled: unwritten slots hold it, and
    computing a chunk after one is an AssertionError. Sampling with temperature adds (seed, position); penalties
    add the histories. eos and stop tokens are not sampled before `min_tokens`.

    num_steps, num_tokens: computed so far. before_step: called on the worker thread at the start of each step; may
    block it, or raise, to stage a slow or a failing engine.
    """

    def __init__(
        self,
        *,
        block_size: int = 4,
        num_blocks: int = DEFAULT_NUM_BLOCKS,
        vocab_size: int = 1000,
        max_model_len: int = 512,
        eos_token_ids: frozenset[int] = frozenset({2}),
        fingerprint: str = "fake",
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len
        self.fingerprint = fingerprint
        self.kv_dtype = "token-ids"
        self.num_steps = 0
        self.num_tokens = 0
        self.before_step: Callable[[], None] | None = None
        self._slots = [[0] * block_size for _ in range(num_blocks)]
        self._busy = threading.Lock()

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        assert self._busy.acquire(blocking=False), "two calls at a time"
        try:
            if self.before_step is not None:
                self.before_step()
            self.num_steps += 1
            for chunk in chunks:
                self._write(chunk)
            return [None if chunk.sample is None else self._sample(chunk, chunk.sample) for chunk in chunks]
        finally:
            self._busy.release()

    def export_block(self, block_id: int) -> bytes:
        assert self._busy.acquire(blocking=False), "two calls at a time"
        try:
            return struct.pack(f"<{self.block_size}I", *self._slots[block_id])
        finally:
            self._busy.release()

    def import_block(self, block_id: int, data: bytes) -> None:
        assert self._busy.acquire(blocking=False), "two calls at a time"
        try:
            if len(data) != self.block_size * 4:
                raise ValueError(f"a block has {self.block_size * 4} bytes, got {len(data)}")
            self._slots[block_id] = list(struct.unpack(f"<{self.block_size}I", data))
        finally:
            self._busy.release()

    def _write(self, chunk: Chunk) -> None:
        assert chunk.token_ids, "an empty chunk"
        self.num_tokens += len(chunk.token_ids)
        for position, token_id in enumerate(chunk.token_ids, chunk.start):
            block, slot = divmod(position, self.block_size)
            self._slots[chunk.block_ids[block]][slot] = token_id

    def _sample(self, chunk: Chunk, spec: SampleSpec) -> int:
        end = chunk.start + len(chunk.token_ids)
        history = [token for block_id in chunk.block_ids for token in self._slots[block_id]][:end]
        assert len(history) == end == spec.position, "the block table does not cover the sequence"
        assert 0 not in history, "a block holds a token that was never written"
        params = spec.params
        key: list[object] = [history]
        if params.temperature > 0.0:
            key += [spec.seed, spec.position]
        if spec.output_ids is not None and spec.prompt_ids is not None:
            key += [list(spec.prompt_ids), list(spec.output_ids)]
        token_id = 1 + xxhash.xxh3_64_intdigest(repr(key).encode()) % (self.vocab_size - 1)
        barred = self.eos_token_ids | set(params.stop_token_ids) if spec.num_output < params.min_tokens else frozenset()
        while token_id in barred:
            token_id = 1 + token_id % (self.vocab_size - 1)
        return token_id


def fake_runner(args: LocalEngineArgs) -> FakeRunner:
    """A RunnerFactory."""
    num_blocks = args.num_gpu_blocks_override or DEFAULT_NUM_BLOCKS
    return FakeRunner(block_size=args.block_size, num_blocks=num_blocks)
