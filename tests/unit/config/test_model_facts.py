import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stator.config.model_facts import find_facts, known_models
from stator.config.vllm_models import vllm_models
from stator.core.fit_memory import kv_bytes_per_token
from stator.core.model_shape import read_shape
from stator.errors import ConfigError

BIG = ("nvidia/Llama-3.1-405B-Instruct-FP8", "nvidia/Llama-3_3-Nemotron-Super-49B-v1")
PUBLISHED = {BIG[0]: 405_853_388_800, BIG[1]: 49_867_145_216}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hugging Face cache of the tests; the module's constants are read when it is imported."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("model", BIG)
def test_dimensions_that_come_with_stator_add_up(model: str) -> None:
    facts = find_facts(model)
    assert facts.config is not None and facts.missing is None and facts.weight_bytes is None
    shape = read_shape(facts.config, facts.quantization)
    assert shape.parameters == PUBLISHED[model]
    assert shape.architecture in vllm_models().architectures["text"]
    assert model in known_models()


def test_the_49b_has_attention_in_49_of_80_layers() -> None:
    config = find_facts(BIG[1]).config
    assert config is not None
    shape = read_shape(config)
    assert len(shape.layers) == 80
    assert [i for i, layer in enumerate(shape.layers) if not layer.num_kv_heads] == [
        6, 7, 11, *range(42, 52), *range(53, 71)
    ]  # fmt: skip
    assert {layer.num_kv_heads for layer in shape.layers} == {0, 8}
    assert kv_bytes_per_token(shape, 1, "bfloat16") == 49 * 2 * 8 * 128 * 2
    assert kv_bytes_per_token(shape, 8, "bfloat16") == 49 * 2 * 128 * 2


def test_a_bundled_model_is_read_from_its_files() -> None:
    for name in ("stator:tiny-llama", "stator:tiny-decilm"):
        facts = find_facts(name)
        assert facts.config is not None and facts.weight_bytes is not None
        shape = read_shape(facts.config)
        size = {"float16": 2, "float32": 4}[shape.dtype]
        assert shape.parameters is not None and shape.parameters * size == facts.weight_bytes


def test_a_directory_with_an_index_or_one_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert find_facts(str(tmp_path)).weight_bytes is None
    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros(7, np.float32)}, tmp_path / "model.safetensors")
    assert find_facts(str(tmp_path)).weight_bytes == 3 * 5 * 2 + 7 * 4
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 123456}, "weight_map": {}}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}}))
    facts = find_facts(str(tmp_path))
    assert facts.weight_bytes == 123456 and facts.quantization == {"producer": {"name": "modelopt"}}
    assert facts.source == str(tmp_path)


def test_a_file_that_is_no_safetensors_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for data in (b"", b"\xff" * 64, b"\x08" + b"\x00" * 7 + b"nonsense"):
        (tmp_path / "model.safetensors").write_bytes(data)
        assert find_facts(str(tmp_path)).weight_bytes is None
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        find_facts(str(tmp_path))


def test_a_hub_id_is_looked_up_in_the_local_cache_only(empty_cache: Path) -> None:
    facts = find_facts("someone/some-model")
    assert (
        facts.config is None
        and facts.missing is not None
        and "someone/some-model is not on this machine" in facts.missing
    )
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = empty_cache / "models--someone--some-model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    refs = empty_cache / "models--someone--some-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps({"hidden_size": 8}))
    facts = find_facts("someone/some-model")
    assert facts.config == {"hidden_size": 8} and facts.source == "the local Hugging Face cache"
    assert find_facts("someone/some-model", "v2").config is None
    # Files that are here count more than the dimensions that come with Stator.
    known = empty_cache / "models--nvidia--Llama-3_3-Nemotron-Super-49B-v1"
    snapshot.parent.parent.rename(known)
    assert find_facts(BIG[1]).config == {"hidden_size": 8}


def test_what_is_no_model_is_said() -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        find_facts("./not-here")
    with pytest.raises(ConfigError, match="did you mean stator:tiny-llama"):
        find_facts("stator:tiny-lama")
    assert find_facts("not a hub id!").missing is not None


def test_the_facts_about_vllm_are_complete() -> None:
    facts = vllm_models()
    assert facts.version.startswith("0.32.")
    assert {"LlamaForCausalLM", "DeciLMForCausalLM", "Qwen3MoeForCausalLM"} <= facts.architectures["text"]
    assert (facts.quantization["modelopt"], facts.quantization["fp8"]) == (80, 75)
    assert "NixlConnector" in facts.connectors and "LlamaForCausalLM" not in facts.no_pipeline
