"""KV-aware routing against round robin: four workers, one Router, the product's own request plane, one process.

python benchmarks/kv_routing_workload.py [--quick] [--trace FILE.jsonl.gz] [--minutes 10] [--engine timed|numpy]

Workloads: `generated` (documents that several questions are asked about, sessions that grow) and, with --trace, the
first minutes of a Mooncake trace, 1/64 of its lengths: each 512-token block becomes one block of 8 tokens, a function
of its id, so that what requests share is what they shared. Arrivals keep the trace's spacing, --speed times faster.

`timed` is the sim engine: the measured step times of the bundled model, asleep, so that four workers do not compete for
this machine's cores; `numpy` computes the model.
"""

import argparse
import asyncio
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec

from stator.core.routing import RouterMode
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.load import numpy_runner
from stator.engines.sim.args import SimEngineArgs
from stator.runtime.loop import run_loop
from stator.testing.routing_world import (
    MODEL,
    Answer,
    EngineFactory,
    Outcome,
    local_engines,
    outcome,
    routing_world,
    sim_engines,
)

NUM_WORKERS = 4
TRACE_BLOCK = 8
TRACE_SCALE = 512 // TRACE_BLOCK
MAX_MODEL_LEN = 2048
VOCABULARY = range(10, 4000)


@dataclass(frozen=True)
class Request:
    """at: seconds from the start."""

    at: float
    prompt: list[int]
    max_tokens: int


def block_tokens(block_id: int, size: int) -> list[int]:
    return Random(block_id).choices(VOCABULARY, k=size)


def generated(count: int, rate: float, seed: int = 1) -> Iterator[Request]:
    """Half are questions about one of 24 documents, half are turns of 24 sessions; all behind one system prompt."""
    rng = Random(seed)
    system = block_tokens(-1, 64)
    documents = [rng.choices(VOCABULARY, k=rng.randint(300, 1000)) for _ in range(24)]
    sessions: list[list[int]] = [[] for _ in range(24)]
    at = 0.0
    for _ in range(count):
        at += rng.expovariate(rate)
        turn = rng.choices(VOCABULARY, k=rng.randint(20, 60))
        if rng.random() < 0.5:
            yield Request(at, system + rng.choice(documents) + turn, rng.randint(4, 16))
            continue
        number = rng.randrange(len(sessions))
        history = sessions[number] + turn
        sessions[number] = history if len(history) < 1200 else []
        yield Request(at, system + history, rng.randint(4, 16))


def traced(path: Path, minutes: float, speed: float, seed: int = 1) -> Iterator[Request]:
    """Arrivals of the trace stand at multiples of 3 s; they are spread over those."""
    rng = Random(seed)
    requests: list[Request] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["timestamp"] >= minutes * 60_000:
                break
            blocks: list[int] = row["hash_ids"]
            length = max(1, min(row["input_length"] // TRACE_SCALE, MAX_MODEL_LEN - 64))
            prompt = [token for block in blocks for token in block_tokens(block, TRACE_BLOCK)][:length]
            at = (row["timestamp"] / 1e3 + 3 * rng.random()) / speed
            requests.append(Request(at, prompt, max(1, min(row["output_length"] // TRACE_SCALE, 32))))
    yield from sorted(requests, key=lambda r: r.at)


def engine_args(block_size: int, num_blocks: int) -> LocalEngineArgs:
    return LocalEngineArgs(
        model=f"stator:{MODEL}",
        served_model_name=MODEL,
        block_size=block_size,
        num_gpu_blocks_override=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=32,
    )


def engines(kind: str, args: LocalEngineArgs) -> EngineFactory:
    """kind: as --engine."""
    if kind == "numpy":
        return local_engines(args, numpy_runner)
    return sim_engines(msgspec.convert(msgspec.structs.asdict(args), SimEngineArgs))


async def play(mode: RouterMode, requests: Iterable[Request], args: LocalEngineArgs, engine: str) -> Outcome:
    answers: list[Answer] = []
    async with routing_world(mode, NUM_WORKERS, engines(engine, args)) as world:
        begin = asyncio.get_running_loop().time()

        async def one(request: Request) -> None:
            answers.append(await world.ask(request.prompt, request.max_tokens))

        async with asyncio.TaskGroup() as group:
            for request in requests:
                left = begin + request.at - asyncio.get_running_loop().time()
                if left > 0:
                    await asyncio.sleep(left)
                group.create_task(one(request))
        return outcome(world, answers)


HEAD = (
    f"{'workload':>10} {'mode':>13} {'requests':>8} {'hit rate':>8} {'computed':>9} {'TTFT ms':>8} {'p90 ms':>8} "
    f"{'skew':>5} {'(work)':>6} {'exact':>7}"
)


def show(workload: str, mode: RouterMode, found: Outcome) -> None:
    exact = f"{found.exact_share:7.2%}" if found.compared else "      -"
    print(
        f"{workload:>10} {mode.value:>13} {found.num_requests:>8} {found.hit_rate:>8.1%} {found.computed_tokens:>9} "
        f"{found.mean_ttft_s * 1e3:>8.1f} {found.p90_ttft_s * 1e3:>8.1f} {found.request_skew:>5.2f} "
        f"{found.work_skew:>6.2f} {exact}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, to see that it runs")
    parser.add_argument("--engine", choices=("timed", "numpy"), default="timed")
    parser.add_argument("--modes", nargs="+", default=["round-robin", "least-loaded", "kv"])
    parser.add_argument("--requests", type=int, default=1500, help="of the generated workload")
    parser.add_argument("--rate", type=float, default=45.0, help="requests a second of the generated workload")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--speed", type=float, default=16.0)
    args = parser.parse_args()
    count, minutes = (80, 0.5) if args.quick else (args.requests, args.minutes)
    print(HEAD)
    for mode in map(RouterMode, args.modes):
        requests = generated(count, args.rate)
        show("generated", mode, run_loop(play(mode, requests, engine_args(16, 500), args.engine)))
    for mode in map(RouterMode, args.modes) if args.trace else ():
        requests = traced(args.trace, minutes, args.speed)
        show("trace", mode, run_loop(play(mode, requests, engine_args(TRACE_BLOCK, 4000), args.engine)))


if __name__ == "__main__":
    main()
