"""What vLLM is told on each node of an engine over several, without vLLM."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import stator
from stator.engines.base import NodePlace, SpreadEngine
from stator.engines.vllm import args, started
from stator.engines.vllm.args import VllmSettings, settings_from_section
from stator.engines.vllm.engine import VllmEngine
from stator.engines.vllm.further_node import FurtherNode
from stator.errors import ConfigError
from stator.ids import InstanceId
from stator.transport.settings import Identity

TINY = str(Path(stator.__file__).parent / "models" / "tiny-llama")
SECTION = {"model": TINY, "tensor-parallel-size": 2, "nnodes": 2, "hf-token": "hf_secret"}
PLACE = NodePlace(1, ("127.0.0.1", "127.0.0.1"), InstanceId("first"), "127.0.0.1", 29_555)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"node-rank": 1}, "node-rank cannot be set: the nodes of one engine find each other"),
        ({"master-addr": "a"}, "master-addr cannot be set"),
        ({"data-parallel-size": 2}, "nnodes is 2 and data-parallel-size 2"),
        ({"distributed-executor-backend": "ray"}, "distributed-executor-backend is ray: with nnodes 2 it must be mp"),
    ],
)
def test_flags_that_do_not_go_with_several_nodes(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_from_section({**SECTION, **flags})


def test_what_must_be_equal_is_text_without_secrets_and_without_what_is_a_nodes_own() -> None:
    connector = {"kv_connector": "DynamoNixlConnector", "kv_role": "kv_both"}
    made = args.shared_settings(
        settings_from_section({**SECTION, "master-port": 1, "block-size": None, "kv-transfer-config": connector})
    )
    assert made == {
        "model": TINY,
        "served-model-name": TINY,
        "tensor-parallel-size": "2",
        "nnodes": "2",
        "kv-transfer-config": '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}',
        "vLLM's version": made["vLLM's version"],
    }
    as_text = settings_from_section({**SECTION, "kv-transfer-config": json.dumps(connector)})
    assert args.shared_settings(as_text) == made


def test_an_address_that_is_none_is_named() -> None:
    assert args.node_environment(PLACE) == {"VLLM_HOST_IP": "127.0.0.1"}
    with pytest.raises(
        ConfigError, match="no-such-host.invalid, where other nodes reach this one, has no address here"
    ):
        args.node_environment(NodePlace(0, ("no-such-host.invalid", "b"), InstanceId("first"), "a", 1))


class FakeExecutor:
    def __init__(self) -> None:
        self.callback: Callable[[], None] | None = None
        self.shut_down = 0

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def shutdown(self) -> None:
        self.shut_down += 1
        # As vLLM's monitor, whose workers end by it.
        assert self.callback is not None
        self.callback()


class FakeLaunch:
    def __init__(self) -> None:
        self.arguments: list[str] = []
        self.executor = FakeExecutor()

    def has_gpu(self) -> bool:
        return False

    async def start(self, arguments: list[str], record: started.Record) -> started.StartedVllm:
        raise AssertionError("a further node has no front end")

    async def start_further_node(self, arguments: list[str]) -> FurtherNode:
        self.arguments = arguments
        return FurtherNode(self.executor)

    def option(self, name: str) -> str:
        return self.arguments[self.arguments.index(f"--{name}") + 1]


class FakeHost:
    instance_id = InstanceId("second")
    identity = Identity("ns", InstanceId("second"), "decode", "secret")
    addresses = ("tcp://127.0.0.1:7000",)
    client = cast(Any, None)

    def __init__(self) -> None:
        self.dead: asyncio.Queue[str] = asyncio.Queue(4)

    def register(self, endpoint: object) -> None:
        raise AssertionError("nothing is served")

    def on_dead(self, reason: str) -> None:
        self.dead.put_nowait(reason)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    copied = {key: value for key, value in os.environ.items() if not key.startswith("VLLM")}
    monkeypatch.setattr(os, "environ", copied)
    return copied


def test_a_further_node_is_a_part_of_the_first_ones_engine(environment: dict[str, str]) -> None:
    async def main() -> None:
        launch, host = FakeLaunch(), FakeHost()
        engine = VllmEngine(settings_from_section(SECTION), launcher=launch)
        assert isinstance(engine, SpreadEngine) and engine.num_nodes == 2
        engine.place = PLACE
        await engine.start_further_node(host)
        flags = {name: launch.option(name) for name in ("nnodes", "node-rank", "master-addr", "master-port")}
        assert flags == {"nnodes": "2", "node-rank": "1", "master-addr": "127.0.0.1", "master-port": "29555"}
        transfer = json.loads(launch.option("kv-transfer-config"))
        extra = transfer["kv_connector_extra_config"]
        # Peers ask for the engine by its first node's name, at this node's address; the token is this node's own file.
        assert (transfer["engine_id"], extra["instance_id"], extra["advertise"]) == ("first", "first", "127.0.0.1")
        token_file = Path(extra["token_file"])
        assert await asyncio.to_thread(token_file.read_text) == "secret"
        assert environment["VLLM_HOST_IP"] == "127.0.0.1"
        assert environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") is None
        assert launch.executor.callback is not None
        await asyncio.to_thread(launch.executor.callback)
        assert "one of vLLM's worker processes ended" in await host.dead.get()
        await engine.stop()
        await engine.stop()
        assert launch.executor.shut_down == 1 and host.dead.empty() and not token_file.parent.exists()

    asyncio.run(main())


def test_one_node_is_told_nothing_of_others() -> None:
    settings = settings_from_section({"model": TINY})
    assert isinstance(settings, VllmSettings) and settings.num_nodes == 1
    line = args.command_line(settings, model=TINY, kv_transfer={})
    assert not [argument for argument in line if argument.startswith(("--nnodes", "--node", "--master"))]
