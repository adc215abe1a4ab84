from pathlib import Path
from typing import Any

import pytest

from stator.config.decode import Errors
from stator.config.engine_flags import check_engine_flags, vllm_flags, vllm_version
from stator.config.load import Configuration, decode_section, ignored_flags, load_configuration
from stator.config.schema import WorkerConfig
from stator.config.tree import canonical, parse_yaml
from stator.engines.registry import own_flags

CONFIGS = Path(__file__).resolve().parents[3] / "examples" / "llm" / "configs"


def check(text: str, engine: str = "vllm") -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    errors = Errors()
    nodes = {canonical(key): node for key, node in (parse_yaml(text, "f.yaml").children or {}).items()}
    checked = check_engine_flags(engine, "W", nodes, ["max-local-prefill-length"], errors)
    return checked.values, checked.ignored, errors.messages


def test_the_data_is_of_the_pinned_version() -> None:
    assert vllm_version() == "0.32.0"
    assert len(vllm_flags()) > 200
    assert vllm_flags()["tensor_parallel_size"].types == ["int"]
    assert vllm_flags()["kv_transfer_config"].nested


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("tensor-parallel-size: '8'", {"tensor_parallel_size": 8}),
        ("max-model-len: '8192'", {"max_model_len": 8192}),
        ("max-model-len: 8k", {"max_model_len": 8000}),
        ("max-model-len: 8K", {"max_model_len": 8192}),
        ("max-model-len: auto", {"max_model_len": "auto"}),
        ("enable-prefix-caching: True", {"enable_prefix_caching": True}),
        ("enable_prefix_caching: 'true'", {"enable_prefix_caching": True}),
        ("no-enable-prefix-caching: true", {"enable_prefix_caching": False}),
        ("gpu-memory-utilization: '0.95'", {"gpu_memory_utilization": 0.95}),
        ("gpu-memory-utilization: 1", {"gpu_memory_utilization": 1.0}),
        ("quantization: modelopt", {"quantization": "modelopt"}),
        ("quantization: null", {"quantization": None}),
        ("revision: 1.10", {"revision": "1.10"}),
        ("compilation-config: {mode: 3}", {"compilation_config": {"mode": 3}}),
        ("compilation-config: '{\"mode\": 3}'", {"compilation_config": {"mode": 3}}),
        ("dtype: BFloat16", {"dtype": "bfloat16"}),
        ("allowed-media-domains: a.b", {"allowed_media_domains": ["a.b"]}),
        ("optimization-level: 3", {"optimization_level": 3}),
    ],
)
def test_values_as_users_files_have_them(text: str, values: dict[str, Any]) -> None:
    assert check(text) == (values, (), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tensor-paralel-size: 8",
            "f.yaml:1: W.tensor-paralel-size: unknown key; vLLM 0.32.0 has no such flag (did you mean "
            "tensor-parallel-size?)",
        ),
        (
            "max-local-prefil-length: 8",
            "f.yaml:1: W.max-local-prefil-length: unknown key; vLLM 0.32.0 has no such flag (did you mean "
            "max-local-prefill-length?)",
        ),
        ("max-num-seqs: many", 'f.yaml:1: W.max-num-seqs: found "many", expected a whole number'),
        ("max-num-seqs: true", "f.yaml:1: W.max-num-seqs: found true, expected a whole number"),
        ("seed: null", "f.yaml:1: W.seed: found nothing, expected a whole number"),
        (
            "scheduling-policy: prioritty",
            'f.yaml:1: W.scheduling-policy: found "prioritty", expected one of fcfs, priority (did you mean priority?)',
        ),
        (
            "compilation-config: 3x",
            'f.yaml:1: W.compilation-config: found "3x", expected a mapping or JSON text',
        ),
    ],
)
def test_wrong_flags_name_place_found_and_expected(text: str, message: str) -> None:
    assert check(text) == ({}, (), [message])


