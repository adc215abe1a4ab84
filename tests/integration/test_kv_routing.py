"""KV-aware routing with all parts real: four local engines, their KV events, a Router, a Processor, loopback TCP."""

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest

from stator.core.routing import RouterMode
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.load import numpy_runner
from stator.frontend.app import FrontendApp
from stator.frontend.health import HealthReport
from stator.messages.openai import ModelCard
from stator.observability.metrics import Metrics
from stator.testing.fake_runner import FakeRunner
from stator.testing.routing_world import MODEL, Outcome, RoutingWorld, eventually, local_engines, outcome, routing_world

BLOCK = 16


def args(num_blocks: int, max_model_len: int = 512) -> LocalEngineArgs:
    return LocalEngineArgs(
        model=f"stator:{MODEL}",
        served_model_name=MODEL,
        block_size=BLOCK,
        num_gpu_blocks_override=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=8,
    )


def fake_runner(engine_args: LocalEngineArgs) -> FakeRunner:
    assert engine_args.num_gpu_blocks_override is not None
    return FakeRunner(block_size=BLOCK, num_blocks=engine_args.num_gpu_blocks_override, vocab_size=4096)


def run(scene: Callable[[], Coroutine[Any, Any, None]], timeout_s: float = 50) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await scene()

    asyncio.run(bounded())


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    """Questions about eight documents: more than one worker's cache holds, less than those of all."""
    rng = Random(seed)
    documents = [rng.choices(range(10, 4000), k=rng.randint(150, 250)) for _ in range(8)]
    return [rng.choice(documents) + rng.choices(range(10, 4000), k=20) for _ in range(count)]


async def indexed(world: RoutingWorld) -> None:
    """Every event of the engines has reached the router: its index holds what they hold, by their own account."""
    held = [0] * len(world.workers)
    for number, worker in enumerate(world.workers):
        blocks: set[int] = set()

        def listen(events: Any, blocks: set[int] = blocks) -> None:
            for event in events:
                blocks.update(event.block_hashes)

        worker.engine.watch_kv(listen)()
        held[number] = len(blocks)
    index = world.router.index
    if index is not None:
        total = sum(held)
        await eventually(lambda: total >= index.stats().num_entries > 0)


async def play(mode: RouterMode, requests: list[list[int]], at_once: int) -> Outcome:
    async with routing_world(mode, 4, local_engines(args(num_blocks=64), fake_runner)) as world:
        answers = []
        for start in range(0, len(requests), at_once):
            some = requests[start : start + at_once]
            answers += await asyncio.gather(*(world.ask(prompt, max_tokens=3) for prompt in some))
        if mode is RouterMode.KV:
            await eventually(lambda: sum(sum(b.values()) for b in world.stats().predictions.values()) == len(requests))
        return outcome(world, answers)


def test_kv_finds_far_more_in_the_caches_than_round_robin_and_predicts_it() -> None:
    async def scene() -> None:
        requests = prompts(160)
        kv = await play(RouterMode.KV, requests, at_once=1)
        turns = await play(RouterMode.ROUND_ROBIN, requests, at_once=1)
        assert kv.hit_rate > 0.75, kv
        assert kv.hit_rate > turns.hit_rate + 0.2, (kv, turns)
        assert kv.computed_tokens < 0.6 * turns.computed_tokens
        assert kv.compared > 100
        assert kv.exact_share > 0.99, kv

    run(scene)


def test_under_concurrency_every_worker_gets_work_and_predictions_from_events_hold() -> None:
    async def scene() -> None:
        requests = prompts(240, seed=2)
        kv = await play(RouterMode.KV, requests, at_once=12)
        assert kv.hit_rate > 0.5
        assert kv.request_skew < 1.6
        assert kv.work_skew < 1.6

    run(scene)


def test_the_bundled_model_computes_less_behind_the_kv_router() -> None:
    async def scene() -> None:
        requests = prompts(24, seed=3)
        computed: dict[RouterMode, int] = {}
        for mode in (RouterMode.KV, RouterMode.ROUND_ROBIN):
            async with routing_world(mode, 4, local_engines(args(num_blocks=64), numpy_runner)) as world:
                for prompt in requests:
                    await world.ask(prompt, max_tokens=2)
                computed[mode] = sum(w.load.prompt_tokens_computed_total for w in world.workers)
        assert computed[RouterMode.KV] < 0.8 * computed[RouterMode.ROUND_ROBIN], computed

    run(scene)


