"""Nemotron-NAS checkpoints load with our configuration class: in vLLM, in its spawned processes, and without running
the code that a checkpoint brings."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Importing vLLM takes a while on a busy machine.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
BUNDLED = SOURCE / "stator" / "models" / "tiny-decilm"

# What the published configuration of the 49B checkpoint looks like: the dimensions are facts, the layers are few.
ATTENTION = {
    "n_heads_in_group": 8,
    "no_op": False,
    "num_sink_tokens": None,
    "replace_with_linear": False,
    "sparsify": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}
NO_ATTENTION = {**ATTENTION, "n_heads_in_group": None, "no_op": True}
FFN = {"ffn_mult": 5.25, "no_op": False, "replace_with_linear": False, "sparsify": None}
LARGE: dict[str, Any] = {
    "architectures": ["DeciLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    },
    "block_configs": [
        {"attention": ATTENTION, "ffn": {**FFN, "ffn_mult": 2.625}},
        {"attention": ATTENTION, "ffn": FFN},
        {"attention": NO_ATTENTION, "ffn": {**FFN, "ffn_mult": 0.5}},
        {"attention": {**ATTENTION, "n_heads_in_group": 16}, "ffn": {**FFN, "ffn_mult": None, "no_op": True}},
    ],
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "nemotron-nas",
    "num_attention_heads": 64,
    "num_hidden_layers": 4,
    "num_key_value_heads": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "vocab_size": 128256,
}

BOMB = "raise RuntimeError('the code of the checkpoint ran')\n"


@pytest.fixture(autouse=True)
def nemotron_nas() -> Any:
    return importlib.import_module("stator.engines.vllm.nemotron_nas")


def write_model(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        (directory / name).write_text(BOMB)
    return directory


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("auto_map", [True, False])
def test_the_large_model_parses(tmp_path: Path, nemotron_nas: Any, trust: bool, auto_map: bool) -> None:
    from transformers import AutoConfig

    raw = LARGE if auto_map else {key: value for key, value in LARGE.items() if key != "auto_map"}
    config = AutoConfig.from_pretrained(str(write_model(tmp_path, raw)), trust_remote_code=trust)

    assert type(config) is nemotron_nas.NemotronNasConfig
    attention = [block.attention for block in config.block_configs]
    assert [part.no_op for part in attention] == [False, False, True, False]
    assert attention[3].n_heads_in_group == 16
    assert config.block_configs[0].ffn.ffn_mult == 2.625 and config.block_configs[3].ffn.no_op
    assert config.rope_parameters == {**LARGE["rope_scaling"], "rope_theta": 500000.0}
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (128, 128256, 131072)
    assert config.eos_token_id == [128001, 128008, 128009] and config.tie_word_embeddings is False


def test_vllm_counts_layers_and_heads_of_the_large_model(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    write_model(tmp_path, LARGE)
    args = AsyncEngineArgs(
        model=str(tmp_path), skip_tokenizer_init=True, trust_remote_code=True, max_model_len=4096, dtype="bfloat16"
    )
    model = args.create_model_config()

    assert model.hf_config.block_configs[2].attention.no_op
    assert model.get_total_num_kv_heads() == 8 and model.get_head_size() == 128
    # vLLM hashes the configuration as JSON for its compilation cache, and compares the two sides of a transfer.
    assert json.loads(model.hf_config.to_json_string())["block_configs"][0]["ffn"]["ffn_mult"] == 2.625


def test_written_and_read_again(tmp_path: Path, nemotron_nas: Any) -> None:
    config = nemotron_nas.NemotronNasConfig(**LARGE)
    config.save_pretrained(tmp_path)
    again = nemotron_nas.NemotronNasConfig.from_pretrained(tmp_path)
    assert again.to_dict()["block_configs"] == config.to_dict()["block_configs"]
    assert again.rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        (1, {"attention": {**ATTENTION, "replace_with_linear": True}}, r"\[1\].attention: replace_with_linear is set"),
        (0, {"attention": {**ATTENTION, "n_heads_in_group": None}}, r"\[0\].attention: n_heads_in_group is missing"),
        (2, {"ffn": {"no_op": False}}, r"\[2\].ffn: neither ffn_mult nor intermediate_size"),
        (3, {"ffn": None}, r"\[3\].ffn: expected a mapping"),
    ],
)
def test_what_vllm_cannot_compute_is_refused(
    nemotron_nas: Any, layer: int, change: dict[str, Any], message: str
) -> None:
    blocks = list(LARGE["block_configs"])
    blocks[layer] = {**blocks[layer], **change}
    with pytest.raises(ValueError, match=message):
        nemotron_nas.NemotronNasConfig(**{**LARGE, "block_configs": blocks})


def test_too_few_layers_are_refused(nemotron_nas: Any) -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is 5, but block_configs has 4 entries"):
        nemotron_nas.NemotronNasConfig(**{**LARGE, "num_hidden_layers": 5})


def test_the_entry_point_names_it() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["stator"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


ENGINE = """
import asyncio, json, sys

from stator.engines.vllm.nemotron_nas import register
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.sampling_params import RequestOutputKind


async def main() -> None:
    register()
    options = dict(enforce_eager=True, kv_cache_memory_bytes=64 << 20, block_size=64, max_model_len=2048)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=sys.argv[1], trust_remote_code=True, dtype="float32", max_num_seqs=32, **options)
    )
    cases = json.load(open(sys.argv[2]))["greedy"]

    async def one(index: int, case: dict) -> list[int]:
        params = SamplingParams(
            temperature=0, max_tokens=case["max_tokens"], output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = TokensPrompt(prompt_token_ids=case["prompt_ids"])
        async for output in engine.generate(prompt, params, request_id=str(index)):
            if output.finished:
                return list(output.outputs[0].token_ids)
        raise AssertionError("no answer")

    try:
        outputs = await asyncio.gather(*(one(i, case) for i, case in enumerate(cases)))
    finally:
        engine.shutdown()
    print("OUTPUTS", json.dumps(outputs))


if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.timeout(300)
def test_the_bundled_model_in_spawned_processes_gives_the_goldens(tmp_path: Path) -> None:
    """Engine core in a process of its own, a checkpoint whose code must not run, and no installed entry point."""
    model = tmp_path / "model"
    model.mkdir()
    for file in BUNDLED.iterdir():
        if file.suffix != ".py" and file.name != "config.json":
            (model / file.name).symlink_to(file)
    write_model(model, json.loads((BUNDLED / "config.json").read_text()))
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    golden = ROOT / "tests" / "golden" / "tiny-decilm.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(golden)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stderr[-8000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("OUTPUTS "))
    outputs = json.loads(line.removeprefix("OUTPUTS "))
    cases = json.loads(golden.read_text())["greedy"]
    assert len(outputs) == len(cases) > 10
    for case, output in zip(cases, outputs, strict=True):
        if output == case["output_ids"]:
            continue
        pairs = zip(output, case["output_ids"], strict=False)
        at = next((i for i, (got, want) in enumerate(pairs) if got != want), min(len(output), len(case["output_ids"])))
        # Two logits closer than 1e-3 may come out in the other order.
        assert at in case["near_ties"], f"{case['name']} differs at token {at}"
