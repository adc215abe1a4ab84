"""Offered load beyond what the workers can do, on virtual time: sim engines that play a large model, and the product's
Router, Processor and request plane in one process. The same seed gives the same figures on every machine.

Requests are random prompts of 200 to 1,800 tokens and outputs of 10 to 200. A request is *good* when its first token
came within TTFT_BOUND_S and it was answered in full.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from stator.core.admission import QueueLimits
from stator.core.routing import RouterMode
from stator.engines.sim.args import SimEngineArgs
from stator.errors import StatorError
from stator.runtime.context import loop_time
from stator.testing.clock import run_virtual
from stator.testing.routing_world import MODEL, Answer, RoutingWorld, routing_world, sim_engines

T = TypeVar("T")

STEP_TIMES = "405b-h200-fp8"
NUM_PLACES = 16
MAX_MODEL_LEN = 2048
BLOCK_SIZE = 64

TTFT_BOUND_S = 5.0
QUEUE_WAIT_S = 3.5
"""`max-queue-wait` of somebody who has promised TTFT_BOUND_S: the rest is for the prefill."""

VOCABULARY = range(10, 4000)


@dataclass(frozen=True)
class Request:
    """after_s: the one before it."""

    after_s: float
    prompt: list[int]
    max_tokens: int


@dataclass
class Result:
    """What became of the requests. seconds: during which they were offered."""

    seconds: float
    offered: int = 0
    answers: list[Answer] = field(default_factory=list[Answer])
    refused: Counter[str] = field(default_factory=Counter[str])
    retry_after_s: list[float] = field(default_factory=list[float])

    @property
    def num_good(self) -> int:
        return sum(answer.ttft_s <= TTFT_BOUND_S for answer in self.answers)

    @property
    def goodput(self) -> float:
        """Good requests a second."""
        return self.num_good / self.seconds

    @property
    def by_instance(self) -> Counter[str]:
        return Counter(answer.instance for answer in self.answers)

    @property
    def mean_ttft_s(self) -> float:
        return sum(answer.ttft_s for answer in self.answers) / len(self.answers)

    def ttft_s(self, quantile: float) -> float:
        ttfts = sorted(answer.ttft_s for answer in self.answers)
        return ttfts[int(quantile * (len(ttfts) - 1))] if ttfts else 0.0


def engine_args(num_places: int = NUM_PLACES) -> SimEngineArgs:
    return SimEngineArgs(
        model=f"stator:{MODEL}",
        served_model_name=MODEL,
        step_times=STEP_TIMES,
        max_num_seqs=num_places,
        max_num_batched_tokens=2048,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=num_places * MAX_MODEL_LEN // BLOCK_SIZE,
    )


def requests(rng: Random, rate: float) -> Iterator[Request]:
    """Without end; `rate` a second in the mean, at random times."""
    while True:
        prompt = rng.choices(VOCABULARY, k=rng.randint(200, 1800))
        yield Request(rng.expovariate(rate), prompt, rng.randint(10, 200))


async def ask(world: RoutingWorld, request: Request, result: Result) -> None:
    result.offered += 1
    try:
        result.answers.append(await world.ask(request.prompt, request.max_tokens))
    except StatorError as error:
        result.refused[error.code.value] += 1
        if error.retry_after_s is not None:
            result.retry_after_s.append(error.retry_after_s)


async def offer(world: RoutingWorld, rate: float, seconds: float, seed: int) -> Result:
    """An open loop: arrivals wait for no answer. Returns when the last request has ended."""
    result, end = Result(seconds), loop_time() + seconds
    async with asyncio.TaskGroup() as group:
        for request in requests(Random(seed), rate):
            if loop_time() + request.after_s >= end:
                break
            await asyncio.sleep(request.after_s)
            group.create_task(ask(world, request, result))
    return result


async def keep_full(world: RoutingWorld, num_clients: int, seconds: float, seed: int) -> Result:
    """A closed loop: each client asks again as soon as it is answered. Counted is what ends after the first quarter,
    when places no longer fill up."""
    result, begin = Result(0.75 * seconds), loop_time()
    source = requests(Random(seed), 1.0)

    async def client() -> None:
        while loop_time() < begin + seconds:
            own = Result(0.0)
            await ask(world, next(source), own)
            if begin + seconds / 4 <= loop_time() < begin + seconds:
                result.answers += own.answers

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(client())
    return result


def play(
    scene: Callable[[RoutingWorld], Awaitable[T]],
    *,
    num_workers: int = 4,
    mode: RouterMode = RouterMode.KV,
    queue_wait_s: float = QUEUE_WAIT_S,
    args: SimEngineArgs | None = None,
    seed: int = 1,
) -> T:
    """Run a scene in a deployment of its own, on a virtual clock."""

    async def run() -> T:
        limits = QueueLimits(max_wait_ms=queue_wait_s * 1e3)
        engines = sim_engines(args or engine_args())
        async with routing_world(mode, num_workers, engines, seed=seed, limits=limits, in_process=True) as world:
            return await scene(world)

    return run_virtual(run())


def capacity(num_workers: int, seconds: float = 60.0, seed: int = 1) -> float:
    """Requests a second that the workers finish when all their places are taken."""
    full = play(
        lambda world: keep_full(world, num_workers * (NUM_PLACES + 1), seconds, seed),
        num_workers=num_workers,
        queue_wait_s=1e6,
    )
    return len(full.answers) / full.seconds


def offered(
    factor: float,
    capacity_rps: float,
    num_workers: int,
    seconds: float = 60.0,
    seed: int = 2,
    *,
    queue_wait_s: float = QUEUE_WAIT_S,
) -> Result:
    """`factor` times what the workers can do, for so long."""
    return play(
        lambda world: offer(world, factor * capacity_rps, seconds, seed),
        num_workers=num_workers,
        queue_wait_s=queue_wait_s,
    )


def unloaded(num_requests: int = 20, seed: int = 3) -> float:
    """Mean seconds to first token of requests that come one by one."""

    async def scene(world: RoutingWorld) -> Result:
        result = Result(0.0)
        for request in itertools.islice(requests(Random(seed), 1.0), num_requests):
            await ask(world, request, result)
        return result

    return play(scene, num_workers=1).mean_ttft_s
