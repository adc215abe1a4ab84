"""The engine of the simulated workers: the product's sim engine, with a vocabulary that makes text difficult."""

import contextlib
import functools
from collections.abc import Generator, Mapping
from random import Random
from typing import Any

from stator.engines import registry
from stator.engines.base import Engine
from stator.engines.local.args import LocalEngineArgs
from stator.engines.sim.args import SimEngineArgs, args_from_section
from stator.engines.sim.engine import SimEngine
from stator.engines.sim.runner import SimRunner
from stator.engines.sim.vocabulary import Vocabulary
from stator.testing.sim.workload import MAX_MODEL_LEN, tokenizer

MEAN_OUTPUT_TOKENS = 60.0


@functools.cache
def _vocabulary() -> Vocabulary:
    """All that the tokenizer has but special tokens: pieces of words, and bytes that are characters only together."""
    known = tokenizer()
    words = tuple(i for i in range(known.num_ids) if i not in known.special_ids and i not in known.eos_ids)
    return Vocabulary(words, known.num_ids, known.eos_ids, MAX_MODEL_LEN)


def make_runner(*, block_size: int, num_blocks: int) -> SimRunner:
    return SimRunner(_vocabulary(), block_size=block_size, num_blocks=num_blocks, mean_output_tokens=MEAN_OUTPUT_TOKENS)


def _runner_of(args: LocalEngineArgs) -> SimRunner:
    assert isinstance(args, SimEngineArgs)
    return make_runner(block_size=args.block_size, num_blocks=args.num_blocks)


def _make(values: Mapping[str, Any], rng: Random | None) -> Engine:
    return SimEngine(args_from_section(values), rng=rng, runner_factory=_runner_of)


@contextlib.contextmanager
def sim_engines() -> Generator[None]:
    """Within, `engine: sim` is this one."""
    engines = registry._ENGINES  # pyright: ignore[reportPrivateUsage]
    before = engines["sim"]
    engines["sim"] = _make
    try:
        yield
    finally:
        engines["sim"] = before
