"""Sends chat requests at once and prints what came back, one JSON list on stdout. Run inside the head's namespace.

Input on stdin: {"url": ..., "requests": [{"body": {...}}, ...]}; each result: {"status", "text", "finish_reason",
"usage", "done" (a stream ended with [DONE]), "error", "num_chunks", "first_s", "total_s"}. When every stream has its
first text, a line "streaming" goes to stderr.
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp


class Started:
    """Counts streams that have text."""

    def __init__(self, expected: int) -> None:
        self.left = expected

    def one(self) -> None:
        self.left -= 1
        if not self.left:
            sys.stderr.write("streaming\n")
            sys.stderr.flush()


async def one(session: aiohttp.ClientSession, url: str, body: dict[str, Any], started: Started) -> dict[str, Any]:
    result: dict[str, Any] = {"text": "", "finish_reason": None, "usage": None, "done": False, "error": None}
    sent = time.monotonic()
    try:
        async with session.post(url, json=body) as response:
            result["status"] = response.status
            if not body.get("stream") or response.status != 200:
                answer = await response.json()
                if response.status == 200:
                    choice = answer["choices"][0]
                    result["text"] = choice["message"]["content"] if "message" in choice else choice["text"]
                    result["finish_reason"], result["usage"] = choice["finish_reason"], answer["usage"]
                else:
                    result["error"] = answer["error"]
            else:
                await read_stream(response, result, sent, started)
    except Exception as error:
        result["error"] = repr(error)
    result["total_s"] = time.monotonic() - sent
    return result


async def read_stream(response: aiohttp.ClientResponse, result: dict[str, Any], sent: float, started: Started) -> None:
    result["num_chunks"] = 0
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if result["done"]:
            result["error"] = "data after [DONE]"
        if line.strip() == b"data: [DONE]":
            result["done"] = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            result["error"] = event["error"]
            continue
        result["num_chunks"] += 1
        result["usage"] = event.get("usage") or result["usage"]
        for choice in event["choices"]:
            delta = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if delta and result["finish_reason"]:
                result["error"] = "text after the end"
            if delta and not result["text"]:
                result["first_s"] = time.monotonic() - sent
                started.one()
            result["text"] += delta or ""
            if choice["finish_reason"]:
                if result["finish_reason"]:
                    result["error"] = "two endings"
                result["finish_reason"] = choice["finish_reason"]


async def main() -> None:
    plan = json.load(sys.stdin)
    timeout = aiohttp.ClientTimeout(total=plan.get("timeout_s", 240))
    connector = aiohttp.TCPConnector(limit=0)
    started = Started(len(plan["requests"]))
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        results = await asyncio.gather(*(one(session, plan["url"], r["body"], started) for r in plan["requests"]))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
