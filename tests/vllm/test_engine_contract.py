"""The engine contract on vLLM, with Stator's own connector."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import stator
from stator.engines.base import Engine
from stator.engines.vllm.engine import VllmEngine
from stator.testing.contracts.engine import EngineContract
from stator.testing.contracts.engine_grammar import EngineGrammarContract
from stator.testing.contracts.engine_suite import EngineSettings, Scenario
from vllm_engines import forked

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore")]

MODEL = Path(stator.__file__).parent / "models" / "tiny-llama"


POOL = forked.EnginePool()


@pytest.fixture(scope="module", autouse=True)
def vllm() -> Iterator[None]:
    forked.prepare()
    yield
    POOL.close()


class TestVllmEngine(EngineContract, EngineGrammarContract):
    block_size = 32
    vocab_size = 4096
    computes_apart = True
    last_block_again = True
    score_tolerance = 1e-3
    own_grammar = 'root ::= "yes" | "no"'
    bombs_go_off = True
    scenario_s = 200.0

    def make_engine(self, settings: EngineSettings) -> Engine:
        section = {
            "model": str(MODEL),
            "served_model_name": "tiny-llama",
            "dtype": "float32",
            "block_size": self.block_size,
            # vLLM starts only if one sequence of that length fits.
            "max_model_len": min(24, settings.num_blocks) * self.block_size,
            # One block is vLLM's own.
            "num_gpu_blocks_override": settings.num_blocks + 1,
            "kv_cache_memory_bytes": 256 << 20,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "enforce_eager": True,
            # A model this small may write nothing else.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        return forked.engine(section, hold_s=settings.transfer_hold_s)

    def run(self, scenario: Scenario, settings: EngineSettings | None = None, *, ends_engines: bool = False) -> None:
        if ends_engines:
            super().run(scenario, settings)
        else:
            chosen = settings or EngineSettings()
            POOL.run(scenario, chosen, lambda: self.make_engine(chosen), bound_s=self.scenario_s)

    async def settle(self, engine: Engine) -> None:
        assert isinstance(engine, VllmEngine)
        await engine.kv_events_settled()
