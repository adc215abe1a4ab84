"""The engine contract on the local engine, with a runner without a model and with numpy on the bundled models, and on
the sim engine, on real and on virtual time."""

import random

from stator.engines.base import Engine
from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.engine import LocalEngine
from stator.engines.local.load import numpy_runner
from stator.engines.sim.args import SimEngineArgs
from stator.engines.sim.engine import SimEngine
from stator.testing.contracts.engine import EngineContract
from stator.testing.contracts.engine_grammar import EngineGrammarContract
from stator.testing.contracts.engine_suite import EngineSettings
from stator.testing.fake_runner import fake_runner


def _args(model: str, block_size: int, settings: EngineSettings) -> LocalEngineArgs:
    return LocalEngineArgs(
        model=model,
        block_size=block_size,
        num_gpu_blocks_override=settings.num_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        transfer_hold_s=settings.transfer_hold_s,
    )


class TestLocalEngineWithoutModel(EngineContract):
    block_size = 4
    vocab_size = 1000

    def make_engine(self, settings: EngineSettings) -> Engine:
        args = _args("fake", self.block_size, settings)
        return LocalEngine(args, runner_factory=fake_runner, rng=random.Random(1))


class TestLocalEngineOverTcp(TestLocalEngineWithoutModel):
    tcp = True


class TestLocalEngineOnLlama(EngineContract, EngineGrammarContract):
    block_size = 16
    vocab_size = 4096

    def make_engine(self, settings: EngineSettings) -> Engine:
        args = _args("stator:tiny-llama", self.block_size, settings)
        return LocalEngine(args, runner_factory=numpy_runner, rng=random.Random(1))


class _LocalEngineOnDeciLM(TestLocalEngineOnLlama):
    def make_engine(self, settings: EngineSettings) -> Engine:
        args = _args("stator:tiny-decilm", self.block_size, settings)
        return LocalEngine(args, runner_factory=numpy_runner, rng=random.Random(1))


def test_blocks_of_a_model_with_unequal_layers_transfer() -> None:
    _LocalEngineOnDeciLM().test_prefill_transfer_decode_equals_local()


class TestSimEngineOnVirtualTime(EngineContract):
    """With the step times of a large model. The loop fails where something waits for a thread or a socket."""

    block_size = 16
    vocab_size = 4096
    virtual_time = True
    speed = 1.0

    def make_engine(self, settings: EngineSettings) -> Engine:
        args = SimEngineArgs(
            model="stator:tiny-llama",
            block_size=self.block_size,
            num_gpu_blocks_override=settings.num_blocks,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            transfer_hold_s=settings.transfer_hold_s,
            step_times="405b-h100-fp8",
            sim_speed=self.speed,
        )
        return SimEngine(args, rng=random.Random(1))


class TestSimEngineOverTcp(TestSimEngineOnVirtualTime):
    virtual_time = False
    tcp = True
    speed = 20.0
