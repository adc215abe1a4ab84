import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from stator.config.token_file import read_token_file
from stator.engines.vllm.connectors import (
    NIXL_CONNECTOR,
    NIXL_HOST,
    NIXL_PORT,
    STATOR_CONNECTOR,
    TransferPlane,
    free_port,
    plan_connector,
    read_config,
    write_token_file,
)
from stator.engines.vllm.tcp_worker import ConnectorSettings
from stator.errors import ConfigError
from stator.ids import InstanceId

PLANE = TransferPlane("n", InstanceId("i"), Path("/t"), host="127.0.0.1", hold_s=12.0)


def plan(value: Any, gpu: bool = False, **environment: str) -> Any:
    return plan_connector(value, PLANE, gpu=gpu, environment=environment)


def test_ours_is_the_default_without_gpus() -> None:
    for value in (None, {}, "{}", {"kv_connector": STATOR_CONNECTOR}):
        made = plan(value)
        assert made.name == made.config["kv_connector"] == STATOR_CONNECTOR
        assert made.config["kv_role"] == "kv_both"
        assert made.config["kv_load_failure_policy"] == "recompute"
        assert made.config["kv_connector_module_path"] == "stator.engines.vllm.tcp_connector"
        assert made.environment == {}
        settings = ConnectorSettings.parse(json.loads(json.dumps(made.config["kv_connector_extra_config"])))
        assert (settings.namespace, settings.instance_id, settings.token_file) == ("n", "i", "/t")
        assert (settings.port, settings.hold_s, settings.advertise) == (0, 12.0, None)


def test_nixl_is_the_default_with_gpus() -> None:
    made = plan(None, gpu=True)
    assert made.name == NIXL_CONNECTOR
    assert "kv_buffer_device" not in made.config
    assert made.config["kv_connector_extra_config"] == {"kv_lease_duration": 12}
    assert made.environment[NIXL_HOST] == "127.0.0.1"
    assert 1024 <= int(made.environment[NIXL_PORT]) <= 65535
    assert made.worker_extension is not None


def test_nixl_on_a_cpu_buffers_there() -> None:
    assert plan({"kv_connector": NIXL_CONNECTOR}).config["kv_buffer_device"] == "cpu"


def test_the_older_name_is_read_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert plan('{"kv_connector":"DynamoNixlConnector"}').name == NIXL_CONNECTOR
    assert [r.message for r in caplog.records] == [
        "kv-transfer-config: DynamoNixlConnector is an older name of NixlConnector"
    ]


def test_what_the_user_says_stays() -> None:
    value = {
        "kv_connector": NIXL_CONNECTOR,
        "kv_role": "kv_producer",
        "kv_load_failure_policy": "fail",
        "kv_buffer_device": "cuda",
        "kv_connector_extra_config": {"kv_lease_duration": 60, "backends": ["UCX"]},
    }
    before = json.dumps(value)
    made = plan(value, gpu=True, **{NIXL_HOST: "127.0.0.1", NIXL_PORT: str(free_port("127.0.0.1"))})
    assert made.config == value
    assert made.environment == {}
    assert json.dumps(value) == before
    extra = plan({"kv_connector_extra_config": {"port": 7000, "hold_s": 3}}).config["kv_connector_extra_config"]
    assert (extra["port"], extra["hold_s"], extra["namespace"]) == (7000, 3, "n")


def test_a_port_that_another_worker_has_is_refused_since_vllm_would_wait_for_ever() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"{NIXL_PORT}: port {port} on 127.0.0.1 cannot be listened on"):
            plan({"kv_connector": NIXL_CONNECTOR}, gpu=True, **{NIXL_HOST: "127.0.0.1", NIXL_PORT: port})
    for port in ("x", "65536", "-1"):
        with pytest.raises(ConfigError, match="expected a TCP port"):
            plan({"kv_connector": NIXL_CONNECTOR}, gpu=True, **{NIXL_PORT: port})


def test_others_pass_through() -> None:
    value = {"kv_connector": "MooncakeConnector", "kv_connector_extra_config": {"a": 1}}
    made = plan(value, gpu=True)
    assert made.config == {**value, "kv_role": "kv_both"}
    assert (made.environment, made.worker_extension) == ({}, None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{kv", "not JSON"),
        ("[1]", "expected a mapping"),
        ({"kv_connector": 3}, "expected a connector's name"),
        ({"kv_connector_extra_config": [1]}, "not a mapping"),
        ({"kv_connector_extra_config": {"token": "s"}}, "token_file"),
    ],
)
def test_what_cannot_be_used_is_named(value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(value)


def test_reading_nothing_gives_nothing() -> None:
    assert read_config(None) == {}


def test_ports_are_free_and_consecutive() -> None:
    first = free_port("127.0.0.1", 3)
    for port in range(first, first + 3):
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", port))
    with pytest.raises(ConfigError, match="advertise"):
        free_port("192.0.2.1")


def test_a_token_file_is_for_this_user_alone(tmp_path: Path) -> None:
    path = write_token_file("secret", tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_token_file(path) == "secret"
    assert write_token_file("secret", tmp_path) != path
