"""The router's predicted overlap against vLLM's own count of cached tokens, over conversations of many turns."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import stator
from stator.core.routing import RouterMode
from stator.testing.routing_world import RoutingWorld, routing_world
from vllm_engines import forked

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

NUM_SESSIONS = 16
NUM_TURNS = 8
SECTION: dict[str, Any] = {
    "model": str(Path(stator.__file__).parent / "models" / "tiny-llama"),
    "served_model_name": "tiny-llama",
    "block_size": 32,
    "max_model_len": 1024,
    # Less than the conversations take in all: blocks are evicted meanwhile.
    "num_gpu_blocks_override": 121,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 16,
    "enforce_eager": True,
}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    forked.prepare()
    with asyncio.Runner() as runner:
        yield runner


async def converse(world: RoutingWorld, number: int) -> None:
    rng = Random(number)
    history = [1000 + n for n in range(40)]  # a system prompt that all share
    for _ in range(NUM_TURNS):
        history += rng.choices(range(300, 3000), k=rng.randrange(15, 70))
        await world.ask(history, 4, {"x-session-id": f"s{number}"})


def test_predictions_that_rest_on_events_are_exact(
    runner: asyncio.Runner, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> dict[str, dict[str, int]]:
        async with routing_world(RouterMode.KV, 2, lambda: forked.engine(SECTION)) as world:
            # A few at a time, so that a worker computes several while it evicts for others.
            for first in range(0, NUM_SESSIONS, 4):
                async with asyncio.TaskGroup() as group:
                    for number in range(first, first + 4):
                        group.create_task(converse(world, number))
            assert world.num_requests == NUM_SESSIONS * NUM_TURNS
            return world.stats().predictions

    predictions = runner.run(asyncio.wait_for(scenario(), 280))
    exact = predictions.get("exact", {}).get("events", 0)
    compared = sum(by_basis.get("events", 0) for by_basis in predictions.values())
    share = exact / compared
    record_property("exact_share", share)
    with capsys.disabled():  # a figure, not only a bound
        sys.stdout.write(f"\nexact predictions: {exact} of {compared} ({share:.1%}); all: {predictions}\n")
    assert compared >= 0.8 * NUM_SESSIONS * NUM_TURNS
    assert share >= 0.99
