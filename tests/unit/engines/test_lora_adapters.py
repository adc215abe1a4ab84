"""What is told of an adapter's directory, and the sim engine's adapters."""

import json
from pathlib import Path

import pytest

from stator.engines.local.engine import LocalEngine
from stator.engines.lora import LoraEngine, read_adapter
from stator.engines.sim.args import args_from_section
from stator.engines.sim.engine import SimEngine
from stator.errors import ErrorCode, StatorError


def write(directory: Path, config: object, weights: bytes | None = b"w" * 100_000) -> str:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None:
        (directory / "adapter_model.safetensors").write_bytes(weights)
    return str(directory)


def test_equal_adapters_have_equal_digests_wherever_they_lie(tmp_path: Path) -> None:
    weights = b"w" * 100_000
    one = read_adapter("a", write(tmp_path / "1", {"r": 8}), max_rank=16)
    assert read_adapter("b", write(tmp_path / "2", {"r": 8}), max_rank=16).digest == one.digest
    for number, (config, others) in enumerate(
        [({"r": 4}, weights), ({"r": 8}, weights[:-1]), ({"r": 8}, weights[:-1] + b"x"), ({"r": 8}, b"x" + weights[1:])]
    ):
        assert read_adapter("a", write(tmp_path / f"o{number}", config, others), max_rank=16).digest != one.digest


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        ({"r": 32}, ErrorCode.INVALID_REQUEST, "is 32, above max-lora-rank, which is 16"),
        ({"r": 8, "rank_pattern": {"q_proj": 64}}, ErrorCode.INVALID_REQUEST, "is 64, above max-lora-rank"),
        ({"r": "8"}, ErrorCode.INVALID_REQUEST, "r is '8'; it must be a rank above 0"),
        ({}, ErrorCode.INVALID_REQUEST, "r is None"),
        ([], ErrorCode.INVALID_REQUEST, "not a JSON object"),
        ("{", ErrorCode.INVALID_REQUEST, "cannot be read"),
    ],
)
def test_an_adapter_that_cannot_be_used(tmp_path: Path, config: object, code: ErrorCode, words: str) -> None:
    with pytest.raises(StatorError, match=words) as raised:
        read_adapter("a", write(tmp_path / "a", config), max_rank=16)
    assert raised.value.code is code


def test_weights_that_are_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"r": 8}, None)
    with pytest.raises(StatorError, match="has no adapter_model.safetensors"):
        read_adapter("a", path, max_rank=16)
    assert read_adapter("a", path, max_rank=16, needs_weights=False).digest


def test_which_engines_have_adapters() -> None:
    section = {"model": "stator:tiny-llama", "step-times": "tiny-llama", "lora-modules": {"a": "/a"}}
    args = args_from_section(section)
    assert args.lora_modules == {"a": "/a"}
    assert isinstance(SimEngine(args), LoraEngine)
    assert not isinstance(LocalEngine(args, runner_factory=lambda _: None), LoraEngine)  # type: ignore[arg-type, return-value]
