"""Measures the step-time constants of the local engine's models, for src/stator/config/step_times.toml.

    prefill of N new tokens behind a cached prefix of P:   a + b N + c N (P + N/2)
    one decode step of B streams that hold KV tokens:      d0 + d1 B + d2 KV

python benchmarks/step_time.py [--quick] [--model stator:tiny-llama]

A prompt is computed in chunks of --chunk tokens, as the engine does by default; the fit minimises relative errors.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np

from stator.config.models import resolve_model
from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk, SampleSpec
from stator.messages.engine import SamplingParams

BLOCK_SIZE = 64
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def milliseconds(runner: NumpyRunner, steps: Sequence[Sequence[Chunk]], repeats: int) -> float:
    """CPU time of the steps together; the best of some runs, since other processes only ever make one slower."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        for chunks in steps:
            runner.step(chunks)
        best = min(best, time.thread_time() - begin)
    return best * 1e3


def prefill_steps(runner: NumpyRunner, new: int, prefix: int, chunk: int) -> list[list[Chunk]]:
    ids = [(i * 7919) % runner.vocab_size for i in range(prefix + new)]
    blocks = range(-(-(prefix + new) // BLOCK_SIZE))
    spec = SampleSpec(GREEDY, seed=1, position=prefix + new, num_output=0)
    starts = range(prefix, prefix + new, chunk)
    ends = [min(start + chunk, prefix + new) for start in starts]
    return [
        [Chunk(blocks, ids[start:end], start, spec if end == prefix + new else None)]
        for start, end in zip(starts, ends, strict=True)
    ]


def decode_step(count: int, context: int) -> list[Chunk]:
    per_stream = context // BLOCK_SIZE + 1
    spec = SampleSpec(GREEDY, seed=1, position=context + 1, num_output=1)
    return [Chunk(range(i * per_stream, (i + 1) * per_stream), [7 + i], context, spec) for i in range(count)]


def fit(rows: list[tuple[float, float, float]], times: list[float]) -> tuple[list[float], float, float]:
    """Least squares on relative errors. Returns coefficients, mean and largest relative error."""
    x, y = np.array(rows), np.array(times)
    coefficients, *_ = np.linalg.lstsq(x / y[:, None], np.ones_like(y), rcond=None)
    errors = np.abs(x @ coefficients / y - 1)
    return [float(c) for c in coefficients], float(errors.mean()), float(errors.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats; ends within seconds")
    parser.add_argument("--model", default="stator:tiny-llama")
    parser.add_argument("--chunk", type=int, default=512, help="tokens computed in one step")
    args = parser.parse_args()
    runner = NumpyRunner(resolve_model(args.model), block_size=BLOCK_SIZE, num_blocks=32 * 17)
    repeats = 2 if args.quick else 7
    rows: list[tuple[float, float, float]] = []
    times: list[float] = []
    for prefix in (0, 512, 1024):
        for new in (16, 64, 256, 512, 1024):
            rows.append((1, new, new * (prefix + new / 2)))
            times.append(milliseconds(runner, prefill_steps(runner, new, prefix, args.chunk), repeats))
            print(f"prefill {new:>5} tokens behind {prefix:>5}: {times[-1]:8.2f} ms")
    (a, b, c), mean, worst = fit(rows, times)
    rows, times = [], []
    for count in (1, 4, 16, 32):
        for context in (64, 256, 1000):
            rows.append((1, count, count * context))
            times.append(milliseconds(runner, [decode_step(count, context)], repeats * 2))
            print(f"decode {count:>3} streams of {context:>5} tokens: {times[-1]:8.2f} ms")
    (d0, d1, d2), decode_mean, decode_worst = fit(rows, times)
    print(f"a = {a:.3g}\nb = {b:.3g}\nc = {c:.3g}\nd0 = {d0:.3g}\nd1 = {d1:.3g}\nd2 = {d2:.3g}")
    print(f"error mean (max): prefill {mean:.1%} ({worst:.1%}), decode {decode_mean:.1%} ({decode_worst:.1%})")


if __name__ == "__main__":
    main()
