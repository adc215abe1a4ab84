"""Embeddings of a vLLM pooling model: those of the local engine, where both take the mean."""

import asyncio
from array import array
from pathlib import Path

import pytest

import stator
from stator.engines.local.numpy_runner import NumpyRunner
from stator.errors import ErrorCode
from stator.testing.contracts.engine_embeddings import embed, vector_of
from stator.testing.contracts.engine_suite import make_request
from stator.testing.engine_bench import running_engines
from vllm_engines import forked

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore")]

MODEL = Path(stator.__file__).parent / "models" / "tiny-llama"
SECTION = {
    "model": str(MODEL),
    "served_model_name": "tiny-llama",
    "runner": "pooling",
    "convert": "embed",
    "pooler_config": {"seq_pooling_type": "MEAN"},
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 512,
    "num_gpu_blocks_override": 65,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
}


def test_a_pooling_model_gives_what_the_local_engine_computes() -> None:
    forked.prepare()
    runner = NumpyRunner(MODEL, block_size=16, num_blocks=1)

    async def main() -> None:
        async with running_engines(forked.engine(SECTION)) as (one,):
            assert one.info.can_embed
            prompts = [list(range(300, 300 + length)) for length in (1, 31, 100, 500)]
            found = await asyncio.gather(*(vector_of(one, str(len(prompt)), prompt) for prompt in prompts))
            for prompt, vector in zip(prompts, found, strict=True):
                *_, expected = runner.embed(prompt)
                assert expected is not None
                assert vector == pytest.approx(array("f", expected).tolist(), abs=1e-5)
            refused = await embed(one, "cut", [5], dimensions=8).wait_error()
            assert (refused.code, refused.param) == (ErrorCode.UNSUPPORTED, "dimensions")
            refused = await one.generate(make_request("text", [5])).wait_error()
            assert (refused.code, refused.param) == (ErrorCode.UNSUPPORTED, "model")
            await one.until_idle()

    asyncio.run(main())
