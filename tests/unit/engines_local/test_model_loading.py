"""Model directories: configurations, weight files, and what is said about broken ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from stator.engines.local.model_config import RopeConfig, ffn_width, load_model_config, rope_frequencies
from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk
from stator.engines.local.tiles import choose_tile, panel_width, use_one_blas_thread
from stator.engines.local.weights import Weights, widen
from stator.errors import ConfigError
from unit.engines_local.local_models import (
    block,
    decilm_config,
    greedy_spec,
    llama_config,
    random_tensors,
    tensor_shapes,
    write_model,
)

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load(path: Path) -> NumpyRunner:
    return NumpyRunner(path, block_size=16, num_blocks=4)


def logits(path: Path) -> bytes:
    return load(path).logits([Chunk([0], [1, 2, 3], 0, None)]).tobytes()


def write_sharded(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_bf16(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """By hand, as numpy has no BF16."""
    header, data = dict[str, Any](), b""
    for name, tensor in tensors.items():
        words = (tensor.view(np.uint32) >> 16).astype("<u2").tobytes()
        offsets = [len(data), len(data) + len(words)]
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}
        data += words
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    encoded = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def test_storage_types_and_sharding_give_the_same_numbers(tmp_path: Path) -> None:
    config = llama_config()
    # values that every type holds exactly: 8 significant bits
    tensors = {
        name: ((t * 64).round() / 64).clip(-2, 2).astype(np.float32) for name, t in random_tensors(config).items()
    }
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    expected = logits(write_model(tmp_path / "f32", config, tensors))
    assert logits(write_model(tmp_path / "f16", config, half)) == expected
    assert logits(write_bf16(tmp_path / "bf16", config, tensors)) == expected
    assert logits(write_sharded(tmp_path / "sharded", config, tensors)) == expected


def test_widening_is_exact() -> None:
    values = np.array([1.0, -2.5, 0.0, np.inf, 3.0517578125e-05], np.float32)
    assert widen((values.view(np.uint32) >> 16).astype("<u2").view(np.uint8), "BF16").tolist() == values.tolist()
    assert widen(values.astype("<f2").view(np.uint8), "F16").tolist() == values.tolist()


def test_fingerprint_names_the_model_not_the_place(tmp_path: Path) -> None:
    config = llama_config()
    tensors = random_tensors(config)
    first = load(write_model(tmp_path / "a", config, tensors)).fingerprint
    assert load(write_sharded(tmp_path / "deep" / "b", config, tensors)).fingerprint == first
    changed = tensors | {"model.norm.weight": tensors["model.norm.weight"] * np.float32(1.001)}
    others = {
        load(write_model(tmp_path / "c", config, changed)).fingerprint,
        load(write_model(tmp_path / "d", llama_config(rope_theta=5e5), tensors)).fingerprint,
        first,
    }
    assert len(others) == 3


def test_fingerprint_of_large_models_samples_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stator.engines.local.weights._FULL_HASH_BYTES", 1000)
    config = llama_config(vocab_size=5000)
    tensors = random_tensors(config)
    path = write_model(tmp_path, config, tensors)
    first = Weights(path).digest(tensors)
    tensors["lm_head.weight"][-1, -1] += 1
    write_model(path, config, tensors)
    assert Weights(path).digest(tensors) != first
    assert Weights(path).digest(tensors) == Weights(path).digest(reversed(list(tensors)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, RopeConfig(10000.0)),
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(10000.0, "linear", 2.0)),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, RopeConfig(10000.0, "llama3", 8.0)),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}, RopeConfig(5e5, "llama3", 8.0)),
    ],
)
def test_rope_settings_of_both_styles(tmp_path: Path, changes: dict[str, Any], expected: RopeConfig) -> None:
    write_model(tmp_path, llama_config(**changes), {})
    assert load_model_config(tmp_path).rope == expected


def test_llama3_frequencies_keep_short_and_stretch_long_wavelengths() -> None:
    plain = rope_frequencies(RopeConfig(5e5), 128)
    scaled = rope_frequencies(RopeConfig(5e5, "llama3", 8.0), 128)
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / 8
    assert ((scaled <= plain) & (scaled >= plain / 8)).all()


@pytest.mark.parametrize(
    ("mult", "hidden", "width"),
    [(2.625, 8192, 14336), (5.25, 8192, 28672), (0.5, 8192, 2816), (1.3, 256, 256), (4.5, 256, 768)],
)
def test_nemotron_ffn_width(mult: float, hidden: int, width: int) -> None:
    """The first three are widths in Llama-3.1-Nemotron-51B and Llama-3.3-Nemotron-Super-49B."""
    assert ffn_width(mult, hidden) == width


def test_nemotron_layers(tmp_path: Path) -> None:
    blocks = [block(2, 1.3), block(None, 1.3), block(4), block(linear="attention ffn"), block()]
    write_model(tmp_path, decilm_config(blocks, hidden_size=256), {})
    layers = load_model_config(tmp_path).layers
    assert [layer.num_kv_heads for layer in layers] == [2, 0, 1, 0, 0]
    assert [layer.ffn_width for layer in layers] == [256, 256, 0, 0, 0]
    assert [(layer.attention_linear, layer.ffn_linear) for layer in layers][3:] == [(True, True), (False, False)]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([1, 3], 9, {1, 3}), (1, 9, {1}), (None, [4, 5], {4, 5}), (None, None, set())],
)
def test_end_tokens(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    write_model(tmp_path, llama_config(eos_token_id=config), {})
    assert load_model_config(tmp_path).eos_token_ids == frozenset({config} if isinstance(config, int) else config or ())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_model_config(tmp_path).eos_token_ids == expected


BAD_CONFIGS = [
    ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not known.*DeciLMForCausalLM, LlamaForCausalLM"),
    ({"architectures": []}, "'architectures' must be a list"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling: rope type 'yarn' is not supported.*llama3"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: 'factor' must be a positive number, found nothing"),
    ({"hidden_size": "big"}, "'hidden_size' must be a positive integer, found \"big\""),
    ({"num_key_value_heads": 3}, "'num_key_value_heads' must be a divisor"),
    ({"head_dim": 5}, "'head_dim' must be even"),
    ({"head_dim": None, "hidden_size": 25}, "no multiple"),
    ({"hidden_act": "gelu"}, "'hidden_act' must be 'silu'"),
    ({"quantization_config": {"bits": 4}}, "F32, F16 and BF16"),
    ({"eos_token_id": "end"}, "'eos_token_id' must be"),
    ({"tie_word_embeddings": "yes"}, "true or false"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_bad_configs_name_file_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_model(tmp_path, llama_config(**changes), {})
    with pytest.raises(ConfigError, match=f"config.json.*{message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([block(3, 1.0)], r"block_configs\[0\]: attention: 'n_heads_in_group' must be a divisor"),
        ([block(2, 1.0), {"attention": {"no_op": True}}], r"block_configs\[1\]: 'ffn' must be an object"),
        ([{"attention": {"n_heads_in_group": 1, "window_length": 64}, "ffn": {"no_op": True}}], "window_length"),
        ([{"attention": {"no_op": True}, "ffn": {}}], r"ffn: 'intermediate_size' must be a positive integer"),
    ],
)
def test_bad_nemotron_blocks(tmp_path: Path, blocks: list[Any], message: str) -> None:
    write_model(tmp_path, decilm_config(blocks), {})
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", [name for name, _ in tensor_shapes(llama_config(num_hidden_layers=1))])
def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, name: str) -> None:
    config = llama_config(num_hidden_layers=1)
    tensors = random_tensors(config)
    shape = list(tensors[name].shape)
    write_model(tmp_path, config, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ConfigError, match=f"needs tensor '{name}'"):
        load(tmp_path)
    write_model(tmp_path, config, tensors | {name: np.zeros((3, 5), np.float32)})
    with pytest.raises(ConfigError) as error:
        load(tmp_path)
    assert f"'{name}' has shape [3, 5], the config asks for {shape}" in str(error.value)


def test_broken_weight_files(tmp_path: Path) -> None:
    config = llama_config()
    path = write_model(tmp_path, config)
    weights = path / "model.safetensors"
    good = weights.read_bytes()
    for data, message in (
        (good[:-4], "lies outside the file"),
        (good[:30], "cut short"),
        (b"", "not a safetensors file"),
        (b"\x02" + bytes(7) + b"[]", "header is not an object"),
        (b"\x02" + bytes(7) + b"{{", "not JSON"),
        (good.replace(b'"F32"', b'"F16"', 1), "has .* bytes"),
    ):
        weights.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            load(path)
    save_file({n: t.astype(np.int32) for n, t in random_tensors(config).items()}, weights)
    with pytest.raises(ConfigError, match="is I32; the local engine reads BF16, F16, F32"):
        load(path)
    weights.unlink()
    with pytest.raises(ConfigError, match="neither model.safetensors nor"):
        load(path)
    shutil.rmtree(path)
    with pytest.raises(ConfigError, match="no such file"):
        load(path)


def test_broken_index(tmp_path: Path) -> None:
    config = llama_config()
    path = write_sharded(tmp_path / "model", config, random_tensors(config))
    (path / "part-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"part-1.safetensors: no such file, but model.safetensors.index.json names"):
        load(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere"}}')
    with pytest.raises(ConfigError, match="in the same directory"):
        load(path)


def test_a_step_that_cannot_be_computed_changes_nothing(tmp_path: Path) -> None:
    runner = load(write_model(tmp_path, llama_config(max_position_embeddings=40)))
    before = [runner.export_block(i) for i in range(4)]
    good = Chunk([0], [1], 0, None)
    for bad, message in (
        (Chunk([0, 1, 2], [1] * 41, 0, None), "context of 40"),
        (Chunk([0], [1] * 17, 0, None), "17 tokens need 2 blocks"),
        (Chunk([4], [1], 0, None), "block ids must be"),
        (Chunk([-1], [1], 0, None), "block ids must be"),
        (Chunk([0], [101], 0, None), "token ids must be"),
        (Chunk([0], [-1], 0, None), "token ids must be"),
        (Chunk([0], [], 0, None), "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.step([good, bad])
    assert [runner.export_block(i) for i in range(4)] == before
    assert runner.step([]) == []


def test_step_samples_only_where_asked(tmp_path: Path) -> None:
    runner = load(write_model(tmp_path, llama_config()))
    rows = runner.logits([Chunk([0], [4, 5], 0, None), Chunk([1], [6], 0, None)])
    chunks = [Chunk([0], [4, 5], 0, greedy_spec(2)), Chunk([1], [6], 0, None), Chunk([2], [6], 0, greedy_spec(1))]
    assert runner.step(chunks) == [int(rows[1].argmax()), None, int(rows[2].argmax())]


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    runner = load(write_model(tmp_path, llama_config()))
    # 2 layers of keys and values, 16 tokens, 2 heads of 10 numbers, 4 bytes each
    assert runner.block_bytes == 2 * 2 * 16 * 2 * 10 * 4
    with pytest.raises(ValueError, match="has 5120 bytes, got 5119"):
        runner.import_block(0, bytes(5119))
    with pytest.raises(ValueError, match="block 4 does not exist"):
        runner.import_block(4, bytes(5120))
    with pytest.raises(ValueError, match="block -1 does not exist"):
        runner.export_block(-1)
    with pytest.raises(ConfigError, match="must be positive"):
        NumpyRunner(tmp_path, block_size=0, num_blocks=4)


def test_the_tile_shrinks_until_rows_are_independent() -> None:
    for limit in (8, 4, 1):
        assert choose_tile([(10, 100)], [(4, 4)], independent=lambda tile, *_, top=limit: tile <= top) == limit
    # one bad shape is enough
    assert choose_tile([(10, 100)], [(4, 4)], independent=lambda tile, inner, _: tile < 8 or inner == 10) == 4


@pytest.mark.parametrize(("inner", "columns"), [(256, 1280), (640, 256), (24, 37), (4096, 11008), (20000, 5000)])
def test_panels_cover_the_matrix(inner: int, columns: int) -> None:
    width = panel_width(8, inner, columns)
    panels = -(-columns // width)
    assert width % 16 == 0
    assert (panels - 1) * width < columns <= panels * width
    assert 8 * inner * width <= 1_000_000 or inner > 7800


def test_numpys_blas_takes_the_thread_setting() -> None:
    assert use_one_blas_thread()
