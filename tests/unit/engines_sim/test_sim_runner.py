"""What the sim engine says: words of the model's tokenizer, by a hash of everything before them."""

import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import tokenizers

from stator.config.models import resolve_model
from stator.engines.local.runner import Chunk, SampleSpec
from stator.engines.sim.runner import SimRunner
from stator.engines.sim.vocabulary import ENOUGH_WORDS, Vocabulary, load_vocabulary
from stator.errors import ConfigError
from stator.messages.engine import SamplingParams

TINY = resolve_model("stator:tiny-llama")
VOCABULARY = Vocabulary(tuple(range(10, 1000)), 1000, frozenset({2, 3}), 512)
PROMPT = random.Random(1).choices(range(1000), k=37)
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)


def runner(block_size: int = 4, mean: float | None = None, vocabulary: Vocabulary = VOCABULARY) -> SimRunner:
    return SimRunner(vocabulary, block_size=block_size, num_blocks=64, mean_output_tokens=mean)


def spec(position: int, params: SamplingParams = GREEDY, num_output: int = 0, **fields: Any) -> SampleSpec:
    return SampleSpec(params, fields.pop("seed", 7), position, num_output, **fields)


def compute(made: SimRunner, tokens: list[int], size: int = 64, spec_of_end: SampleSpec | None = None) -> int:
    """The token after these, computed in chunks."""
    blocks = range(-(-(len(tokens) + 1) // made.block_size))
    sampled: int | None = None
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        end = start + len(part) == len(tokens)
        (sampled,) = made.step([Chunk(blocks, part, start, (spec_of_end or spec(len(tokens))) if end else None)])
    assert sampled is not None
    return sampled


def output(made: SimRunner, count: int, **params: Any) -> list[int]:
    """Until an eos, or so many tokens."""
    asked = msgspec.structs.replace(GREEDY, **params)
    tokens = list(PROMPT)
    for index in range(count):
        tokens.append(compute(made, tokens, spec_of_end=spec(len(tokens), asked, index)))
        if tokens[-1] in VOCABULARY.eos_token_ids:
            break
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_next_token_depends_on_the_tokens_alone(block_size: int, size: int) -> None:
    assert compute(runner(block_size), PROMPT, size) == compute(runner(), PROMPT)


def test_every_token_before_counts_even_far_back() -> None:
    expected = compute(runner(), PROMPT)
    for index in range(len(PROMPT)):
        changed = list(PROMPT)
        changed[index] ^= 1
        assert compute(runner(), changed) != expected


def test_wrong_blocks_change_the_text_and_unwritten_ones_fail() -> None:
    made = runner()
    expected = compute(made, PROMPT)
    other = [10] * 4
    made.step([Chunk([40], other, 0, None)])
    table = list(range(10))
    last = Chunk(table, PROMPT[-1:], len(PROMPT) - 1, spec(len(PROMPT)))
    assert made.step([last]) == [expected]
    assert made.step([replace(last, block_ids=[40, *table[1:]])]) != [expected]
    with pytest.raises(AssertionError, match="never written"):
        made.step([replace(last, block_ids=[41, *table[1:]])])
    with pytest.raises(AssertionError, match="never written"):
        made.step([Chunk([50], [7], 2, spec(3))])
    with pytest.raises(IndexError):
        made.step([replace(last, block_ids=table[:9])])
    with pytest.raises(IndexError, match="no block 64; there are 64"):
        made.step([Chunk([64], [7], 0, None)])


def test_blocks_travel_and_a_wrong_size_is_refused() -> None:
    one, two = runner(), runner()
    expected = compute(one, PROMPT)
    for block_id in range(9):
        two.import_block(20 + block_id, one.export_block(block_id))
    table = [*range(20, 29), 5]
    assert two.step([Chunk(table, PROMPT[36:], 36, spec(37))]) == [expected]
    with pytest.raises(ValueError, match="a block has 16 bytes, got 15"):
        two.import_block(0, bytes(15))


def test_seed_and_position_count_with_temperature_and_histories_with_penalties() -> None:
    warm = SamplingParams(max_tokens=9, temperature=1.0)
    greedy = {compute(runner(), PROMPT, spec_of_end=spec(37, seed=seed)) for seed in range(5)}
    assert len(greedy) == 1
    assert len({compute(runner(), PROMPT, spec_of_end=spec(37, warm, seed=seed)) for seed in range(5)}) == 5
    histories = [spec(37, prompt_ids=PROMPT[:cut], output_ids=PROMPT[cut:]) for cut in (20, 21)]
    assert len({compute(runner(), PROMPT, spec_of_end=each) for each in histories} | greedy) == 3


def test_without_a_mean_no_output_ends_by_itself() -> None:
    assert len(output(runner(), 200)) == 200


def test_outputs_end_after_the_mean_number_of_tokens() -> None:
    made = runner(64, mean=20.0)
    lengths: list[int] = []
    for seed in range(300):
        tokens = list(PROMPT)
        asked = SamplingParams(max_tokens=400, temperature=1.0)
        while tokens[-1] != 2:
            at = len(tokens)
            tokens.append(compute(made, tokens, spec_of_end=spec(at, asked, at - len(PROMPT), seed=seed)))
        lengths.append(len(tokens) - len(PROMPT))
    assert 17 < sum(lengths) / len(lengths) < 23, "300 geometric lengths of mean 20 have a standard error of 1.1"
    assert min(lengths) <= 2 and max(lengths) > 60
    assert output(made, 400) == output(runner(mean=20.0), 400), "the same prompt ends at the same place"


def test_the_end_obeys_the_request() -> None:
    made = runner(64, mean=2.0)
    short = output(made, 200)
    assert short[-1] == 2 and len(short) < 60
    assert not VOCABULARY.eos_token_ids.intersection(output(made, 200, ignore_eos=True))
    late = output(made, 200, min_tokens=80)
    assert len(late) > 80 and late[-1] == 2


def test_stop_tokens_do_not_come_before_min_tokens() -> None:
    vocabulary = replace(VOCABULARY, words=(10, 11))
    made = runner(vocabulary=vocabulary)
    assert set(output(made, 50)) == {10, 11}
    assert set(output(made, 50, min_tokens=50, stop_token_ids=(11,))) == {10}
    # Nothing else is left to say.
    assert len(output(made, 5, min_tokens=5, stop_token_ids=(10, 11))) == 5


def test_the_words_of_a_model_read_like_text() -> None:
    found = load_vocabulary(TINY)
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert len(found.words) > ENOUGH_WORDS
    assert not special.intersection(found.words) and not found.eos_token_ids.intersection(found.words)
    assert (found.vocab_size, found.max_model_len, found.eos_token_ids) == (4096, 2048, frozenset({1, 3}))
    text = tokenizer.decode(random.Random(1).choices(found.words, k=400), skip_special_tokens=False)
    assert text.isascii() and text.isprintable()
    assert len(text.split()) > 300
    assert load_vocabulary(TINY).fingerprint == found.fingerprint
    assert replace(found, words=found.words[:-1]).fingerprint != found.fingerprint


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        load_vocabulary(tmp_path)
