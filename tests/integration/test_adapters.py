"""LoRA adapters as models: requests go to the workers that have them, whatever comes and goes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from deployment import ALWAYS, Deployment, Node, deployed, run

from stator.core.routing import RouterMode
from stator.engines.local.engine import LocalEngine
from stator.engines.sim.args import SimEngineArgs
from stator.engines.sim.engine import SimEngine
from stator.errors import ErrorCode, StatorError
from stator.messages.lora import LoadLora, UnloadLora
from stator.runtime.directory import register_instance
from stator.testing.fake_runner import FakeRunner
from stator.testing.routing_world import Answer, RoutingWorld, Worker, eventually, routing_world, sim_engines
from stator.worker import WorkerAdapters

PROMPT = list(range(300, 364))
ARGS: dict[str, Any] = {
    "model": "stator:tiny-llama", "served_model_name": "tiny-llama", "step_times": "tiny-llama", "block_size": 16,
    "num_gpu_blocks_override": 256, "enable_lora": True, "max_lora_rank": 16, "sim_speed": 20.0,
}  # fmt: skip


def adapter(directory: Path, name: str = "odd", rank: int = 8, alpha: int = 16) -> str:
    made = directory / name
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha}))
    return str(made)


@asynccontextmanager
async def two_workers(**args: Any) -> AsyncIterator[tuple[RoutingWorld, Worker, Worker]]:
    engines = sim_engines(SimEngineArgs(**{**ARGS, **args}))
    async with routing_world(RouterMode.KV, 2, engines, in_process=True, adapters=True) as world:
        yield world, *world.workers


async def ask(world: RoutingWorld, model: str, max_tokens: int = 6) -> Answer:
    return await world.ask(PROMPT, max_tokens, {"x-stator-explain": "1"}, model=model)


async def refused(world: RoutingWorld, model: str) -> StatorError:
    with pytest.raises(StatorError) as raised:
        await ask(world, model)
    return raised.value


def test_requests_for_an_adapter_go_where_it_is(tmp_path: Path) -> None:
    path = adapter(tmp_path)

    async def scene() -> None:
        async with two_workers() as (world, one, two):
            error = await refused(world, "odd")
            assert (error.code, error.param) == (ErrorCode.MODEL_NOT_FOUND, "model")
            plain = [await ask(world, "tiny-llama") for _ in range(2)]
            assert (await two.adapters.load(LoadLora("odd", path))).adapter.name == "odd"
            first = await ask(world, "odd")
            assert (first.instance, first.cached) == (two.instance.instance_id, 0)
            assert first.text != plain[0].text
            again = await ask(world, "odd")
            assert (again.instance, again.cached, again.text) == (first.instance, 63, first.text)
            assert plain[1].cached == 63

            await one.adapters.load(LoadLora("odd", path))
            await two.adapters.unload(UnloadLora("odd"))
            moved = await ask(world, "odd")
            assert (moved.instance, moved.text) == (one.instance.instance_id, first.text)
            await one.adapters.unload(UnloadLora("odd"))
            assert (await refused(world, "odd")).code is ErrorCode.MODEL_NOT_FOUND
            assert (await ask(world, "tiny-llama")).text == plain[0].text

    run(scene)


def test_the_blocks_of_an_adapter_are_predicted(tmp_path: Path) -> None:
    async def scene() -> None:
        async with two_workers() as (world, one, two):
            for worker in (one, two):
                await worker.adapters.load(LoadLora("odd", adapter(tmp_path, worker.instance.instance_id)))
            warm = await ask(world, "odd")
            seen = [await ask(world, "odd") for _ in range(3)]
            assert [(each.instance, each.cached) for each in seen] == [(warm.instance, 63)] * 3
            assert [each.first.overlap_blocks for each in seen] == [4] * 3

    run(scene)


def test_an_unload_lets_requests_finish(tmp_path: Path) -> None:
    path = adapter(tmp_path)

    async def scene() -> None:
        async with two_workers() as (world, one, _):
            await one.adapters.load(LoadLora("odd", path))
            running = asyncio.ensure_future(ask(world, "odd", 200))
            await until_running(one)
            unloaded = await one.adapters.unload(UnloadLora("odd"))
            assert unloaded.num_ended == 0 and running.done()
            assert (await running).usage.completion_tokens == 200
            assert one.adapters.shown == ()

    run(scene)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_what_has_no_time_to_finish_goes_on_elsewhere_or_says_why_not(tmp_path: Path, elsewhere: bool) -> None:
    path = adapter(tmp_path)

    async def scene() -> None:
        async with two_workers() as (world, one, two):
            await one.adapters.load(LoadLora("odd", path))
            whole = await ask(world, "odd", 100)
            running = asyncio.ensure_future(ask(world, "odd", 100))
            await until_running(one)
            if elsewhere:
                await two.adapters.load(LoadLora("odd", path))
            assert (await one.adapters.unload(UnloadLora("odd", timeout_s=0.0))).num_ended == 1
            if elsewhere:
                assert (await running).text == whole.text
                assert two.load.generation_tokens_total > 0
            else:
                with pytest.raises(StatorError, match="'odd' was unloaded while the request ran") as raised:
                    await running
                assert raised.value.code is ErrorCode.NO_INSTANCE

    run(scene)


def test_a_request_that_waits_for_room_ends_when_its_adapter_leaves(tmp_path: Path) -> None:
    path = adapter(tmp_path)

    async def scene() -> None:
        async with two_workers(max_num_seqs=1) as (world, one, two):
            await one.adapters.load(LoadLora("odd", path))
            busy = [asyncio.ensure_future(ask(world, "tiny-llama", 1000)) for _ in range(8)]
            await until_running(one)
            await until_running(two)
            waiting = asyncio.ensure_future(ask(world, "odd"))
            await eventually(lambda: world.stats().num_waiting >= 1)
            await eventually(lambda: any(call.request.lora_name for call, _ in world.router._waiting._calls.values()))
            await one.adapters.unload(UnloadLora("odd"))
            with pytest.raises(StatorError, match="no worker of tiny-llama that has the adapter 'odd' is ready"):
                await waiting
            for each in busy:
                each.cancel()
            await asyncio.gather(*busy, return_exceptions=True)

    run(scene)


def test_a_load_that_cannot_be_says_why(tmp_path: Path) -> None:
    path = adapter(tmp_path)

    async def scene() -> None:
        async with two_workers() as (_, one, two):
            for request, code, words in [
                (LoadLora("odd", "/nowhere"), ErrorCode.NOT_FOUND, "there is no directory /nowhere on this node"),
                (LoadLora("odd", str(tmp_path)), ErrorCode.NOT_FOUND, "has no adapter_config.json"),
                (
                    LoadLora("odd", adapter(tmp_path, "big", 64)),
                    ErrorCode.INVALID_REQUEST,
                    "is 64, above max-lora-rank",
                ),
                (LoadLora("tiny-llama", path), ErrorCode.INVALID_REQUEST, "is the name of a model"),
                (LoadLora(" odd", path), ErrorCode.INVALID_REQUEST, "no space around"),
                (LoadLora("odd", "odd"), ErrorCode.INVALID_REQUEST, "not an absolute path"),
            ]:
                with pytest.raises(StatorError, match=words) as raised:
                    await one.adapters.load(request)
                assert raised.value.code is code
            await one.adapters.load(LoadLora("odd", path))
            assert (await one.adapters.load(LoadLora("odd", path))).already
            other = adapter(tmp_path, "other", alpha=32)
            with pytest.raises(StatorError, match=f"loaded already, from {path}"):
                await one.adapters.load(LoadLora("odd", other))
            with pytest.raises(StatorError, match="worker-0 has another adapter under the name 'odd'"):
                await two.adapters.load(LoadLora("odd", other))
            assert two.adapters.shown == ()
            with pytest.raises(StatorError, match="loaded are: odd"):
                await one.adapters.unload(UnloadLora("even"))
        async with two_workers(enable_lora=False) as (_, one, _):
            with pytest.raises(StatorError, match="enable-lora") as raised:
                await one.adapters.load(LoadLora("odd", path))
            assert raised.value.code is ErrorCode.UNSUPPORTED

    run(scene)


# Prefill.


async def add_adapters(d: Deployment, node: Node) -> WorkerAdapters:
    async def show(adapters: Any) -> None:
        known = d.directory.get(node.instance_id)
        assert known is not None
        shown = msgspec.structs.replace(known, adapters=adapters)
        await register_instance(d.discovery, node.lease, shown)
        await d.directory.wait_for(lambda directory: directory.get(node.instance_id) == shown, 5)

    made = WorkerAdapters(
        engine=node.engine, info=node.info, instance_id=node.instance_id, directory=d.directory, show=show, settle_s=0
    )
    made.user = node.worker
    node.worker._adapters = made
    return made


def sim_engine(args: dict[str, Any], runner: FakeRunner) -> LocalEngine:
    values = {"step_times": "tiny-llama", "sim_speed": 100.0, "enable_lora": True, **args}
    return SimEngine(SimEngineArgs(**values), runner_factory=lambda _: runner, rng=Random(1))


def test_prompts_for_an_adapter_are_prefilled_where_it_is(tmp_path: Path) -> None:
    path, prompt = adapter(tmp_path), list(range(10, 60))

    async def scene() -> None:
        async with deployed(make_engine=sim_engine) as d:
            decode, prefill = await d.add_decode(ALWAYS), await d.add_prefill()
            here, there = await add_adapters(d, decode), await add_adapters(d, prefill)
            await here.load(LoadLora("odd", path))
            assert isinstance(decode.engine, SimEngine)
            await d.generate(decode, prompt, lora_name="odd").wait()
            assert decode.worker.report().prefills == {"local": 1, "remote": 0, "fallback": 0}
            await there.load(LoadLora("odd", path))
            await decode.engine.reset_prefix_cache()
            await d.generate(decode, prompt, lora_name="odd").wait()
            assert decode.worker.report().prefills == {"local": 1, "remote": 1, "fallback": 0}
            assert prefill.worker.report().prefills["done"] == 1

            # It leaves while the job is on its way: the decode worker does it after all.
            await decode.engine.reset_prefix_cache()
            there._refused.add("odd")
            late = await d.generate(decode, prompt, lora_name="odd").wait()
            assert late.error is None and len(late.token_ids) == 8
            assert decode.worker.report().prefills == {"local": 1, "remote": 1, "fallback": 1}
            assert prefill.worker.report().prefills["refused"] == 1
            there._refused.clear()
            await there.unload(UnloadLora("odd"))
            await d.generate(decode, prompt, lora_name="odd").wait()
            assert decode.worker.report().prefills == {"local": 2, "remote": 1, "fallback": 1}

    run(scene)


async def until_running(worker: Worker) -> None:
    before = worker.load.generation_tokens_total
    await eventually(lambda: worker.load.num_running > 0 and worker.load.generation_tokens_total > before + 2)
