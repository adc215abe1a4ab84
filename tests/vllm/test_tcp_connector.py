"""StatorConnector between real vLLM engines on the CPU, in float32: same text, and no block left behind."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stator
from stator.engines.vllm.connectors import STATOR_CONNECTOR, TransferPlane, plan_connector, write_token_file
from stator.engines.vllm.transfer import prefill_params
from stator.ids import InstanceId, TransferId
from vllm_engines.engine_process import RemoteEngine, engine_processes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

SIZE = 32
NUM_TOKENS = 8
HOLD_S = 2.0
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 97, 200, 500)


class World:
    """Two engines that decode and prefill; `spare` is another prefill engine, for tests that kill it."""

    def __init__(self, engines: list[RemoteEngine]) -> None:
        self.prefill, self.decode, self.spare = engines
        self._serial = 0

    def name(self) -> str:
        self._serial += 1
        return f"r{self._serial}"

    def hold(self, engine: RemoteEngine, ids: list[int]) -> dict[str, Any]:
        name = self.name()
        result = engine.run(name, ids, 1, prefill_params(STATOR_CONNECTOR, TransferId(name)))
        assert result["params"]["transfer_id"] == name
        return result["params"]

    def text(self, engine: RemoteEngine, ids: list[int], params: dict[str, Any] | None = None) -> list[int]:
        return engine.run(self.name(), ids, NUM_TOKENS, params)["ids"]

    def assert_free(self) -> None:
        for engine in (self.prefill, self.decode):
            state = engine.wait_idle()
            assert (state["used"], state["requests"], state["loads"]) == (0, 0, 0)
            counts = state["counts"]
            assert (counts["num_blocks_held"], counts["num_transfers_held"], counts["num_loading"]) == (0, 0, 0)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(300, 3000) for _ in range(length)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("vllm")
    token_file = write_token_file("secret", directory)
    model = str(Path(stator.__file__).parent / "models" / "tiny-llama")
    with engine_processes(3, directory) as engines:
        for number, engine in enumerate(engines):
            plane = TransferPlane("n", InstanceId(f"e{number}"), token_file, hold_s=HOLD_S, timeout_s=20.0)
            engine.start(
                model=model,
                dtype="float32",
                block_size=SIZE,
                enforce_eager=True,
                kv_cache_memory_bytes=16 << 20,
                max_model_len=1024,
                kv_transfer_config=plan_connector(None, plane, gpu=False, environment={}).config,
            )
        yield World(engines)


def test_same_text_as_local_and_every_block_freed(world: World) -> None:
    before = world.decode.wait_idle()["counts"]
    for length in LENGTHS:
        ids = prompt(length)
        params = world.hold(world.prefill, ids)
        assert world.prefill.state()["counts"]["num_blocks_held"] == -(-length // SIZE)
        assert world.text(world.decode, ids, params) == world.text(world.prefill, ids)
        world.assert_free()
    after = world.decode.state()["counts"]
    assert after["loads_failed_total"] == before["loads_failed_total"]
    # A prompt of one token has nothing to load: its only token is computed again.
    assert after["loads_total"] - before["loads_total"] == len(LENGTHS) - 1


def test_what_is_loaded_becomes_the_decode_engines_prefix_cache(world: World) -> None:
    ids = prompt(4 * SIZE, seed=1)
    world.decode.run(world.name(), ids[: SIZE + 1], 1)
    expected = world.text(world.prefill, ids)
    assert world.text(world.decode, ids, world.hold(world.prefill, ids)) == expected
    loads = world.decode.state()["counts"]["loads_total"]
    # All but the last token is cached here now: the second transfer is only released.
    longer = [*ids, 7]
    again = world.decode.run(world.name(), longer, NUM_TOKENS, world.hold(world.prefill, longer))
    assert again["ids"] == world.text(world.prefill, longer)
    assert again["cached"] == 4 * SIZE
    assert world.decode.state()["counts"]["loads_total"] == loads
    world.assert_free()


def test_many_at_once(world: World) -> None:
    prompts = [prompt(SIZE * (n % 4) + 5 + n, seed=2) for n in range(12)]
    expected = [world.text(world.prefill, ids) for ids in prompts]
    held = [world.hold(world.prefill, ids) for ids in prompts]
    for number, (ids, params) in enumerate(zip(prompts, held, strict=True)):
        world.decode.submit(f"many{number}", ids, NUM_TOKENS, params)
    assert [world.decode.wait(f"many{number}")["ids"] for number in range(12)] == expected
    world.assert_free()


def test_parameters_that_do_not_fit_cost_only_time(world: World) -> None:
    ids = prompt(3 * SIZE, seed=3)
    params = world.hold(world.prefill, ids)
    expected = world.text(world.prefill, ids)
    for wrong in ({"block_size": 64}, {"tp_size": 2}, {"transfer_id": "unknown"}, {"remote_addresses": "x"}):
        assert world.text(world.decode, [*ids], {**params, **wrong}) == expected
        world.decode.reset_prefix_cache()
    world.assert_free()


def test_a_hold_that_nobody_fetches_expires(world: World) -> None:
    world.hold(world.prefill, prompt(100, seed=4))
    assert world.prefill.state()["counts"]["num_blocks_held"] == 4
    world.assert_free()


@pytest.mark.parametrize("where", ["prefill", "waiting", "loading"])
def test_a_cancel_storm_leaves_no_block(world: World, where: str) -> None:
    prompts = [prompt(500, seed=10 + n) for n in range(8)]
    if where == "prefill":
        for number, ids in enumerate(prompts):
            world.prefill.submit(f"{where}{number}", ids, 1, prefill_params(STATOR_CONNECTOR, TransferId(f"{number}")))
        for number in range(8):
            world.prefill.abort(f"{where}{number}")
    else:
        held = [world.hold(world.prefill, ids) for ids in prompts]
        for number, (ids, params) in enumerate(zip(prompts, held, strict=True)):
            world.decode.submit(f"{where}{number}", ids, NUM_TOKENS, params)
            if where == "waiting":
                world.decode.abort(f"{where}{number}")
        if where == "loading":
            for number in range(8):
                world.decode.abort(f"{where}{number}")
    world.assert_free()


def test_a_prefill_engine_killed_between_its_phases_is_recomputed(world: World) -> None:
    ids = prompt(300, seed=5)
    params = world.hold(world.spare, ids)
    os.kill(world.spare.pid, signal.SIGKILL)
    before = world.decode.state()["counts"]["loads_failed_total"]
    assert world.text(world.decode, ids, params) == world.text(world.prefill, ids)
    assert world.decode.state()["counts"]["loads_failed_total"] == before + 1
    world.assert_free()
