"""One seed, from an empty network to a verdict."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from stator.testing.sim.checks import LOST_WITHIN_S, MAX_REQUEST_S, QUIET_S, Checks
from stator.testing.sim.client import ask
from stator.testing.sim.cluster import HTTP_PORT, Cluster, Layout
from stator.testing.sim.engine import make_runner, sim_engines
from stator.testing.sim.faults import ALL_KINDS, Fault, Injector, Kind, Schedule
from stator.testing.sim.loop import SimLoop, current_node, run_sim, until
from stator.testing.sim.network import Network, Weather
from stator.testing.sim.trace import Trace, TraceHandler
from stator.testing.sim.workload import BLOCK_SIZE, NUM_BLOCKS, Request, Workload

BACK_WITHIN_S = 30.0
"""Of the last fault's end, every process must be ready again."""


@dataclass(frozen=True, slots=True)
class Settings:
    """kinds: of faults that may be drawn. layout: None for a drawn one. router_faults: see Schedule.
    over_s: in which requests come and faults begin; None for a drawn time, now and then longer than a lease."""

    kinds: Sequence[Kind] = ALL_KINDS
    max_faults: int = 4
    num_requests: int = 14
    over_s: float | None = None
    layout: Layout | None = None
    router_faults: bool = True


@dataclass(slots=True)
class Result:
    seed: int
    layout: Layout
    faults: list[Fault]
    requests: list[Request] = field(default_factory=list[Request])
    violations: list[str] = field(default_factory=list[str])
    trace: list[str] = field(default_factory=list[str])
    digest: str = ""
    virtual_s: float = 0.0
    num_handles: int = 0
    num_claims: int = 0

    def report(self) -> str:
        """For people: what went wrong, what had been done, and how to see it again."""
        lines = [f"seed {self.seed}: {len(self.violations)} violations", *(f"  {v}" for v in self.violations)]
        lines += [f"  layout: {self.layout}", "  faults:" if self.faults else "  no faults"]
        lines += [f"    {fault}" for fault in self.faults]
        lines.append(f"  replay: python -m stator.testing.sim --seed {self.seed} --trace")
        return "\n".join(lines)


def draw_layout(rng: Random) -> Layout:
    num_frontends = rng.choice((1, 1, 2))
    return Layout(
        num_frontends=num_frontends,
        num_decode=rng.choice((1, 2, 2, 3)),
        num_prefill=rng.choice((0, 1, 1, 2)),
        router_apart=num_frontends > 1 or rng.random() < 0.3,
        remote_from_tokens=rng.choice((16, 48, 96)),
        num_blocks=rng.choice((NUM_BLOCKS, NUM_BLOCKS, 64)),
        max_num_seqs=rng.choice((2, 6)),
    )


def draw_weather(rng: Random) -> Weather:
    return Weather(
        delay_s=rng.choice((0.000_1, 0.000_3, 0.005)),
        spike=rng.choice((0.0, 0.002, 0.02)),
        window_bytes=rng.choice((4 * 1024, 64 * 1024, 256 * 1024)),
    )


def run_seed(seed: int, settings: Settings | None = None) -> Result:
    """A pure function of its arguments and the program's text."""
    settings = settings or Settings()
    rng = Random(seed)
    layout = draw_layout(rng)
    layout = settings.layout or layout
    over_s = settings.over_s or rng.choice((5.0, 5.0, 5.0, 16.0))
    schedule = Schedule(
        Random(rng.getrandbits(64)),
        layout,
        kinds=settings.kinds,
        max_faults=settings.max_faults,
        until_s=over_s,
        router=settings.router_faults,
    )
    result = Result(seed, layout, schedule.faults)
    with sim_engines():
        run_sim(lambda loop: _run(loop, rng, settings.num_requests, over_s, schedule, result))
    return result


async def _run(
    loop: SimLoop, rng: Random, num_requests: int, over_s: float, schedule: Schedule, result: Result
) -> None:
    trace = Trace(loop.time)
    handler = TraceHandler(trace, _who)
    loggers = _Loggers(handler)
    network = Network(loop, Random(rng.getrandbits(64)), trace, draw_weather(rng))
    cluster = Cluster(loop, Random(rng.getrandbits(64)), network, trace, result.layout)
    workload = Workload(
        Random(rng.getrandbits(64)),
        lambda: make_runner(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS),
        num_requests=num_requests,
        over_s=over_s,
    )
    injector = Injector(cluster, Random(rng.getrandbits(64)))
    checks = Checks(cluster, injector, workload.requests)
    result.requests = workload.requests
    with loggers:
        try:
            await cluster.start()
            await _course(cluster, workload.requests, schedule, injector, checks)
        except TimeoutError as error:
            checks.violated(f"the deployment did not start: {error}")
        finally:
            await cluster.close()
    result.violations = checks.violations
    result.trace, result.digest = trace.lines, trace.digest()
    result.virtual_s, result.num_handles = loop.time(), loop.num_handles
    result.num_claims = checks.num_checked_claims


async def _course(
    cluster: Cluster, requests: Sequence[Request], schedule: Schedule, injector: Injector, checks: Checks
) -> None:
    loop = cluster.loop
    watching = loop.create_task(checks.watch())
    faults = [loop.create_task(injector.run(fault)) for fault in schedule.faults]
    clients = [cluster.client_node.spawn(_client(cluster, request, index)) for index, request in enumerate(requests)]
    try:
        await asyncio.wait(clients, timeout=MAX_REQUEST_S + 60.0)
        await _all(faults)
        cluster.network.heal_all()
        await until(lambda: all(p.ready for p in cluster.processes), BACK_WITHIN_S)
        # What the dead held ends with their leases, and who stood still notices a silent peer that much later.
        lost_by = injector.quiet_at + LOST_WITHIN_S if schedule.faults else 0.0
        await asyncio.sleep(max(QUIET_S, lost_by - loop.time()))
        checks.check_answers()
        checks.check_at_rest()
    finally:
        for task in (watching, *faults, *clients):
            task.cancel()
        await asyncio.gather(watching, *faults, return_exceptions=True)


async def _all(tasks: Sequence["asyncio.Task[None]"]) -> None:
    for task in tasks:
        await task


async def _client(cluster: Cluster, request: Request, index: int) -> None:
    await asyncio.sleep(request.at)
    frontends = cluster.of_kind("Frontend")
    address = (frontends[index % len(frontends)].host, HTTP_PORT)
    headers = {"content-type": "application/json", "x-request-id": request.name}
    if request.timeout_s is not None:
        headers["x-request-timeout-s"] = f"{request.timeout_s:g}"
    cluster.trace.note("client", f"{request.name} {request.path} {request.summary}")
    answer = request.answer
    await ask(address, request.path, request.encoded, headers, request.manners, answer)
    how = "left" if answer.left else answer.error or answer.lost or answer.finish_reason
    cluster.trace.note("client", f"{request.name} ended: {answer.status} {how}, {len(answer.text)} characters")
    cluster.trace.mix(answer.text, repr(answer.usage))


def _who() -> str:
    node = current_node()
    return "world" if node is None else node.name


class _Loggers:
    """The product's warnings go into the trace, and nowhere else."""

    def __init__(self, handler: logging.Handler) -> None:
        self._handler = handler
        self._logger = logging.getLogger("stator")

    def __enter__(self) -> None:
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.setLevel(logging.WARNING)
        self._logger.propagate = False
        self._logger.addHandler(self._handler)

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.level, self._logger.propagate = self._before
