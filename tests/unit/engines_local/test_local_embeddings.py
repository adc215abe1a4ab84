"""Embeddings of the numpy runner: exact in any order, and computed apart from the blocks of sequences."""

from array import array
from pathlib import Path

import numpy as np
import pytest

from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.pooling import PART_TOKENS, MeanPool
from stator.engines.local.runner import Chunk
from unit.engines_local.local_models import block, decilm_config, random_tensors, write_model
from unit.engines_local.pooled import mean_pooled


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> NumpyRunner:
    """With a layer that has no attention, as some models do."""
    path: Path = tmp_path_factory.mktemp("model")
    config = decilm_config([block(2), block(None, 1.3), block(4, 2.0)])
    write_model(path, config, random_tensors(config))
    return NumpyRunner(path, block_size=4, num_blocks=64)


def tokens(count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, 32, count).tolist()


@pytest.mark.parametrize("count", [1, 3, 4, PART_TOKENS, PART_TOKENS + 1, 3 * PART_TOKENS + 5])
def test_parts_make_the_mean_of_the_whole(runner: NumpyRunner, count: int):
    ids = tokens(count)
    *before, vector = list(runner.embed(ids))
    assert before == [None] * ((count - 1) // PART_TOKENS)
    assert vector is not None
    found = array("f", vector).tolist()
    assert found == pytest.approx(mean_pooled(runner, ids), abs=1e-6)
    assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-6)


def test_sequences_and_other_inputs_between_the_parts_change_nothing(runner: NumpyRunner):
    ids, other = tokens(150), tokens(90)
    alone, alone_other = list(runner.embed(ids))[-1], list(runner.embed(other))[-1]
    chunk = Chunk(tuple(range(10)), tokens(33), 0, None)
    logits = runner.logits([chunk])
    kept = [runner.export_block(index) for index in range(9)]
    one, two = runner.embed(ids), runner.embed(other)
    found: list[bytes | None] = []
    for _ in range(2):
        found += [next(one), next(two)]
        assert np.array_equal(runner.logits([chunk]), logits)
    assert next(one) == alone and found[-1] == alone_other
    assert [runner.export_block(index) for index in range(9)] == kept


def test_a_mean_of_zeros_is_no_division_by_zero():
    pool = MeanPool(3)
    pool.add(np.zeros((2, 3), np.float32))
    assert array("f", pool.vector()).tolist() == [0.0, 0.0, 0.0]