def test_another_engine_keeps_its_own_flags_and_names_what_it_has_no_use_for() -> None:
    text = "block-size: 16\nquantization: modelopt\ntensor-parallel-size: 8\nswap-space: 4\ntransfer-hold-s: 3\n"
    assert check(text, "local") == (
        {"block_size": 16, "transfer_hold_s": 3},
        ("quantization", "tensor-parallel-size", "swap-space"),
        [],
    )
    assert check("block-size: '16'\nenable-prefix-caching: 'True'", "local")[0] == {
        "block_size": 16,
        "enable_prefix_caching": True,
    }
    _, _, messages = check("max-num-seqs: many\ntransfer-hold-s: true", "local")
    assert messages == [
        'f.yaml:1: W.max-num-seqs: found "many", expected a whole number',
        "f.yaml:2: W.transfer-hold-s: found true, expected a number",
    ]
    _, _, messages = check("tensor-parallel-size: x\nblok-size: 1", "local")
    assert messages == [
        'f.yaml:1: W.tensor-parallel-size: found "x", expected a whole number',
        "f.yaml:2: W.blok-size: unknown key; neither engine local nor vLLM 0.32.0 has such a flag (did you mean "
        "block-size?)",
    ]


def test_every_flag_that_means_nothing_to_the_local_engine_is_no_flag_of_its_own() -> None:
    described = own_flags("local")
    assert described is not None
    own, meaningless = described
    assert "block_size" in own and not own.keys() & meaningless
    assert own_flags("vllm") is None


def load(name: str, *overrides: tuple[str, str]) -> tuple[Configuration, dict[str, Any]]:
    services = ["Frontend", "Processor", "Router", "VllmWorker", "PrefillWorker"]
    configuration = load_configuration(CONFIGS / name, overrides, services)
    errors = Errors()
    sections = {s: decode_section(s, None, configuration, errors, []) for s in services}
    assert errors.messages == []
    return configuration, sections


@pytest.mark.parametrize(
    ("name", "model", "length", "special"),
    [
        ("multinode-405b.yaml", "nvidia/Llama-3.1-405B-Instruct-FP8", 8192, {"quantization": "modelopt"}),
        ("multinode_llama49b.yaml", "nvidia/Llama-3_3-Nemotron-Super-49B-v1", 2048, {"trust_remote_code": True}),
    ],
)
def test_the_two_big_configurations(name: str, model: str, length: int, special: dict[str, Any]) -> None:
    _, sections = load(name)
    assert sections["Frontend"].config.port == 8000
    assert sections["Processor"].config.router == "kv"
    assert sections["Router"].config.min_workers == 1
    decode = sections["VllmWorker"].config
    assert (decode.remote_prefill, decode.conditional_disagg, decode.router) == (True, True, "kv")
    assert (decode.max_local_prefill_length, decode.max_prefill_queue_size) == (10, 2)
    for service in ("VllmWorker", "PrefillWorker"):
        config, args = sections[service].config, sections[service].args
        assert isinstance(config, WorkerConfig)
        assert (config.model, config.engine) == (model, "vllm")
        assert config.kv_transfer_config == {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        assert (args.workers, args.resources.gpu) == (1, 8)
        assert config.engine_args == {
            "block_size": 64,
            "max_model_len": length,
            "max_num_seqs": 16,
            "gpu_memory_utilization": 0.95,
            "tensor_parallel_size": 8,
            "enable_prefix_caching": True,
            **special,
        }


def test_one_line_about_what_other_engines_ignore() -> None:
    _, sections = load("multinode-405b.yaml", ("--VllmWorker.engine", "local"), ("--PrefillWorker.engine", "local"))
    assert ignored_flags(sections) == (
        "the local engine has no use for gpu-memory-utilization, tensor-parallel-size, quantization: "
        "accepted and ignored"
    )
    assert ignored_flags(load("multinode-405b.yaml")[1]) is None
