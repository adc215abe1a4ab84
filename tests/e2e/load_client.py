"""Sends chat requests at once and prints what came back, one JSON list on stdout. Run inside the head's namespace.

Input on stdin: {"url": ..., "requests": [{"body": {...}}, ...]}; each result: {"status", "text", "finish_reason",
"usage", "done" (a stream ended with [DONE]), "error", "num_chunks", "first_s", "total_s"}.
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp


async def one(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"text": "", "finish_reason": None, "usage": None, "done": False, "error": None}
    started = time.monotonic()
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
                await read_stream(response, result, started)
    except Exception as error:
        result["error"] = repr(error)
    result["total_s"] = time.monotonic() - started
    return result


async def read_stream(response: aiohttp.ClientResponse, result: dict[str, Any], started: float) -> None:
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
        result.setdefault("first_s", time.monotonic() - started)
        result["num_chunks"] += 1
        result["usage"] = event.get("usage") or result["usage"]
        for choice in event["choices"]:
            delta = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if delta and result["finish_reason"]:
                result["error"] = "text after the end"
            result["text"] += delta or ""
            if choice["finish_reason"]:
                if result["finish_reason"]:
                    result["error"] = "two endings"
                result["finish_reason"] = choice["finish_reason"]


async def main() -> None:
    plan = json.load(sys.stdin)
    timeout = aiohttp.ClientTimeout(total=plan.get("timeout_s", 240))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        results = await asyncio.gather(*(one(session, plan["url"], r["body"]) for r in plan["requests"]))
    json.dump(results, sys.stdout)


asyncio.run(main())
