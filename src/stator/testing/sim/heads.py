"""The same load on one head or on several, each with a router of its own: how evenly the workers are used.

Undisturbed but for what is asked for; one seed is one result.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from stator.testing.sim.client import Answer, Manners, ask
from stator.testing.sim.cluster import HTTP_PORT, Cluster, Layout
from stator.testing.sim.engine import sim_engines
from stator.testing.sim.loop import SimLoop, run_sim, until
from stator.testing.sim.network import Network, Weather
from stator.testing.sim.trace import Trace
from stator.testing.sim.workload import SERVED_NAME

LOOK_EVERY_S = 0.005
MAX_REQUEST_S = 60.0


@dataclass(frozen=True, slots=True)
class HeadsLoad:
    """Requests come in bursts of burst, one every burst_every_s, each about one of num_documents. slow: by how much
    everything between the second head and the others takes longer, 1 for nothing. exchange: whether routers are
    expected to tell each other of their bookings."""

    num_heads: int = 2
    num_workers: int = 8
    num_bursts: int = 12
    burst: int = 6
    burst_every_s: float = 0.5
    num_documents: int = 8
    max_tokens: int = 12
    slow: float = 1.0
    exchange: bool = True


@dataclass(slots=True)
class HeadsResult:
    """excess: requests that the fullest worker had beyond the mean, on average over the time in which there were any.
    crowded: requests of a burst beyond an even share of it, at the workers that got more, mean over the bursts; in sums
    over the whole run herds at several workers look even. hit_rate: cached of all prompt tokens. mean_s: from a request
    to its end. lag_s: the largest that a router measured of a peer; peer_bookings: the most that one counted at a
    time."""

    num_answers: int = 0
    excess: float = 0.0
    crowded: float = 0.0
    hit_rate: float = 0.0
    mean_s: float = 0.0
    lag_s: float = 0.0
    peer_bookings: int = 0
    by_worker: list[int] = field(default_factory=list[int])

    @property
    def skew(self) -> float:
        """Requests of the worker that had most, over the mean."""
        return max(self.by_worker) * len(self.by_worker) / sum(self.by_worker)


def run_heads(seed: int, load: HeadsLoad) -> HeadsResult:
    result = HeadsResult()
    with sim_engines():
        run_sim(lambda loop: _run(loop, Random(seed), load, result))
    return result


async def _run(loop: SimLoop, rng: Random, load: HeadsLoad, result: HeadsResult) -> None:
    trace = Trace(loop.time)
    network = Network(loop, Random(rng.getrandbits(64)), trace, Weather(spike=0.0))
    layout = Layout(num_frontends=load.num_heads, num_decode=load.num_workers, num_prefill=0, max_num_seqs=16)
    cluster = Cluster(loop, Random(rng.getrandbits(64)), network, trace, layout)
    try:
        await cluster.start()
        await until(lambda: _know_all(cluster, load.exchange), 20.0)
        if load.slow != 1.0:
            network.slow_down("front2", load.slow)
        await _course(cluster, rng, load, result)
    finally:
        await cluster.close()


def _routers(cluster: Cluster) -> list[Any]:
    return [router for p in cluster.of_kind("Router") if (router := p.component("Router")) is not None]


def _know_all(cluster: Cluster, exchange: bool) -> bool:
    """Every router has every worker's blocks, and every other router's bookings."""
    num_peers = len(_routers(cluster)) - 1 if exchange else 0
    for component in _routers(cluster):
        stats = component.routes.report().router
        if stats.index.num_settled < cluster.layout.num_decode or stats.peers.num_peers < num_peers:
            return False
    return True


async def _course(cluster: Cluster, rng: Random, load: HeadsLoad, result: HeadsResult) -> None:
    documents = [_words(rng, 60) for _ in range(load.num_documents)]
    frontends = cluster.of_kind("Frontend")
    clients: list[asyncio.Task[Answer]] = []
    looking = cluster.loop.create_task(_look(cluster, result))
    even_share = -(-load.burst // load.num_workers)
    for _ in range(load.num_bursts):
        for number in range(load.burst):
            prompt = f"{rng.choice(documents)} {_words(rng, 4)}"
            host = frontends[number % len(frontends)].host
            clients.append(cluster.client_node.spawn(_ask(host, prompt, load.max_tokens, rng.random() * 0.02)))
        before = _served(cluster)
        await asyncio.sleep(load.burst_every_s)
        taken = (after - then for after, then in zip(_served(cluster), before, strict=True))
        result.crowded += sum(max(0, num - even_share) for num in taken) / load.num_bursts
    answers = await asyncio.gather(*clients)
    looking.cancel()
    _sum_up(cluster, answers, result)


async def _ask(host: str, prompt: str, max_tokens: int, after_s: float) -> Answer:
    await asyncio.sleep(after_s)
    answer = Answer()
    body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    async with asyncio.timeout(MAX_REQUEST_S):
        headers = {"content-type": "application/json"}
        await ask((host, HTTP_PORT), "/v1/completions", msgspec.json.encode(body), headers, Manners(), answer)
    return answer


async def _look(cluster: Cluster, result: HeadsResult) -> None:
    total = num = 0.0
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        opened = [p.component("VllmWorker").requests.num_open for p in cluster.of_kind("VllmWorker")]
        if any(opened):
            total += max(opened) - sum(opened) / len(opened)
            num += 1
            result.excess = total / num
        for component in _routers(cluster):
            peers = component.routes.report().router.peers
            result.lag_s = max(result.lag_s, peers.lag_s)
            result.peer_bookings = max(result.peer_bookings, peers.num_bookings)


def _sum_up(cluster: Cluster, answers: Sequence[Answer], result: HeadsResult) -> None:
    good = [a for a in answers if a.status == 200 and a.usage is not None and a.ended_at is not None]
    result.num_answers = len(good)
    usages = [a.usage for a in good if a.usage is not None]
    cached = sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for usage in usages)
    result.hit_rate = cached / sum(usage["prompt_tokens"] for usage in usages)
    result.mean_s = sum((a.ended_at or 0.0) - a.started_at for a in good) / len(good)
    result.by_worker = _served(cluster)


def _served(cluster: Cluster) -> list[int]:
    """Requests that each worker has taken."""
    workers = [p.component("VllmWorker") for p in cluster.of_kind("VllmWorker")]
    return [sum(w.requests.report().prefills.values()) for w in workers]


def _words(rng: Random, num: int) -> str:
    return " ".join(
        rng.choice(("rain", "boat", "light", "town", "bread", "river", "kite", "clerk")) for _ in range(num)
    )
