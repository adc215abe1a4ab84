"""What goes wrong in a run: drawn from the seed, said in one line each, carried out on the cluster.

Each fault heals by itself after its duration, so that a run can end in peace. What was disturbed, from when to when, is
kept: it decides which failures of requests are justified.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any

from stator.testing.sim.cluster import CLIENTS, HEAD, Cluster, Layout, SimProcess
from stator.testing.sim.loop import NodeState, until


class Kind(StrEnum):
    KILL = "kill"
    PAUSE = "pause"
    CUT = "cut"
    RESET = "reset"
    SILENCE = "silence"
    SLOW_ENGINE = "slow-engine"
    SLOW_NETWORK = "slow-network"
    STUTTER = "stutter"
    DRAIN = "drain"
    HUB_RESTART = "hub-restart"
    HUB_PAUSE = "hub-pause"
    CRASH = "engine-crash"
    HANG = "engine-hang"
    JOIN = "join"
    LOSE_HOST = "lose-host"


ALL_KINDS = tuple(Kind)

CRASHED_ENDS_WITHIN_S = 30.0
"""A process whose engine crashed: it leaves, which a hub that does not answer delays. An engine without work does not
crash before it has some."""


@dataclass(frozen=True, slots=True)
class Fault:
    """at: seconds after the cluster is up. target: a process's label. duration_s: 0 for what is over at once.

    other: the host that a cut is towards; empty for all hosts.
    """

    at: float
    kind: Kind
    target: str = ""
    duration_s: float = 0.0
    other: str = ""

    def __str__(self) -> str:
        lasting = f" for {self.duration_s:.3f} s" if self.duration_s else ""
        return f"{self.at:8.3f} s: {self.kind} {self.target}{f' from {self.other}' if self.other else ''}{lasting}"


@dataclass(slots=True)
class Disturbance:
    """A process that a fault kept from its work, from `start` on the loop's clock; end None: it is still disturbed."""

    process: SimProcess
    kind: Kind
    start: float
    end: float | None = None


class Schedule:
    """Faults of one run, in order of time. rng: drawn from here only. router: whether a router that has a process of
    its own is disturbed as well."""

    def __init__(
        self, rng: Random, layout: Layout, *, kinds: Sequence[Kind], max_faults: int, until_s: float, router: bool
    ) -> None:
        self._rng = rng
        self._decode = [f"decode-{n}" for n in range(1, layout.num_decode + 1)]
        self._prefill = [f"prefill-{n}" for n in range(1, layout.num_prefill + 1)]
        self._front = [f"frontend-{n}" for n in range(1, layout.num_frontends + 1)]
        self._router = ["router"] if layout.router_apart and router else []
        num = rng.randint(0, max_faults) if kinds else 0
        self.faults = sorted((self._fault(rng.choice(kinds), until_s) for _ in range(num)), key=lambda f: f.at)

    def _fault(self, kind: Kind, until_s: float) -> Fault:
        rng = self._rng
        at = rng.random() * until_s
        workers = self._decode + self._prefill
        # Mostly workers: they are what must not matter. A frontend takes its clients' connections with it.
        anyone = workers * 3 + self._router * 2 + self._front
        short = rng.choice((0.05, 0.5, 2.0)) * (0.5 + rng.random())
        long = rng.choice((0.3, 3.0, 9.0, 16.0)) * (0.5 + rng.random())
        match kind:
            case Kind.KILL | Kind.DRAIN:
                return Fault(at, kind, rng.choice(anyone))
            case Kind.PAUSE:
                return Fault(at, kind, rng.choice(anyone), long)
            case Kind.CUT:
                target = rng.choice(workers + self._router)
                return Fault(at, kind, target, long, rng.choice(("", HEAD, rng.choice(workers))))
            case Kind.RESET | Kind.SILENCE:
                return Fault(at, kind, rng.choice(workers * 2 + self._router))
            case Kind.SLOW_ENGINE | Kind.SLOW_NETWORK:
                return Fault(at, kind, rng.choice(workers), long)
            case Kind.STUTTER:
                return Fault(at, kind, rng.choice(anyone), short * 2)
            case Kind.HUB_RESTART:
                return Fault(at, kind, "hub", rng.choice((0.2, 2.0, 8.0, 14.0)) * (0.5 + rng.random()))
            case Kind.HUB_PAUSE:
                return Fault(at, kind, "hub", long)
            case Kind.CRASH | Kind.HANG:
                return Fault(at, kind, rng.choice(workers), long if kind is Kind.HANG else 0.0)
            case Kind.JOIN:
                return Fault(at, kind, rng.choice(("VllmWorker", "PrefillWorker")))
            case Kind.LOSE_HOST:
                return Fault(at, kind, rng.choice(workers), 3.0 + long)


@dataclass(slots=True)
class HubAway:
    """As Disturbance, of the hub."""

    kind: Kind
    start: float
    end: float | None = None


