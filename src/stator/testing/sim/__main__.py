"""`python -m stator.testing.sim`: run seeds, or one with its trace."""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

from stator.testing.sim.faults import ALL_KINDS, Kind
from stator.testing.sim.run import Result, Settings, run_seed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stator.testing.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--first", type=int, default=1, help="the first of --seeds (default: 1)")
    parser.add_argument("--seeds", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--kinds", help=f"faults to draw from, by commas, or `none`: {', '.join(ALL_KINDS)}")
    parser.add_argument("--trace", action="store_true", help="print what happened, line by line")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    settings = Settings()
    if options.kinds:
        names = [] if options.kinds == "none" else options.kinds.split(",")
        settings = replace(settings, kinds=tuple(Kind(name) for name in names))
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    started = time.perf_counter()
    num_failed = 0
    run = partial(run_seed, settings=settings)
    with ProcessPoolExecutor(options.jobs) as pool:
        results = pool.map(run, seeds, chunksize=4) if options.jobs > 1 else map(run, seeds)
        for result in results:
            num_failed += bool(result.violations)
            _show(result, trace=options.trace)
    seconds = time.perf_counter() - started
    _say(f"{len(seeds)} seeds, {num_failed} failed, {seconds:.1f} s")
    return 1 if num_failed else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _show(result: Result, *, trace: bool) -> None:
    if trace:
        _say("\n".join(result.trace))
        _say(f"digest {result.digest}, {result.virtual_s:.3f} virtual seconds, {result.num_handles} callbacks")
    if result.violations:
        _say(result.report())


if __name__ == "__main__":
    sys.exit(main())
