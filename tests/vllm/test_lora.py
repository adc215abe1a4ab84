"""A LoRA adapter by its name: another text, and a prefix cache and block hashes of its own."""

import asyncio
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

import stator
from stator.engines.vllm.engine import VllmEngine
from stator.ids import RequestId
from stator.testing.contracts.engine_suite import make_request
from stator.testing.engine_bench import running_engines
from vllm_engines import forked

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore")]

MODEL = Path(stator.__file__).parent / "models" / "tiny-llama"
RANK = 8


def write_adapter(directory: Path) -> None:
    """Random, and large enough to change what is said."""
    config = json.loads((MODEL / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = heads * (config.get("head_dim") or hidden // heads)
    rng = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.3, (RANK, hidden)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.3, (width, RANK)).astype(np.float32)
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))


def test_an_adapter_by_its_name(tmp_path: Path) -> None:
    forked.prepare()
    write_adapter(tmp_path)
    section = {
        "model": str(MODEL),
        "served_model_name": "tiny-llama",
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 512,
        "num_gpu_blocks_override": 65,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": 8,
        "max_lora_rank": RANK,
        "enforce_eager": True,
        "lora_modules": {"odd": str(tmp_path)},
    }

    async def main() -> None:
        engine = forked.engine(section)
        assert isinstance(engine, VllmEngine)
        async with running_engines(engine) as (one,):
            plain = make_request("plain", list(range(300, 400)))
            text = await one.text(plain)
            adapted = msgspec.structs.replace(plain, request_id=RequestId("adapted"), lora_name="odd")
            first = await one.generate(adapted).wait()
            assert (first.num_cached, first.token_ids == text) == (0, False)
            await engine.kv_events_settled()
            again = msgspec.structs.replace(adapted, request_id=RequestId("again"))
            assert one.engine.cached_prefix_tokens(again) == 96
            second = await one.generate(again).wait()
            assert (second.num_cached, second.token_ids) == (96, first.token_ids)
            await one.until_idle()

    asyncio.run(main())
