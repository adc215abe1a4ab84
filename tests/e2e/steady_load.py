"""Sends chat requests all the time, so many at once, until its standard input ends; then prints what went wrong.

First line of stdin: {"url": ..., "bodies": [...], "expected": [text, ...], "at_once": N}; the bodies are sent in turn.
"running" goes to stderr when every sender has had an answer. Output: {"num": answers, "num_at": seconds of each answer
since the start, "wrong": [...], "longest_s": of one request}.
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp
from load_client import Started, one


class Load:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.started = time.monotonic()
        self.num_at: list[float] = []
        self.longest_s = 0.0
        self.wrong: list[dict[str, Any]] = []
        self.waiting = plan["at_once"]
        self.over = asyncio.Event()

    async def send(self, session: aiohttp.ClientSession, number: int) -> None:
        bodies, expected = self.plan["bodies"], self.plan["expected"]
        turn, first = number, True
        while not self.over.is_set():
            index = turn % len(bodies)
            turn += 1
            result = await one(session, self.plan["url"], bodies[index], Started(1 << 30))
            self.longest_s = max(self.longest_s, result["total_s"])
            self.num_at.append(round(time.monotonic() - self.started, 2))
            good = result["error"] is None and result["text"] == expected[index]
            if not good or (bodies[index].get("stream") and not result["done"]):
                self.wrong.append({**result, "at_s": self.num_at[-1], "expected": expected[index]})
            if first:
                first = False
                self.waiting -= 1
                if not self.waiting:
                    sys.stderr.write("running\n")
                    sys.stderr.flush()


async def main() -> None:
    load = Load(json.loads(sys.stdin.readline()))
    connector = aiohttp.TCPConnector(limit=0, force_close=load.plan.get("force_close", False))
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
        for number in range(load.plan["at_once"]):
            group.create_task(load.send(session, number))
        await asyncio.to_thread(sys.stdin.read)
        load.over.set()
    report = {"num": len(load.num_at), "num_at": load.num_at, "wrong": load.wrong, "longest_s": load.longest_s}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
