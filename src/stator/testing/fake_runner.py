"""The sim engine's runner with every token id, whose calls a test may stage: for engines with a worker thread."""

import threading
from collections.abc import Callable, Sequence

from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.runner import Chunk
from stator.engines.sim.runner import SimRunner
from stator.engines.sim.vocabulary import Vocabulary

DEFAULT_NUM_BLOCKS = 64


def all_ids(vocab_size: int, eos_token_ids: frozenset[int], max_model_len: int) -> Vocabulary:
    """Every id but 0, eos included: outputs end by themselves now and then."""
    return Vocabulary(tuple(range(1, vocab_size)), vocab_size, eos_token_ids, max_model_len)


class FakeRunner(SimRunner):
    """before_step: called on the worker thread at the start of each step; may block it, or raise, to stage a slow or a
    failing engine. Two calls at a time are an AssertionError."""

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
        vocabulary = all_ids(vocab_size, eos_token_ids, max_model_len)
        super().__init__(vocabulary, block_size=block_size, num_blocks=num_blocks)
        self.fingerprint = fingerprint
        self.before_step: Callable[[], None] | None = None
        self._busy = threading.Lock()

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        assert self._busy.acquire(blocking=False), "two calls at a time"
        try:
            if self.before_step is not None:
                self.before_step()
            return super().step(chunks)
        finally:
            self._busy.release()

    def export_block(self, block_id: int) -> bytes:
        assert self._busy.acquire(blocking=False), "two calls at a time"
        try:
            return super().export_block(block_id)
        finally:
            self._busy.release()

    def import_block(self, block_id: int, data: bytes) -> None:
        assert self._busy.acquire(blocking=False), "two calls at a time"
        try:
            super().import_block(block_id, data)
        finally:
            self._busy.release()


def fake_runner(args: LocalEngineArgs) -> FakeRunner:
    """A RunnerFactory."""
    num_blocks = args.num_gpu_blocks_override or DEFAULT_NUM_BLOCKS
    return FakeRunner(block_size=args.block_size, num_blocks=num_blocks)