class Injector:
    """Carries a schedule out. quiet_at: when the last fault so far had healed, on the loop's clock."""

    def __init__(self, cluster: Cluster, rng: Random) -> None:
        self.disturbances: list[Disturbance] = []
        self.hub_away: list[HubAway] = []
        self.quiet_at = 0.0
        self._cluster = cluster
        self._rng = rng

    async def run(self, fault: Fault) -> None:
        """Returns when it has healed."""
        loop = self._cluster.loop
        await asyncio.sleep(fault.at)
        self._cluster.trace.note("fault", f"{fault.kind} {fault.target} {fault.other} {fault.duration_s:.3f}")
        match fault.kind:
            case Kind.HUB_RESTART | Kind.HUB_PAUSE:
                away = HubAway(fault.kind, loop.time())
                self.hub_away.append(away)
                act = self._cluster.restart_hub if fault.kind is Kind.HUB_RESTART else self._cluster.pause_hub
                await act(fault.duration_s)
                away.end = loop.time()
            case Kind.JOIN:
                self._cluster.join(fault.target)
            case _:
                process = next(p for p in self._cluster.processes if p.label == fault.target)
                if process.alive:
                    await self._disturb(process, fault)
        self.quiet_at = max(self.quiet_at, loop.time())

    async def _disturb(self, process: SimProcess, fault: Fault) -> None:
        loop = self._cluster.loop
        life = process.num_lives
        disturbance = Disturbance(process, fault.kind, loop.time())
        self.disturbances.append(disturbance)
        process.num_disturbed += 1
        try:
            await self._act(process, fault)
            # A process that did not survive it is disturbed until it is back.
            await until(lambda: _is_back(process, life))
        finally:
            process.num_disturbed -= 1
            disturbance.end = loop.time()

    async def _act(self, process: SimProcess, fault: Fault) -> None:
        cluster, node = self._cluster, process.node
        assert node is not None
        match fault.kind:
            case Kind.KILL:
                node.kill()
            case Kind.PAUSE:
                node.pause()
                await asyncio.sleep(fault.duration_s)
                if process.node is node:
                    process.resume()
            case Kind.STUTTER:
                until = cluster.loop.time() + fault.duration_s
                while cluster.loop.time() < until and node.state is not NodeState.DEAD:
                    node.pause()
                    await asyncio.sleep(0.12 * self._rng.random())
                    process.resume()
                    await asyncio.sleep(0.03 * self._rng.random())
            case Kind.CUT:
                await self._cut(process, fault)
            case Kind.RESET:
                for number in self._some_connections(process):
                    cluster.network.reset(number)
            case Kind.SILENCE:
                for number in self._some_connections(process)[:1]:
                    cluster.network.silence(number)
                await asyncio.sleep(12.0)
            case Kind.SLOW_NETWORK:
                cluster.network.slow_down(process.host, 40.0)
                await asyncio.sleep(fault.duration_s)
                cluster.network.slow_down(process.host, 1.0)
            case Kind.DRAIN:
                await cluster.restart(process)
            case Kind.LOSE_HOST:
                cluster.network.lose_host(process.host)
                node.kill()
                await asyncio.sleep(fault.duration_s)
                cluster.network.find_host(process.host)
            case Kind.SLOW_ENGINE | Kind.CRASH | Kind.HANG:
                await self._engine(process, fault)
            case _:
                raise AssertionError(fault.kind)

    async def _cut(self, process: SimProcess, fault: Fault) -> None:
        network = self._cluster.network
        hosts = sorted({p.host for p in self._cluster.processes} | {HEAD})
        target = next((p.host for p in self._cluster.processes if p.label == fault.other), fault.other)
        others = [target] if fault.other else [host for host in hosts if host != CLIENTS]
        for host in others:
            if host != process.host:
                network.cut(process.host, host, one_way=self._rng.random() < 0.3)
        await asyncio.sleep(fault.duration_s)
        for host in others:
            network.heal(process.host, host)

    async def _engine(self, process: SimProcess, fault: Fault) -> None:
        component = process.component(process.names[0])
        if component is None:
            return
        faults: Any = component.engine.faults
        match fault.kind:
            case Kind.CRASH:
                life = process.num_lives
                faults.crash()
                await until(lambda: process.num_lives > life, CRASHED_ENDS_WITHIN_S)
            case Kind.HANG:
                faults.hang()
                await asyncio.sleep(fault.duration_s)
                faults.release()
            case _:
                faults.slowdown = 8.0
                await asyncio.sleep(fault.duration_s)
                faults.slowdown = 1.0

    def _some_connections(self, process: SimProcess) -> list[int]:
        """Of the process, but for those of clients, which must not matter to their servers alone."""
        ends = self._cluster.network.connections
        mine = [
            number
            for number in self._cluster.network.between(hosts=(process.host,))
            if not any(end.node.host == CLIENTS for end in ends[number])
        ]
        return self._rng.sample(mine, min(len(mine), self._rng.randint(1, 3)))


def _is_back(process: SimProcess, life: int) -> bool:
    return not process.wanted or (process.alive and (process.num_lives == life or process.ready))