def test_a_session_stays_and_bookings_end() -> None:
    async def scene() -> None:
        async with routing_world(RouterMode.KV, 4, local_engines(args(num_blocks=64), fake_runner)) as world:
            rng = Random(4)
            history = rng.choices(range(10, 4000), k=12)
            places: set[str] = set()
            for _ in range(6):
                answer = await world.ask(history, headers={"x-session-id": "s1"})
                places.add(answer.instance)
                history += rng.choices(range(10, 4000), k=9)
            assert len(places) == 1
            await eventually(lambda: world.stats().num_bookings == 0)

    run(scene)


def test_a_worker_that_dropped_its_cache_unnoticed_is_named_and_trusted_less(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with routing_world(RouterMode.KV, 1, local_engines(args(num_blocks=64), fake_runner)) as world:
            prompt = Random(5).choices(range(10, 4000), k=200)
            await world.ask(prompt)
            await indexed(world)
            index, worker = world.router.index, world.workers[0]
            assert index is not None
            index.overlaps = lambda hashes: {worker.instance.instance_id: len(hashes)}  # type: ignore[method-assign]
            with caplog.at_level(logging.WARNING, logger="stator.router.router"):
                for number in range(30):
                    await world.ask([5000 % 4000 + number, *prompt], max_tokens=1)
            await eventually(lambda: world.stats().predictions["over"]["events"] >= 20)
            warnings = [r for r in caplog.records if "fewer cached blocks than predicted" in r.message]
            assert len(warnings) == 1, "once a minute at most"
            assert worker.instance.instance_id in warnings[0].message

    run(scene)


def frontend(world: RoutingWorld) -> FrontendApp:
    return FrontendApp(
        client=world.client,
        targets=world.targets,
        models=lambda: [ModelCard(MODEL, 1, 512)],
        health=lambda: HealthReport(True, [], {}),
        metrics=Metrics(),
        rng=Random(1),
    )


async def ask(app: FrontendApp, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
    """(status, headers, body)."""
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": json.dumps(body).encode() if body else b"", "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not parts:
            await gone.wait()
        return parts.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "method": method, "path": path, "headers": raw}, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m["body"] for m in sent[1:])


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_explains_itself_and_the_decision_can_be_fetched(streamed: bool) -> None:
    async def scene() -> None:
        async with routing_world(RouterMode.KV, 4, local_engines(args(num_blocks=64), fake_runner)) as world:
            app = frontend(world)
            prompt = Random(6).choices(range(10, 4000), k=100)
            first = await world.ask(prompt)
            await indexed(world)
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "stream": streamed, "ignore_eos": True}
            status, headers, answer = await ask(app, "POST", "/v1/completions", body, x_stator_explain="1")
            assert status == 200
            assert headers["x-stator-instance"] == first.instance
            assert headers["x-stator-overlap-blocks"] == str(100 // BLOCK)
            assert float(headers["x-stator-cost-ms"]) > 0
            phases = dict(phase.split("=") for phase in headers["x-stator-phases"].split(", "))
            assert phases.keys() == {"route", "engine"} and all(float(ms) > 0 for ms in phases.values())

            text = answer.decode().split("\n\n")[0].removeprefix("data: ") if streamed else answer.decode()
            answer_id = json.loads(text)["id"]
            await eventually(lambda: world.stats().predictions.get("exact", {}).get("events", 0) == 2)
            status, _, found = await ask(app, "GET", f"/v1/stator/decisions/{answer_id}")
            assert status == 200
            (decision,) = json.loads(found)["decisions"]
            assert decision["winner"] == first.instance
            assert decision["cached_tokens"] == 96
            assert decision["overlap_difference"] == 0
            assert len(decision["candidates"]) == 4
            best = decision["candidates"][0]
            assert best["overlap_blocks"] == 6
            assert best["total_ms"] == pytest.approx(float(headers["x-stator-cost-ms"]), abs=1e-3)

            status, headers, _ = await ask(app, "POST", "/v1/completions", body)
            assert status == 200
            assert "x-stator-instance" not in headers
            status, _, found = await ask(app, "GET", "/v1/stator/decisions/nobody")
            assert status == 404
            assert json.loads(found)["error"]["code"] == "not_found"

    run(scene)
