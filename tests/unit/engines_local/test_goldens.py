"""The bundled models on the numpy runner against what transformers computed (tests/golden)."""

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk
from unit.engines_local.local_models import greedy_spec

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = Path(str(files("stator"))) / "models"
BLOCK_SIZE = 64
TOLERANCE = 1e-3
CHUNK_TOKENS = 256


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-decilm"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Case:
    """A greedy case under way."""

    golden: dict[str, Any]
    blocks: list[int]
    computed: int = 0
    output: list[int] = field(default_factory=list)

    def next_chunk(self) -> Chunk:
        tokens = (self.golden["prompt_ids"] + self.output)[self.computed :][:CHUNK_TOKENS]
        end = self.computed + len(tokens)
        last = end == len(self.golden["prompt_ids"]) + len(self.output)
        return Chunk(self.blocks, tokens, self.computed, greedy_spec(end) if last else None)


def matching_tokens(golden: dict[str, Any], output: list[int]) -> int:
    """Tokens that must agree: all, or those before the first near tie at which they part."""
    expected = golden["output_ids"]
    for index, (a, b) in enumerate(zip(expected, output, strict=False)):
        if a != b and index in golden["near_ties"]:
            return index
    return len(expected)


def test_logits(model: str) -> None:
    with np.load(GOLDEN / f"{model}-logits.npz") as stored:
        for prompt in sorted({name.rpartition(".")[0] for name in stored.files}):
            tokens = stored[f"{prompt}.ids"].tolist()
            num_blocks = -(-len(tokens) // BLOCK_SIZE)
            runner = NumpyRunner(MODELS / model, block_size=BLOCK_SIZE, num_blocks=num_blocks)
            found = runner.logits([Chunk(range(num_blocks), tokens, 0, None)])[stored[f"{prompt}.positions"]]
            np.testing.assert_allclose(found, stored[f"{prompt}.logits"], atol=TOLERANCE, rtol=0, err_msg=prompt)


def test_greedy_texts_in_one_batch(model: str) -> None:
    goldens = json.loads((GOLDEN / f"{model}.json").read_text(encoding="utf-8"))["greedy"]
    cases: list[Case] = []
    first = 0
    for golden in goldens:
        count = -(-(len(golden["prompt_ids"]) + len(golden["output_ids"])) // BLOCK_SIZE)
        cases.append(Case(golden, list(range(first, first + count))))
        first += count
    runner = NumpyRunner(MODELS / model, block_size=BLOCK_SIZE, num_blocks=first)
    while running := [case for case in cases if len(case.output) < len(case.golden["output_ids"])]:
        chunks = [case.next_chunk() for case in running]
        for case, chunk, token in zip(running, chunks, runner.step(chunks), strict=True):
            case.computed += len(chunk.token_ids)
            if token is not None:
                case.output.append(token)
    for case in cases:
        agreed = matching_tokens(case.golden, case.output)
        assert case.output[:agreed] == case.golden["output_ids"][:agreed], case.golden["name"]


def test_published_facts(model: str) -> None:
    """Other parts rely on these."""
    runner = NumpyRunner(MODELS / model, block_size=BLOCK_SIZE, num_blocks=1)
    assert (runner.vocab_size, runner.max_model_len, runner.eos_token_ids) == (4096, 2048, frozenset({1, 3}))
