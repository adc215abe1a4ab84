"""A sequence's logits are the same bits in any batch, chunking, block table, and when computed again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stator.engines.local import forward
from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk
from unit.engines_local.local_models import block, decilm_config, llama_config, write_model

MAX_TOKENS = 150


@st.composite
def model_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Llama and DeciLM of odd sizes, with every kind of layer."""
    kv_heads, per_kv = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (2, 4), (1, 9), (3, 2)]))
    heads = kv_heads * per_kv
    common = {
        "hidden_size": draw(st.sampled_from([1, 7, 24, 33, 64])),
        "num_attention_heads": heads,
        "head_dim": draw(st.sampled_from([2, 6, 10, 64])),
        "vocab_size": draw(st.sampled_from([17, 101, 640])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return llama_config(
            **common, num_key_value_heads=kv_heads, intermediate_size=draw(st.sampled_from([1, 37, 300]))
        )
    groups = st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0])
    blocks = st.one_of(
        st.builds(block, groups, st.sampled_from([None, 1.3])),
        st.sampled_from([block(None, 1.0), block(linear="attention"), block(heads, linear="ffn"), block()]),
    )
    return decilm_config(draw(st.lists(blocks, min_size=1, max_size=4)), **common)


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    logits: list[bytes] = field(default_factory=list)


