"""The configurations of the two large models, unchanged: every engine key reaches vLLM's own AsyncEngineArgs."""

import json
from pathlib import Path
from typing import Any

import pytest

from stator.config.decode import Errors
from stator.config.load import decode_section, load_configuration
from stator.config.schema import PrefillWorkerConfig, VllmWorkerConfig, WorkerConfig
from stator.engines.vllm import args as vllm_args
from stator.engines.vllm.connectors import TransferPlane, plan_connector
from stator.errors import ConfigError
from stator.ids import InstanceId

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "llm" / "configs"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, vLLM looks at once for what is in the cache; nothing of these models is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def worker_config(path: Path, section: str, notices: list[str] | None = None) -> WorkerConfig:
    types = {"VllmWorker": VllmWorkerConfig, "PrefillWorker": PrefillWorkerConfig}
    configuration = load_configuration(path, (), list(types), shown_as=path.name)
    errors = Errors()
    decoded = decode_section(section, types[section], configuration, errors, [] if notices is None else notices)
    assert decoded is not None and not errors.messages
    assert isinstance(decoded.config, WorkerConfig)
    return decoded.config


def engine_args(config: WorkerConfig, *, gpu: bool) -> Any:
    settings = vllm_args.settings_from_section(config.engine_values())
    plane = TransferPlane("stator", InstanceId("i"), Path("/token"), host="127.0.0.1")
    plan = plan_connector(settings.kv_transfer_config, plane, gpu=gpu, environment={})
    return vllm_args.parse(vllm_args.command_line(settings, model=settings.model, kv_transfer=plan.config))


@pytest.mark.parametrize("section", ["VllmWorker", "PrefillWorker"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "multinode-405b.yaml",
            {"model": "nvidia/Llama-3.1-405B-Instruct-FP8", "max_model_len": 8192, "quantization": "modelopt"},
        ),
        (
            "multinode_llama49b.yaml",
            {"model": "nvidia/Llama-3_3-Nemotron-Super-49B-v1", "max_model_len": 2048, "trust_remote_code": True},
        ),
    ],
)
def test_every_engine_key_reaches_vllm(name: str, section: str, expected: dict[str, Any]) -> None:
    config = worker_config(CONFIGS / name, section)
    found = engine_args(config, gpu=True)
    common = {
        "block_size": 64,
        "max_num_seqs": 16,
        "gpu_memory_utilization": 0.95,
        "tensor_parallel_size": 8,
        "enable_prefix_caching": True,
    }
    for key, value in {**common, **expected}.items():
        assert getattr(found, key) == value, key
    assert set(config.engine_args) <= {*common, *expected, "served_model_name"}
    assert found.kv_transfer_config.kv_connector == "NixlConnector"
    assert found.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_the_older_name_of_the_connector(tmp_path: Path) -> None:
    text = (CONFIGS / "multinode-405b.yaml").read_text()
    assert text.count('"kv_connector": "NixlConnector"') == 1
    path = tmp_path / "older.yaml"
    path.write_text(text.replace('"kv_connector": "NixlConnector"', '"kv_connector":"DynamoNixlConnector"'))
    notices: list[str] = []
    found = engine_args(worker_config(path, "VllmWorker", notices), gpu=True)
    assert found.kv_transfer_config.kv_connector == "NixlConnector"
    assert len([notice for notice in notices if "DynamoNixlConnector" in notice]) == 1


def test_vllms_own_refusal_is_a_configuration_error() -> None:
    settings = vllm_args.settings_from_section({"model": "m", "tensor-parallel-size": 2})
    arguments = [*vllm_args.command_line(settings, model="m", kv_transfer={}), "--no-such-flag", json.dumps({})]
    with pytest.raises(ConfigError, match="vLLM refuses a flag"):
        vllm_args.parse(arguments)
