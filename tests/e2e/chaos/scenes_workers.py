"""Scenes 1 to 8, 13, 16, 20 to 22: workers that die, stop, stand still, are cut off, come and go."""

import asyncio
import contextlib
import os
import signal

from chaos.deployment import NO_ROUTER, NO_WORKERS, Deployment, pause
from chaos.load import Stream, long_prompts, poisonous, stories
from chaos.rows import Fault, Row, disturb, settle
from stator.messages.instances import InstanceInfo

NUM_STREAMS = 8
NUM_PROMPTS = 10
FROZEN_S = 30.0
PARTITION_S = PAUSED_S = 12.0
"""Longer than a lease."""


async def in_mid_stream(d: Deployment, fault: Fault, num: int = NUM_STREAMS, also: list[Stream] | None = None) -> Row:
    return await disturb(d, stories(num), d.load.streaming, fault, also=also)


async def in_remote_prefill(d: Deployment, fault: Fault, num: int = NUM_PROMPTS) -> Row:
    """The fault when a prefill worker computes and other prompts wait."""

    async def busy(_: list[Stream]) -> None:
        await d.until_busy("prefill")

    return await disturb(d, long_prompts(num, d.salt()), busy, fault)


async def decode_killed(d: Deployment) -> Row:
    async def fault() -> None:
        d.kill(await d.busiest("decode"))

    return await in_mid_stream(d, fault)


async def decode_killed_in_remote_prefill(d: Deployment) -> Row:
    async def fault() -> None:
        d.kill(await d.busiest("decode"))

    return await in_remote_prefill(d, fault)


async def decode_killed_without_migration(d: Deployment) -> Row:
    """Through a Frontend of its own whose Processor may not go on elsewhere."""
    flags = (*NO_WORKERS, *NO_ROUTER, "--Frontend.port=8001", "--Processor.migration-limit=0")
    async with d.joined("limited", "head", "faulty.py", *flags):
        load = d.load_at(8001)
        await d.until_served(load)
        streams = load.start(stories(NUM_STREAMS))
        await load.streaming(streams)
        victim = await d.busiest("decode")
        [survivor] = [i for i in d.instances("decode") if i != victim]
        prompts = (await d.report(survivor)).load.prompt_tokens_total
        since = asyncio.get_running_loop().time()
        d.kill(victim)
        await load.finish(streams)
        again = (await d.report(survivor)).load.prompt_tokens_total - prompts
        assert again == 0, f"{again} prompt tokens were computed once more"
        row = await settle(d, streams, since=since)
    assert row.refused, "no stream was on the worker that was killed"
    return row


async def decode_stopped(d: Deployment) -> Row:
    async def fault() -> None:
        d.terminate(await d.busiest("decode"))

    return await in_mid_stream(d, fault)


async def prefill_stopped(d: Deployment) -> Row:
    async def fault() -> None:
        d.terminate(await d.busiest("prefill"))

    return await in_remote_prefill(d, fault)


async def prefill_killed_in_job(d: Deployment) -> Row:
    async def fault() -> None:
        d.kill(await d.busiest("prefill"))

    return await in_remote_prefill(d, fault)


async def prefill_killed_after_job(d: Deployment) -> Row:
    """Its blocks are finished, and not one of them was handed over."""
    with d.ordered("hold-export"):
        return await _killed_with_blocks(d, exported=0)


async def prefill_killed_in_transfer(d: Deployment) -> Row:
    """Some of its blocks were handed over, others not."""
    with d.ordered("slow-export"):
        return await _killed_with_blocks(d, exported=1)


async def _killed_with_blocks(d: Deployment, *, exported: int) -> Row:
    streams = d.load.start(long_prompts(4, d.salt()))
    before = {i.instance_id: d.num_exported(i) for i in d.instances("prefill")}
    victim = await d.transferring()
    if exported:
        await d.until(lambda: d.num_exported(victim) > before[victim.instance_id], 20, "a block was handed over")
    since = asyncio.get_running_loop().time()
    d.kill(victim)
    d.revoke("hold-export")
    await d.load.finish(streams)
    return await settle(d, streams, since=since)


