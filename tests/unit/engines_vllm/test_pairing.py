from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stator.engines.vllm.pairing import SAMPLE_BYTES, engine_pairing, model_identity, pairing

BASE: dict[str, Any] = {
    "engine_version": "0.32.0",
    "block_size": 32,
    "kv_dtype": "bfloat16",
    "kv_layout": "LBHNC",
    "model": "/models/a",
    "model_digest": "d",
    "revision": None,
    "connector": "StatorConnector",
    "tp_size": 1,
}


@pytest.mark.parametrize(
    "change",
    [
        {"engine_version": "0.33.0"},
        {"block_size": 64},
        {"kv_dtype": "fp8"},
        {"kv_layout": "BLHNC"},
        {"model_digest": "e"},
        {"revision": "main"},
        {"connector": "NixlConnector"},
        {"tp_size": 2},
        {"pp_size": 2},
        {"attention_backend": "FLASH_ATTN"},
    ],
)
def test_engines_that_differ_do_not_pair(change: dict[str, Any]) -> None:
    assert pairing(**BASE) != pairing(**{**BASE, **change})


def test_the_path_counts_for_nixl_alone() -> None:
    moved = {**BASE, "model": "/elsewhere/a"}
    assert pairing(**BASE) == pairing(**moved)
    assert pairing(**{**BASE, "connector": "NixlConnector"}) != pairing(**{**moved, "connector": "NixlConnector"})


def test_it_says_what_every_engine_says() -> None:
    assert {"block_size", "kv_dtype", "model", "engine", "connector"} <= set(pairing(**BASE))
    assert all(isinstance(value, str) for value in pairing(**BASE).values())


def write_model(directory: Path, weights: bytes) -> str:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(weights)
    return str(directory)


def test_identity_is_of_content_not_of_place(tmp_path: Path) -> None:
    weights = bytes(range(256)) * 1024
    one, two = (write_model(tmp_path / name, weights) for name in "ab")
    config = {"num_layers": 2}
    identity = model_identity(one, config)
    assert identity == model_identity(two, {**config, "_name_or_path": two, "transformers_version": "9"})
    assert identity != model_identity(one, {"num_layers": 3})
    for name, offset in (("first", 0), ("last", len(weights) - 1), ("in a sample", len(weights) // 15 - SAMPLE_BYTES)):
        tuned = bytearray(weights)
        tuned[offset : offset + SAMPLE_BYTES * 4] = bytes(len(tuned[offset : offset + SAMPLE_BYTES * 4]))
        assert model_identity(write_model(tmp_path / name, bytes(tuned)), config) != identity
    assert model_identity(write_model(tmp_path / "longer", weights + b"x"), config) != identity
    assert model_identity(write_model(tmp_path / "tiny", b"x"), config) != identity
    assert model_identity("org/model", config) != model_identity("org/other", config)


def test_a_started_engine_is_described(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", b"x" * 10)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=model, dtype="torch.float32", revision="abc", hf_config=SimpleNamespace(to_dict=lambda: {"a": 1})
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=32),
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
    )
    found = engine_pairing(config, "StatorConnector", engine_version="0.32.0")
    assert (found["kv_dtype"], found["block_size"], found["workers"]) == ("float32", "32", "tp 2 pp 1")
    assert found["model"] == f"{model_identity(model, {'a': 1})} abc"
    assert found["connector"] == "StatorConnector 1"
