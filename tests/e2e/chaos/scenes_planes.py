"""Scenes 9, 11, 12, 14, 15: the head's own processes, the store and the bus, the router and what it knows."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from metrics import total

from chaos.deployment import NO_ROUTER, NO_WORKERS, Deployment, pause
from chaos.load import Stream, long_prompts, stories
from chaos.planes import External
from chaos.rows import Row, settle
from chaos.scenes_workers import NUM_STREAMS, in_mid_stream, remote_prefills, until_remote_prefills

GONE_S = 12.0
"""Longer than a lease."""

SLOW_S, HELD_S, GOES_ON_S = 14.0, 1.5, 0.5
"""For longer than a lease, each answer may come so late."""

RENEWED_WITHIN_S = 6.0
"""Of the hub's return: a third of a lease, and the longest pause before another try."""


async def frontend_killed(d: Deployment) -> Row:
    """A second Frontend, in mid-stream: its clients lose their connection, and nobody computes for them any more."""
    loop = asyncio.get_running_loop()
    async with d.joined("second", "head", "faulty.py", *NO_WORKERS, *NO_ROUTER, "--Frontend.port=8001") as node:
        load = d.load_at(8001)
        await d.until_served(load)
        streams = load.start([*stories(NUM_STREAMS, max_tokens=1500), *long_prompts(4, d.salt(), max_tokens=1000)])
        await load.streaming(streams)
        [front] = d.instances_of(node, "frontend")
        since = loop.time()
        d.kill(front)
        free_s = await d.until_free(10)
        assert free_s is not None, "workers went on computing for a frontend that is dead"
        freed_s = loop.time() - since
        await load.finish(streams)
        assert not any(s.completed for s in streams)
        await d.until_served(load)
        served_s = loop.time() - since
        row = await settle(d, [*await d.load.send(stories(4)), *await load.send(stories(4))])
    # Long answers are not learned: what came of them is not compared.
    row.sent += len(streams)
    row.cut = len(streams)
    row.free_s, row.recovery_s = freed_s, served_s
    return row


async def _lost_for(d: Deployment, seconds: float, *, store: bool = True, bus: bool = True, wiped: bool = False) -> Row:
    """Requests of both kinds while it is away, and when it is back."""
    loop = asyncio.get_running_loop()
    more: list[Stream] = []
    ids = {i.instance_id for role in d.roles for i in d.instances(role)}
    notes: list[str] = []
    began: list[float] = []

    async def fault() -> None:
        await d.control.kill(store=store, bus=bus)
        end = loop.time() + seconds
        while loop.time() < end:
            more.extend(await d.load.send([*stories(4, max_tokens=60), *long_prompts(2, d.salt())]))
        await d.control.come_back(wiped=wiped)
        began.append(loop.time())
        again_s = await d.until_registered(ids)
        notes.append(f"all instances back under their ids after {again_s:.1f} s")
        more.extend(await d.load.send([*stories(4, max_tokens=60), *long_prompts(2, d.salt())]))

    done = await remote_prefills(d)
    row = await in_mid_stream(d, fault, also=more)
    # The queue works again, and nobody is forgotten when the grace of those who watch is over.
    await until_remote_prefills(d, done)
    row.recovery_s = loop.time() - began[0]
    row.notes += [*notes, f"prefilled remotely again at most {row.recovery_s:.1f} s after it was back"]
    return row


async def store_and_bus_killed(d: Deployment) -> Row:
    row = await _lost_for(d, GONE_S)
    await pause(GONE_S)
    await d.whole(5)
    return row


async def store_wiped(d: Deployment) -> Row:
    return await _lost_for(d, 1.0, bus=False, wiped=True)


async def bus_killed(d: Deployment) -> Row:
    return await _lost_for(d, 3.0, store=False)


async def bus_wiped(d: Deployment) -> Row:
    return await _lost_for(d, 1.0, store=False, wiped=True)


async def store_and_bus_wiped(d: Deployment) -> Row:
    return await _lost_for(d, 1.0, wiped=True)


async def store_and_bus_slow(d: Deployment) -> Row:
    """They stand still most of the time, and answer in between."""
    loop = asyncio.get_running_loop()

    async def slow_down() -> None:
        end = loop.time() + SLOW_S
        while loop.time() < end:
            await _hold(d, HELD_S)
            await pause(GOES_ON_S)

    return await _serve_during(d, slow_down)


async def hub_stands_still(d: Deployment) -> Row:
    """For longer than a lease it hears no renewal, of anybody."""

    async def stand_still() -> None:
        await _hold(d, SLOW_S)
        # Whoever has lost a lease learns so with its next renewal.
        await pause(RENEWED_WITHIN_S)

    row = await _serve_during(d, stand_still)
    await d.whole(5)
    return row