async def all_prefill_gone(d: Deployment) -> Row:
    """Both nodes lose their power; for as long as requests come, decode workers prefill."""
    names = ("prefill1", "prefill2")

    async def fault() -> None:
        await asyncio.gather(*(asyncio.to_thread(d.nodes[name].kill_tree) for name in names))

    streams = d.load.start(long_prompts(NUM_PROMPTS, d.salt()))
    await d.until_busy("prefill")
    since = asyncio.get_running_loop().time()
    await fault()
    await d.load.finish(streams)
    for name in names:
        d.node_of_prefill(name)
    return await settle(d, streams, since=since)


async def all_workers_gone(d: Deployment) -> Row:
    """Streams wait for a worker to come back; new requests are told when to try again."""
    refused: list[Stream] = []

    async def fault() -> None:
        for role in ("decode", "prefill"):
            for instance in d.instances(role):
                d.kill(instance)
        await d.until(lambda: not d.instances("decode"), 30, "no decode worker is there")
        refused.extend(await d.load.send(stories(4)))

    row = await in_mid_stream(d, fault)
    statuses = sorted({(s.status, s.retry_after is not None) for s in refused if not s.completed})
    assert statuses == [(503, True)] or not statuses, statuses
    row.notes.append(
        f"new requests meanwhile: {len(refused)}, of which {sum(s.status == 503 for s in refused)} got 503"
    )
    assert await d.until_served() < 60
    return row


