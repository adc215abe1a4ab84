"""Scenes 10, 17 to 19 and 24: clients that leave or read slowly, links, more than can be done, and kills at random."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from metrics import Sample, total

from chaos.deployment import Deployment, pause, tick
from chaos.load import Body, Stream, key_of, long_prompts, stories, story
from chaos.rows import FREE_WITHIN_S, Row, settle
from chaos.scenes_workers import NUM_STREAMS, served_by_all
from stator.testing.tcp_proxy import Link, TcpProxy

FAR_PORTS = range(7500, 7504)
KILL_EVERY_S = 5.0


async def _client_leaves(d: Deployment, streams: list[Stream]) -> Row:
    """free_s: from the moment it has gone."""
    loop = asyncio.get_running_loop()
    since = loop.time()
    await d.load.disconnect(streams)
    free_s = await d.until_free(15)
    assert free_s is not None, "workers went on for clients that had left"
    freed_s = loop.time() - since
    row = await settle(d, [s for s in streams if s.completed])
    row.sent, row.cut, row.free_s = len(streams), len(streams) - row.completed, freed_s
    if freed_s > FREE_WITHIN_S:
        row.notes.append(f"more than {FREE_WITHIN_S:g} s: is the machine busy?")
    return row


async def leaves_while_decoding(d: Deployment) -> Row:
    streams = d.load.start(stories(NUM_STREAMS, max_tokens=1500))
    await d.load.streaming(streams)
    return await _client_leaves(d, streams)


async def leaves_while_prefilled(d: Deployment) -> Row:
    """Some jobs are computed, others wait in the queue."""
    streams = d.load.start(long_prompts(16, d.salt()))
    await d.until_busy("prefill")
    return await _client_leaves(d, streams)


async def leaves_in_transfer(d: Deployment) -> Row:
    with d.ordered("slow-export"):
        streams = d.load.start(long_prompts(4, d.salt()))
        await d.transferring()
        return await _client_leaves(d, streams)


async def leaves_the_line(d: Deployment) -> Row:
    """All workers are full, and its requests wait at the router: two workers of 8 sequences are given 9 each, and up to
    12 while it expects prefill workers to compute some of the prompts."""
    running = d.load.start(stories(18, max_tokens=100))
    waiting = d.load.start(stories(32, max_tokens=100)[18:])

    async def in_line() -> float:
        return total(await d.metrics(), "stator_router_waiting_requests")

    async with asyncio.timeout(30):
        while not await in_line():
            await tick()
    await d.load.disconnect(waiting)
    async with asyncio.timeout(30):
        while await in_line():
            await tick()
    cut = [s for s in waiting if not s.completed]
    assert cut
    await d.load.finish(running)
    row = await settle(d, running)
    row.sent, row.cut = len(running) + len(cut), len(cut)
    return row


async def slow_reader(d: Deployment) -> Row:
    """One client takes a few bytes at a time; the others notice nothing of it."""
    slow = d.load.start_slow(story(NUM_STREAMS, max_tokens=120), bytes_per_s=4000)
    since = asyncio.get_running_loop().time()
    streams = await d.load.send(stories(NUM_STREAMS, max_tokens=120))
    quick_s = asyncio.get_running_loop().time() - since
    await d.load.finish([slow])
    assert slow.ended is not None and slow.ended - slow.sent > quick_s, "it did not read slowly"
    row = await settle(d, [*streams, slow], disturbed=streams, since=since)
    row.notes.append(
        f"the others were done after {quick_s:.1f} s, the slow reader after {slow.ended - slow.sent:.1f} s"
    )
    return row


@contextlib.asynccontextmanager
async def _far_worker(d: Deployment, link: Link) -> AsyncIterator[list[TcpProxy]]:
    """A third decode worker, reached by everybody through this link only."""
    host = d.hosts["head"]
    proxies = [TcpProxy(host.address, port, bind=(d.client.address, port), link=link) for port in FAR_PORTS]
    for proxy in proxies:
        await proxy.start()
    ports = f"{FAR_PORTS[0]}-{FAR_PORTS[-1]}"
    d.roles["decode"] += 1
    try:
        flags = ("--advertise", d.client.address, "--port-range", ports)
        async with d.joined("far", "head", "faulty.py:VllmWorker", *flags) as node:
            await d.whole()
            [far] = d.instances_of(node, "decode")
            assert all(d.client.address in address for address in far.addresses if address.startswith("tcp:"))
            yield proxies
    finally:
        d.roles["decode"] -= 1
        for proxy in proxies:
            await proxy.close()


async def slow_link(d: Deployment) -> Row:
    """A worker behind a link of 100 ms and 40 KB/s, whose connections are reset in mid-stream, and whose bytes are lost
    for a while later."""
    link = Link()
    async with _far_worker(d, link) as proxies:
        await served_by_all(d)
        link.delay_s, link.bytes_per_s = 0.1, 40_000.0
        since = asyncio.get_running_loop().time()
        streams = d.load.start(stories(12, max_tokens=100))
        await d.load.streaming(streams)
        for proxy in proxies:
            proxy.reset()
        await d.load.finish(streams)
        more = d.load.start(stories(12, max_tokens=100))
        await d.load.streaming(more)
        for proxy in proxies:
            proxy.lose()
        await pause(1.5)
        for proxy in proxies:
            proxy.find()
        await d.load.finish(more)
        row = await settle(d, [*streams, *more], since=since)
    await d.whole()
    return row


async def overload(d: Deployment) -> Row:
    """Three times as many requests as are served, for ten seconds: what is accepted is served, the rest gets 429."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    await d.load.send(stories(16, max_tokens=100))
    a_second = 16 / (loop.time() - begin)
    streams: list[Stream] = []
    begin, due = loop.time(), 0.0
    while due < 10:
        due += 1 / (3 * a_second)
        await pause(max(0.0, begin + due - loop.time()))
        streams += d.load.start([story(len(streams) % 16, max_tokens=100)])
    await d.load.finish(streams)
    goodput = sum(s.completed for s in streams) / (max(s.ended or 0.0 for s in streams) - begin)
    row = await settle(d, streams)
    refused = [s for s in streams if s.status == 429]
    assert refused and all(s.retry_after for s in refused), "three times the capacity was not refused in part"
    row.notes.append(
        f"capacity {a_second:.1f} a second; goodput at three times that: {goodput / a_second:.0%}; "
        f"Retry-After {min(int(s.retry_after or 0) for s in refused)} to "
        f"{max(int(s.retry_after or 0) for s in refused)} s"
    )
    return row


