"""LoRA adapters by name: other texts, a prefix cache and block hashes of their own, loaded and unloaded as it runs."""

import asyncio
import gc
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

import stator
from stator.engines.vllm.engine import VllmEngine
from stator.errors import StatorError
from stator.ids import RequestId
from stator.messages.engine import EngineRequest
from stator.testing.contracts.engine_suite import make_request
from stator.testing.engine_bench import BenchEngine, running_engines
from vllm_engines import forked

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore")]

MODEL = Path(stator.__file__).parent / "models" / "tiny-llama"
RANK = 8


def write_adapter(directory: Path, seed: int = 1, target: str = "q_proj") -> None:
    """Random, and large enough to change what is said."""
    directory.mkdir(exist_ok=True)
    config = json.loads((MODEL / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = heads * (config.get("head_dim") or hidden // heads)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.3, (RANK, hidden)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.3, (width, RANK)).astype(np.float32)
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": [target], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))


async def check_changes(engine: VllmEngine, one: BenchEngine, request: EngineRequest, text: list[int]) -> None:
    async def say(name: str, number: int) -> tuple[int | None, list[int]]:
        named = msgspec.structs.replace(
            request,
            request_id=RequestId(f"{name}-{number}"),
            lora_name=name,
            sampling=msgspec.structs.replace(request.sampling, max_tokens=len(text)),
        )
        result = await one.generate(named).wait()
        return result.num_cached, result.token_ids

    directory = Path(engine.adapters["odd"].path).parent / "other"
    write_adapter(directory, seed=2)
    await engine.load_adapter("other", str(directory))
    cached, other = await say("other", 1)
    assert cached == 0 and other != text
    # More adapters than vLLM holds at once: each is brought back when it is asked for.
    assert (await say("odd", 2))[1] == text
    await engine.unload_adapter("other")
    with pytest.raises(StatorError, match="no LoRA adapter 'other'"):
        await one.generate(msgspec.structs.replace(request, request_id=RequestId("gone"), lora_name="other")).wait()
    # Other weights under the same name and path: nothing of the first ones is taken for theirs.
    write_adapter(directory, seed=3)
    await engine.load_adapter("other", str(directory))
    cached, third = await say("other", 3)
    assert cached == 0 and third != other
    write_adapter(directory, target="no_such_module")
    with pytest.raises(StatorError, match="vLLM cannot load the adapter .*no_such_module"):
        await engine.load_adapter("bad", str(directory))
    assert list(engine.adapters) == ["odd", "other"]


def test_an_adapter_by_its_name(tmp_path: Path) -> None:
    forked.prepare()
    write_adapter(tmp_path / "odd")
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
        "lora_modules": {"odd": str(tmp_path / "odd")},
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
            await check_changes(engine, one, adapted, first.token_ids[:4])
            await one.until_idle()

    asyncio.run(main())
    # What vLLM leaves open is closed with it, here and not in another test.
    gc.collect()