async def _stand_still(
    d: Deployment, streams: list[Stream], victims: list[InstanceInfo], pids: list[int], seconds: float
) -> Row:
    """These processes stand still, for so long at least and until their instances are out, while streams end."""
    loop = asyncio.get_running_loop()
    since = loop.time()

    def tell(number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    tell(signal.SIGSTOP)
    try:
        gone_s = await d.until(
            lambda: all(d.planes.directory.get(i.instance_id) is None for i in victims), 60, "who stands still is out"
        )
        await d.load.finish(streams)
        await pause(max(0.0, since + seconds - loop.time()))
    finally:
        tell(signal.SIGCONT)
    thawed = loop.time()
    await d.whole()
    row = await settle(d, streams, since=since)
    row.recovery_s = loop.time() - thawed
    row.notes.append(f"out of discovery after {gone_s:.1f} s, whole again {row.recovery_s:.1f} s after it went on")
    assert all(d.planes.directory.get(i.instance_id) is None for i in victims), "it came back under its old id"
    return row


async def decode_frozen(d: Deployment) -> Row:
    streams = d.load.start(stories(NUM_STREAMS))
    await d.load.streaming(streams)
    victim = await d.busiest("decode")
    row = await _stand_still(d, streams, [victim], [victim.pid], FROZEN_S)
    await served_by_all(d)
    return row


async def prefill_frozen_in_transfer(d: Deployment) -> Row:
    """While its blocks are fetched."""
    with d.ordered("slow-export"):
        streams = d.load.start(long_prompts(4, d.salt()))
        victim = await d.transferring()
        d.freeze(victim)
    return await _stand_still(d, streams, [victim], [victim.pid], 0.0)


async def node_frozen(d: Deployment) -> Row:
    """A whole prefill node with jobs in hand, its supervisor too: a virtual machine that is paused."""
    streams = d.load.start(long_prompts(NUM_PROMPTS, d.salt()))
    await d.until_busy("prefill")
    node = d.nodes["prefill1"]
    return await _stand_still(d, streams, d.instances_of(node, "prefill"), [p.pid for p in node.tree()], PAUSED_S)


async def served_by_all(d: Deployment) -> None:
    """Requests reach every decode worker, and are right there. They are more than the others have places for, since a
    router prefers who has their prefix."""
    begin: dict[str, int] = {}
    async with asyncio.timeout(60):
        while True:
            now = await _generated(d)
            # One that has come since then may have begun already: what counts is what it does from here on.
            begin = {i: begin.get(i, num_tokens) for i, num_tokens in now.items()}
            if len(now) == d.roles["decode"] and all(now[i] > begin[i] for i in now):
                return
            streams = await d.load.send(stories(8 * d.roles["decode"], max_tokens=24))
            await d.learn([s.body for s in streams])
            assert all(s.completed and s.text == d.expected(s) for s in streams)


async def _generated(d: Deployment) -> dict[str, int]:
    """Tokens so far, by instance."""
    return {i: r.load.generation_tokens_total for i, r in (await d.reports("decode")).items()}


async def partition(d: Deployment) -> Row:
    """The prefill nodes lose their network, with jobs in hand, for longer than a lease."""
    loop = asyncio.get_running_loop()
    hosts = [d.hosts[name] for name in ("prefill1", "prefill2")]
    before = {i.instance_id for i in d.instances("prefill")}
    streams = d.load.start(long_prompts(NUM_PROMPTS, d.salt()))
    await d.until_busy("prefill")
    since = loop.time()

    async def cut_off() -> float:
        return await d.until(lambda: not d.instances("prefill"), 60, "who is cut off is out")

    try:
        for host in hosts:
            d.network.unplug(host)
        gone = asyncio.ensure_future(cut_off())
        await d.load.finish(streams)
        streams += await d.load.send(long_prompts(4, d.salt()))
        gone_s = await gone
        await pause(max(0.0, since + PARTITION_S - loop.time()))
    finally:
        for host in hosts:
            d.network.plug(host)
    healed = loop.time()
    await d.whole()
    whole_s = loop.time() - healed
    row = await settle(d, streams, since=since)
    row.recovery_s = whole_s
    again = len(before & {i.instance_id for i in d.instances("prefill")})
    row.notes.append(f"out after {gone_s:.1f} s; whole {whole_s:.1f} s after the heal, {again} under its old id")
    # They take jobs again.
    done = await remote_prefills(d)
    await d.load.send(long_prompts(4, d.salt()))
    await until_remote_prefills(d, done)
    return row


async def remote_prefills(d: Deployment) -> int:
    return sum(r.prefills.get("remote", 0) for r in (await d.reports("decode")).values())


async def until_remote_prefills(d: Deployment, more_than: int) -> None:
    async with asyncio.timeout(60):
        while await remote_prefills(d) <= more_than:
            await d.load.send(long_prompts(2, d.salt(), max_tokens=2))


async def engine_hangs(d: Deployment) -> Row:
    async def fault() -> None:
        d.order("step", "hang")

    return await in_mid_stream(d, fault)


async def engine_crashes(d: Deployment) -> Row:
    async def fault() -> None:
        d.order("step", "crash")

    return await in_mid_stream(d, fault)


async def poison(d: Deployment) -> Row:
    """One request that crashes every engine, among others that do not."""
    refused: list[Stream] = []

    async def fault() -> None:
        refused.extend(await d.load.send([poisonous()]))

    row = await in_mid_stream(d, fault)
    [stream] = refused
    assert stream.failed_cleanly and not stream.text, stream
    row.notes.append(f"it was refused: {stream.status} {stream.errors[0]['code']}")
    return row


async def decode_rolled(d: Deployment) -> Row:
    """Every decode worker drained and started again, one after another, under load."""
    more: list[Stream] = []
    before = {i.instance_id for i in d.instances("decode")}

    async def roll() -> None:
        for instance in d.instances("decode"):
            await d.drain(instance, restart=True)
            await d.whole()

    async def fault() -> None:
        rolling = asyncio.ensure_future(roll())
        while not rolling.done():
            more.extend(await d.load.send(stories(4, max_tokens=60)))
        await rolling

    row = await in_mid_stream(d, fault, also=more)
    assert not before & {i.instance_id for i in d.instances("decode")}
    return row


async def worker_joins(d: Deployment) -> Row:
    """A third decode worker joins under load: requests reach it only once it is ready."""
    streams = d.load.start(stories(NUM_STREAMS))
    since = asyncio.get_running_loop().time()
    d.roles["decode"] += 1
    try:
        async with d.joined("joined", "head", "faulty.py:VllmWorker") as joined:
            while len(d.instances("decode")) < d.roles["decode"]:
                streams += await d.load.send(stories(4, max_tokens=24))
            ready_s = asyncio.get_running_loop().time() - since
            served = 0
            async with asyncio.timeout(60):
                while not served:
                    streams += await d.load.send(stories(8, max_tokens=24))
                    [new] = d.instances_of(joined, "decode")
                    served = (await d.report(new)).load.generation_tokens_total
            await d.load.finish(streams)
    finally:
        d.roles["decode"] -= 1
    row = await settle(d, streams, since=since)
    row.notes.append(f"ready after {ready_s:.1f} s; it generated {served} tokens")
    return row