async def slow_worker(d: Deployment) -> Row:
    """Its engine takes ten times as long for a step: it gets few requests, and none of them is lost."""
    slow = d.instances("decode")[0]

    async def generated() -> dict[str, int]:
        return {i: r.load.generation_tokens_total for i, r in (await d.reports("decode")).items()}

    since = asyncio.get_running_loop().time()
    with d.ordered("slow-step", str(slow.pid)):
        streams = await d.load.send(stories(6, max_tokens=24))
        before = await generated()
        for _ in range(4):
            streams += await d.load.send(stories(6, max_tokens=24))
        after = await generated()
    row = await settle(d, streams, since=since)
    row.recovery_s = None
    all_tokens = sum(after.values()) - sum(before.values())
    share = (after[slow.instance_id] - before[slow.instance_id]) / all_tokens
    assert share < 0.45, f"the slow worker was given {share:.0%} of the tokens"
    row.notes.append(f"it generated {share:.0%} of the tokens")
    return row


class _Kills:
    """What dies next: a worker, the router, a node with all that is on it; the store or the bus, which comes back with
    what it had."""

    def __init__(self, d: Deployment, seed: int) -> None:
        self.d, self.names = d, list[str]()
        self._rng = random.Random(seed)

    async def one(self) -> None:
        d, rng = self.d, self._rng
        what = rng.choice(("decode", "decode", "prefill", "prefill", "router", "node", "store", "bus"))
        if what in d.roles or what == "router":
            found = d.instances(what)
            if found:
                # It may be dead already, and its lease not over yet.
                with contextlib.suppress(ProcessLookupError):
                    d.kill(rng.choice(found))
        elif what == "node":
            what = rng.choice(("prefill1", "prefill2"))
            await asyncio.to_thread(d.nodes[what].kill_tree)
            d.node_of_prefill(what)
        else:
            await d.control.kill(store=what == "store", bus=what == "bus")
            await d.control.come_back()
        self.names.append(what)


def random_kills(seconds: float, seed: int = 24):
    """One every five seconds, under load of both kinds."""

    async def play(d: Deployment) -> Row:
        loop = asyncio.get_running_loop()
        kills = _Kills(d, seed)
        before = await d.metrics()
        streams: list[Stream] = []
        number = 0
        since = loop.time()
        due = since + KILL_EVERY_S
        while loop.time() < since + seconds:
            if loop.time() >= due:
                due += KILL_EVERY_S
                await kills.one()
            if d.load.num_open < 6:
                number += 1
                one: Body = (
                    long_prompts(8, d.salt())[number % 8] if number % 3 == 0 else story(number % 8, max_tokens=100)
                )
                streams += d.load.start([one])
            await tick()
        last = loop.time()
        await d.load.finish(streams)
        await d.whole(90)
        whole_s = loop.time() - last
        assert await d.until_free(40) is not None, "blocks are left"
        counted = _by_code(await d.metrics(), before)
        seen: dict[str, int] = {}
        for stream in streams:
            code = str(stream.status) if stream.completed or stream.status != 200 else "failed"
            seen[code] = seen.get(code, 0) + 1
        row = await settle(d, streams, since=since)
        row.recovery_s = whole_s
        failed = sum(n for code, n in counted.items() if code not in seen)
        assert failed == seen.pop("failed", 0), (counted, seen)
        assert {code: n for code, n in counted.items() if code in seen} == seen, (counted, seen)
        kinds = len({key_of(stream.body) for stream in streams})
        row.notes.append(
            f"{len(kills.names)} kills ({', '.join(kills.names)}), {kinds} different requests; by code {counted}"
        )
        return row

    return play


def _by_code(after: list[Sample], before: list[Sample]) -> dict[str, int]:
    def count(samples: list[Sample]) -> dict[str, float]:
        found: dict[str, float] = {}
        for s in samples:
            if s.name == "stator_requests_total" and s.labels.get("endpoint", "").startswith("chat"):
                found[s.labels["code"]] = found.get(s.labels["code"], 0) + s.value
        return found

    begin = count(before)
    return {code: int(n - begin.get(code, 0)) for code, n in count(after).items() if n != begin.get(code, 0)}
