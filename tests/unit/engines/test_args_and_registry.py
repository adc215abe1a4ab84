"""Engine settings from a worker's section, and engines by name."""

import logging
from typing import Any

import pytest

from stator.config.models import resolve_model
from stator.engines.local.args import LocalEngineArgs, args_from_section
from stator.engines.local.engine import LocalEngine
from stator.engines.local.load import kv_block_bytes, numpy_runner
from stator.engines.local.model_config import load_model_config
from stator.engines.registry import create_engine
from stator.errors import ConfigError


def test_flags_of_vllm_in_either_spelling() -> None:
    args = args_from_section({"model": "m", "block-size": 16, "max_model_len": "128", "enable-prefix-caching": False})
    assert args == LocalEngineArgs(model="m", block_size=16, max_model_len=128, enable_prefix_caching=False)
    assert args.name == "m"
    assert args_from_section({"model": "/some/where", "served-model-name": ["a", "b"]}).name == "a"


def test_flags_without_meaning_here_are_ignored_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        args_from_section({"model": "m", "tensor-parallel-size": 8, "gpu-memory-utilization": 0.9})
    assert [record.getMessage() for record in caplog.records] == [
        "the local engine ignores gpu-memory-utilization, tensor-parallel-size"
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model"),
        ({"model": "m", "blok-size": 3}, r"'blok-size'; did you mean 'block-size'"),
        ({"model": "m", "zzz": 3}, r"'zzz'; it has block-size, "),
        ({"model": "m", "block-size": "many"}, r"block_size"),
        ({"model": "m", "block-size": 0}, r"block-size is 0"),
        ({"model": "m", "max-num-seqs": 64, "max-num-batched-tokens": 32}, r"32.*64"),
        ({"model": "m", "dtype": "float16"}, r"float16"),
        ({"model": "m", "num-gpu-blocks-override": -1}, r"num-gpu-blocks-override is -1"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        args_from_section(values)


def test_engines_by_name() -> None:
    assert isinstance(create_engine("local", {"model": "stator:tiny-llama"}), LocalEngine)
    with pytest.raises(ConfigError, match=r"no engine 'lokal'; known engines: local"):
        create_engine("lokal", {})


@pytest.mark.parametrize("model", ["stator:tiny-llama", "stator:tiny-decilm"])
def test_memory_decides_the_number_of_blocks(model: str) -> None:
    runner = numpy_runner(LocalEngineArgs(model=model, block_size=16, kv_cache_memory_bytes=1_000_000))
    block_bytes = kv_block_bytes(load_model_config(resolve_model(model)), 16)
    assert runner.block_bytes == block_bytes == len(runner.export_block(0))
    assert runner.num_blocks == 1_000_000 // block_bytes


def test_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv-cache-memory-bytes is 1000; .* takes \d+"):
        numpy_runner(LocalEngineArgs(model="stator:tiny-llama", kv_cache_memory_bytes=1000))
