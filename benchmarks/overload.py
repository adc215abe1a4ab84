"""Goodput under overload: simulated workers behind the product's Router and Processor, offered up to four times what
they can do.

python benchmarks/overload.py [--quick] [--workers 4] [--seconds 60] [--seed 1]

Workers are sim engines that play Llama 3.1 405B on 8 H200 with 16 places each, on a virtual clock: the same seed gives
the same figures on every machine. Load and bounds are `stator.testing.overload`'s: a request is good when its first
token came within 5 s and it was answered in full; `max-queue-wait` is 3.5 s. Capacity is what the workers finish when
all places are kept taken. The last line lets requests wait for ever, as if nobody were refused.
"""

import argparse

from stator.testing import overload

FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0)
QUICK_FACTORS = (1.0, 3.0)


def show(name: str, result: overload.Result, capacity: float, best: float) -> None:
    waits = result.retry_after_s
    print(
        f"{name:>9} {result.offered:>8} {len(result.answers):>9} {result.goodput / capacity:>9.2f} "
        f"{result.goodput / best:>8.0%} {result.ttft_s(0.5):>6.2f} {result.ttft_s(0.99):>6.2f} "
        f"{sum(waits) / len(waits) if waits else 0.0:>12.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two workers and a short time, to see that it runs")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    num_workers, seconds = (2, 8.0) if args.quick else (args.workers, args.seconds)
    capacity = overload.capacity(num_workers, seconds, args.seed)
    print(f"capacity: {capacity:.2f} requests/s of {num_workers} workers; unloaded TTFT {overload.unloaded():.2f} s")
    print(
        f"{'offered':>9} {'requests':>8} {'answered':>9} {'goodput':>9} {'of peak':>8} {'p50':>6} {'p99':>6} "
        f"{'retry-after':>12}\n{'x':>9} {'':>8} {'':>9} {'x':>9} {'so far':>8} {'TTFT s':>6} {'s':>6} {'mean s':>12}"
    )
    best = 0.0
    for factor in QUICK_FACTORS if args.quick else FACTORS:
        result = overload.offered(factor, capacity, num_workers, seconds, args.seed + 1)
        best = max(best, result.goodput)
        show(f"{factor:g}", result, capacity, best)
    endless = overload.offered(3.0, capacity, num_workers, seconds, args.seed + 1, queue_wait_s=1e6)
    show("3, no 429", endless, capacity, best)


if __name__ == "__main__":
    main()