def reference_logits(runner: NumpyRunner, tokens: list[int]) -> list[bytes]:
    """Alone, whole, in the first blocks in order."""
    blocks = range(-(-len(tokens) // runner.block_size))
    return [row.tobytes() for row in runner.logits([Chunk(blocks, tokens, 0, None)])]


def run_schedule(runner: NumpyRunner, sequences: list[Sequence], data: st.DataObject) -> None:
    """Random steps until all sequences are computed: any subset, any cut, now and then a preemption."""
    free = data.draw(st.permutations(range(runner.num_blocks)))
    preemptions = data.draw(st.integers(0, 2))
    while pending := [s for s in sequences if s.done < len(s.tokens)]:
        chosen = data.draw(st.lists(st.sampled_from(range(len(pending))), min_size=1, unique=True))
        chunks: list[Chunk] = []
        for sequence in (pending[i] for i in chosen):
            count = data.draw(st.sampled_from([1, 2, 9, 64, MAX_TOKENS]))
            tokens = sequence.tokens[sequence.done : sequence.done + count]
            needed = -(-(sequence.done + len(tokens)) // runner.block_size)
            while len(sequence.blocks) < needed:
                sequence.blocks.append(free.pop())
            chunks.append(Chunk(list(sequence.blocks), tokens, sequence.done, None))
        rows = iter(runner.logits(chunks))
        for sequence, chunk in zip((pending[i] for i in chosen), chunks, strict=True):
            sequence.logits.extend(next(rows).tobytes() for _ in chunk.token_ids)
            sequence.done += len(chunk.token_ids)
        if preemptions:
            preemptions -= 1
            victim = sequences[data.draw(st.sampled_from(range(len(sequences))))]
            free.extend(victim.blocks)
            victim.blocks, victim.done, victim.logits = [], 0, []


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=model_configs(), block_size=st.sampled_from([1, 3, 16, 64]), data=st.data())
def test_logits_are_bit_equal_for_any_schedule(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], block_size: int, data: st.DataObject
) -> None:
    directory = write_model(tmp_path_factory.mktemp("model"), config)
    count = data.draw(st.integers(1, 5))
    num_blocks = count * (-(-MAX_TOKENS // block_size))
    runner = NumpyRunner(directory, block_size=block_size, num_blocks=num_blocks)
    token_lists = st.lists(st.integers(0, config["vocab_size"] - 1), min_size=1, max_size=MAX_TOKENS)
    sequences = [Sequence(data.draw(token_lists)) for _ in range(count)]
    expected = [reference_logits(runner, s.tokens) for s in sequences]
    run_schedule(runner, sequences, data)
    assert [s.logits for s in sequences] == expected


@pytest.mark.parametrize("single_rows", [False, True])
def test_decoding_many_sequences_equals_each_alone(
    tmp_path: Path, single_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes as in the bundled models, where a BLAS uses its fast kernels; and without trust in any kernel."""
    if single_rows:
        monkeypatch.setattr(forward, "choose_tile", lambda *_: 1)
    config = llama_config(
        hidden_size=256, num_attention_heads=4, head_dim=64, intermediate_size=640, vocab_size=512, num_hidden_layers=1
    )
    write_model(tmp_path, config)
    runner = NumpyRunner(tmp_path, block_size=64, num_blocks=120)
    random = np.random.default_rng(5)
    sequences = [random.integers(0, 512, random.integers(2, 200)).tolist() for _ in range(25)]
    expected = [reference_logits(runner, tokens)[-1] for tokens in sequences]
    tables = np.array_split(random.permutation(120)[:100], 25)
    runner.step([Chunk(t.tolist(), s[:-1], 0, None) for s, t in zip(sequences, tables, strict=True)])
    last = [Chunk(t.tolist(), s[-1:], len(s) - 1, None) for s, t in zip(sequences, tables, strict=True)]
    assert [row.tobytes() for row in runner.logits(last)] == expected


def test_a_neighbour_with_infinite_activations_does_not_leak(tmp_path: Path) -> None:
    """NaN left in a block by its former owner, or held by a sequence of the same batch, reaches nobody else."""
    runner = NumpyRunner(write_model(tmp_path, llama_config()), block_size=16, num_blocks=8)
    tokens = [5, 6, 7, 8, 9]
    expected = reference_logits(runner, tokens)
    poison = np.full(runner.block_bytes // 4, np.nan, np.float32).tobytes()
    for block_id in range(runner.num_blocks):
        runner.import_block(block_id, poison)
    alone = runner.logits([Chunk([3], tokens[:-1], 0, None)])
    with np.errstate(invalid="ignore"):
        # a longer, poisoned sequence decodes beside it, which pads the healthy one's block table
        both = runner.logits([Chunk([0, 1, 2], [1], 40, None), Chunk([3], tokens[-1:], 4, None)])
    assert [row.tobytes() for row in (*alone, both[1])] == expected


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_exported_blocks_continue_bit_equal_on_another_runner(tmp_path: Path, length: int) -> None:
    write_model(tmp_path, decilm_config([block(2, 1.0), block(None, 1.0), block(4)]))
    first = NumpyRunner(tmp_path, block_size=16, num_blocks=8)
    second = NumpyRunner(tmp_path, block_size=16, num_blocks=5)
    tokens = np.random.default_rng(length).integers(0, 101, length + 3).tolist()
    expected = reference_logits(first, tokens)[length:]
    source, target = [7, 2, 5], [1, 4, 0]
    first.step([Chunk(source, tokens[:length], 0, None)])
    for a, b in zip(source[: -(-length // 16)], target, strict=False):
        data = first.export_block(a)
        assert len(data) == first.block_bytes == second.block_bytes
        second.import_block(b, data)
    rows = second.logits([Chunk(target, tokens[length:], length, None)])
    assert [row.tobytes() for row in rows] == expected


@pytest.mark.parametrize("function", [np.exp, np.sqrt, np.negative])
def test_elementwise_functions_do_not_depend_on_place_or_length(function: Callable[..., Any]) -> None:
    """numpy computes most of an array with vector instructions and the rest otherwise; both must agree."""
    values = np.abs(np.random.default_rng(0).standard_normal(200).astype(np.float32)) * 20
    expected = np.array([function(value) for value in values.reshape(-1, 1)]).reshape(-1)
    for length in range(1, 200):
        assert function(values[:length]).tobytes() == expected[:length].tobytes()
        assert function(values[length:]).tobytes() == expected[length:].tobytes()
    spread = np.zeros((200, 3), np.float32)
    spread[:, 1] = values
    assert np.ascontiguousarray(function(spread[:, 1])).tobytes() == expected.tobytes()


def test_row_sums_do_not_depend_on_the_number_of_rows() -> None:
    for width in (1, 7, 24, 64, 129, 256, 1000):
        values = np.random.default_rng(width).standard_normal((40, width)).astype(np.float32)
        expected = np.add.reduce(values[:8], axis=-1)
        for first in range(8):
            for rows in (8 - first, 16, 32):
                part = np.ascontiguousarray(values[first : first + rows])
                common = min(8 - first, rows)
                assert np.add.reduce(part, axis=-1)[:common].tobytes() == expected[first : first + common].tobytes()