async def _hold(d: Deployment, seconds: float) -> None:
    d.control.hold(True)
    try:
        await pause(seconds)
    finally:
        d.control.hold(False)


async def _serve_during(d: Deployment, disturb: Callable[[], Coroutine[Any, Any, None]]) -> Row:
    """Requests go on meanwhile; afterwards everybody is who it was, and prompts are prefilled remotely."""
    ids = {i.instance_id for role in d.roles for i in d.instances(role)}
    more: list[Stream] = []

    async def fault() -> None:
        async with asyncio.TaskGroup() as group:
            disturbing = group.create_task(disturb())
            while not disturbing.done():
                more.extend(await d.load.send([*stories(4, max_tokens=60), *long_prompts(2, d.salt())]))

    row = await in_mid_stream(d, fault, also=more)
    assert ids == {i.instance_id for role in d.roles for i in d.instances(role)}, "an instance lost its lease"
    # Who had no answer from the queue uses it again.
    await until_remote_prefills(d, await remote_prefills(d))
    return row


async def members_in_turn(d: Deployment) -> Row:
    """Each of three members, the leader among them, is killed and comes back before the next."""
    assert isinstance(d.control, External) and len(d.control.members) == 3
    members = d.control.members
    ids = {i.instance_id for role in d.roles for i in d.instances(role)}
    more: list[Stream] = []

    async def fault() -> None:
        for member in members:
            await member.kill()
            more.extend(await d.load.send([*stories(4, max_tokens=60), *long_prompts(2, d.salt())]))
            # The others answer: a new leader is there.
            await d.until_registered(ids)
            await member.start()

    row = await in_mid_stream(d, fault, also=more)
    assert ids == {i.instance_id for role in d.roles for i in d.instances(role)}, "an instance changed its id"
    return row


async def router_killed(d: Deployment) -> Row:
    """What workers hold is known again: prompts that were there before go where their blocks are."""
    loop = asyncio.get_running_loop()
    known = long_prompts(6, d.salt(), max_tokens=2)
    await d.load.send(known)
    before = await hit_rate(d, known)
    more: list[Stream] = []
    waited: list[float] = []

    async def fault() -> None:
        [router] = d.instances("router")
        d.kill(router)
        streams = await d.load.send(stories(6, max_tokens=24))
        waited.extend(s.chunk_times[0] - s.sent for s in streams if s.chunk_times)
        more.extend(streams)

    row = await in_mid_stream(d, fault, also=more)
    begin, after = loop.time(), 0.0
    async with asyncio.timeout(30):
        while after < before - 0.1:
            after = await hit_rate(d, known)
    row.notes.append(f"requests without a router waited up to {max(waited, default=0.0):.1f} s for the first token")
    row.notes.append(f"hit rate {before:.0%} before, {after:.0%} after {loop.time() - begin:.1f} s")
    return row


async def hit_rate(d: Deployment, bodies: list[dict]) -> float:
    """Cached part of these prompts, sent once more."""
    streams = await d.load.send(bodies)
    assert all(s.completed for s in streams), [s.errors for s in streams]
    return sum(s.num_cached for s in streams) / sum((s.usage or {})["prompt_tokens"] for s in streams)


def events_garbled(how: str):
    """drop, double or reorder what workers say of their KV blocks, for a while."""

    async def play(d: Deployment) -> Row:
        loop = asyncio.get_running_loop()
        salt = d.salt()
        gaps = total(await d.metrics(), "stator_router_index_gaps_total")
        streams: list[Stream] = []
        since = loop.time()
        with d.ordered("kv-events", how):
            streams += await d.load.send(long_prompts(6, salt, max_tokens=8))
            streams += await d.load.send(long_prompts(6, salt, max_tokens=8))
            await d.until_free(20)
            await pause(2.5)  # Two digests: what was lost silently is noticed.
        again = long_prompts(6, salt, max_tokens=2)
        rate, begin = 0.0, loop.time()
        async with asyncio.timeout(60):
            while rate < 0.7:
                rate = await hit_rate(d, again)
        async with asyncio.timeout(30):
            while (now := total(await d.metrics(), "stator_router_index_gaps_total")) == gaps and how != "double":
                await pause(0.2)
        row = await settle(d, streams, since=since)
        row.recovery_s = loop.time() - begin
        row.notes.append(f"{now - gaps:.0f} times a new snapshot; hit rate {rate:.0%} {row.recovery_s:.1f} s after")
        return row

    return play
