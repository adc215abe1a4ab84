"""Scene 23: a disk that is full, a log that nobody reads, a clock that jumps."""

import asyncio
import os
import re
import signal
from pathlib import Path

import aiohttp

from chaos.deployment import NO_ROUTER, NO_WORKERS, PORT, Deployment
from chaos.load import Stream, long_prompts, stories
from chaos.planes import Tmpfs
from chaos.rows import Row, settle
from chaos.scenes_workers import NUM_STREAMS

SITE = Path(__file__).with_name("clock")
HOUR_S = 3600

NUM_LINES = 1500
"""Of the access log: more than a pipe holds."""


async def disk_full(d: Deployment) -> Row:
    """A node's output goes to a file on a disk that is full, and then is not any more."""
    disk = Tmpfs(d.state_dir / f"disk-{d.lane.name}", "1m")
    log = disk.directory / "log"
    streams: list[Stream] = []
    d.roles["decode"] += 1
    try:
        since = asyncio.get_running_loop().time()
        async with d.joined("full", "head", "faulty.py:VllmWorker", output=log) as node:
            await d.whole()
            disk.fill()
            size = log.stat().st_size
            for _ in range(3):
                streams += await d.load.send([*stories(NUM_STREAMS, max_tokens=60), *long_prompts(4, d.salt())])
            [instance] = d.instances_of(node, "decode")
            assert (await d.report(instance)).load.generation_tokens_total > 0
            # It says something now and then: every five seconds while it has work.
            disk.free()
            async with asyncio.timeout(30):
                while log.stat().st_size <= size:
                    streams += await d.load.send(stories(NUM_STREAMS, max_tokens=60))
            row = await settle(d, streams, since=since, whole=False)
    finally:
        d.roles["decode"] -= 1
        disk.unmount()
    await d.whole()
    return row


async def _many_lines(d: Deployment, num: int, *, path: str = "/v1/chat/completions") -> float:
    """Requests that only write a line to the access log. Returns the longest answer in seconds."""
    loop = asyncio.get_running_loop()
    url = f"http://{d.hosts['head'].address}:{PORT}{path}"
    slowest = 0.0
    body = {"model": "nobody-serves-this", "messages": [{"role": "user", "content": "x"}]}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as session:
        for _ in range(num):
            begin = loop.time()
            async with session.post(url, json=body) as response:
                assert response.status == 404, response.status
                await response.read()
            slowest = max(slowest, loop.time() - begin)
    return slowest


async def output_unread(d: Deployment) -> Row:
    """Whoever reads the node's output stops reading: as with Ctrl-S, or a log collector that hangs."""
    head = d.nodes["head"]
    since = asyncio.get_running_loop().time()
    num_lines = len(head.lines)
    with head.unread():
        slowest = await _many_lines(d, NUM_LINES)
        streams = await d.load.send([*stories(NUM_STREAMS), *long_prompts(4, d.salt())])
        row = await settle(d, streams, since=since)
        assert len(head.lines) < num_lines + NUM_LINES, "its output was read"
    await d.until(lambda: len(head.lines) >= num_lines + NUM_LINES, 30, "what was not read comes")
    row.notes.append(f"{NUM_LINES} lines nobody read; slowest answer {slowest * 1e3:.0f} ms")
    return row


async def supervisor_frozen(d: Deployment) -> Row:
    """The head's supervisor stands still: nobody reads what the Frontend and the Router write."""
    supervisor = d.nodes["head"].process.pid
    since = asyncio.get_running_loop().time()
    os.kill(supervisor, signal.SIGSTOP)
    try:
        slowest = await _many_lines(d, NUM_LINES)
        streams = await d.load.send([*stories(NUM_STREAMS), *long_prompts(4, d.salt())])
        row = await settle(d, streams, since=since)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    row.notes.append(f"{NUM_LINES} lines nobody read; slowest answer {slowest * 1e3:.0f} ms")
    return row


def _set_clock(file: Path, offset_s: int) -> None:
    """Whole or not at all, for somebody who reads it at any time."""
    new = file.with_suffix(".new")
    new.write_text(str(offset_s))
    new.replace(file)


async def clock_jumps(d: Deployment) -> Row:
    """The wall clock of a node with Frontend, Processor and a decode worker goes an hour forward, then back."""
    clock = d.state_dir / f"clock-{d.lane.name}"
    _set_clock(clock, 0)
    paths = (str(SITE), os.environ.get("PYTHONPATH"))
    env = {"CHAOS_CLOCK": str(clock), "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    flags = ("--Frontend.port=8002", "--VllmWorker.ServiceArgs.workers=1", NO_WORKERS[1], *NO_ROUTER)
    d.roles["decode"] += 1
    try:
        async with d.joined("clock", "head", "faulty.py", *flags, env=env) as node:
            await d.whole()
            load = d.load_at(8002)
            await d.until_served(load)
            ids = {i.instance_id for role in ("frontend", "decode") for i in d.instances_of(node, role)}
            assert len(ids) == 2
            since = asyncio.get_running_loop().time()
            streams: list[Stream] = []
            for offset in (HOUR_S, -HOUR_S):
                running = load.start([*stories(4), *long_prompts(1, d.salt())])
                await load.streaming(running)
                _set_clock(clock, offset)
                streams += await load.finish(running)
            row = await settle(d, streams, since=since)
            hours = {
                int(m.group(1)) for line in node.lines if (m := re.search(r"\d{4}-\d\d-\d\dT(\d\d):\d\d:\d\d", line))
            }
            assert len(hours) > 1, "no line of the node's log shows that its clock jumped"
            now = {i.instance_id for role in ("frontend", "decode") for i in d.instances_of(node, role)}
            assert now == ids, "an instance lost its lease"
    finally:
        d.roles["decode"] -= 1
    await d.whole()
    return row
