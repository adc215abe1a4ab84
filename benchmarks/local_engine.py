"""How fast the numpy runner computes: decode step by number of sequences, and prefill.

python benchmarks/local_engine.py [--quick] [--model DIR] [--context TOKENS]
"""

import argparse
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk, SampleSpec
from stator.messages.engine import SamplingParams

BLOCK_SIZE = 64
SEQUENCES = (1, 16, 64, 100)
PREFILL_TOKENS = 512
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
RANDOM = SamplingParams(max_tokens=1, temperature=0.8, top_p=0.95)


def seconds_per_step(runner: NumpyRunner, chunks: Sequence[Chunk], repeats: int) -> float:
    """The fastest of some runs: other processes only ever make a run slower."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        runner.step(chunks)
        best = min(best, time.perf_counter() - begin)
    return best


def decode_chunks(count: int, context: int, params: SamplingParams) -> list[Chunk]:
    num_blocks = context // BLOCK_SIZE + 1
    spec = SampleSpec(params, seed=1, position=context + 1, num_output=1)
    return [Chunk(range(i * num_blocks, (i + 1) * num_blocks), [7 + i], context, spec) for i in range(count)]


def prefill_chunks(runner: NumpyRunner, tokens: int) -> list[Chunk]:
    ids = [(i * 7919) % runner.vocab_size for i in range(tokens)]
    spec = SampleSpec(GREEDY, seed=1, position=tokens, num_output=0)
    return [Chunk(range(-(-tokens // BLOCK_SIZE)), ids, 0, spec)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats; ends within seconds")
    parser.add_argument("--model", type=Path, default=Path(str(files("stator") / "models" / "tiny-llama")))
    parser.add_argument("--context", type=int, default=300, help="tokens each sequence holds while decoding")
    args = parser.parse_args()
    begin = time.perf_counter()
    num_blocks = max(SEQUENCES) * (args.context // BLOCK_SIZE + 1)
    runner = NumpyRunner(args.model, block_size=BLOCK_SIZE, num_blocks=num_blocks)
    print(f"load: {(time.perf_counter() - begin) * 1e3:.0f} ms")
    repeats = 3 if args.quick else 30
    for name, context, params in (
        ("greedy", 16, GREEDY),
        ("greedy", args.context, GREEDY),
        ("sampled", args.context, RANDOM),
    ):
        for count in SEQUENCES:
            taken = seconds_per_step(runner, decode_chunks(count, context, params), repeats)
            rate = count / taken
            print(f"decode {name:>7} context {context:>4} x {count:>3}: {taken * 1e3:7.2f} ms {rate:7.0f} tokens/s")
    for tokens in (64, PREFILL_TOKENS):
        taken = seconds_per_step(runner, prefill_chunks(runner, tokens), max(repeats // 5, 2))
        print(f"prefill {tokens:>4} tokens: {taken * 1e3:7.2f} ms {tokens / taken:7.0f} tokens/s")


if __name__ == "__main__":
    main()
