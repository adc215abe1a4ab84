"""A stream that is cut anywhere is, to the client, the stream that was not: text, usage, ending, for every shape of
request that the engine can resume."""

import asyncio
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.engine import LocalEngine
from stator.engines.local.load import numpy_runner
from stator.messages.openai import ChatCompletionRequest, ChatMessage, CompletionRequest
from stator.processor.tokenizer import ModelTokenizer
from stator.testing.contracts.engine_suite import make_request
from stator.testing.fake_runner import FakeRunner

from . import tokenizers_for_tests as fixtures
from .cut_world import CutWorld, cut_world

NUM_TOKENS = 18
PROMPT = [40, 41, 42, 43, 44, 45, 46]
LIMIT_S = 55


def tokenizer(kind: str = "byte-level") -> ModelTokenizer:
    made = fixtures.byte_level() if kind == "byte-level" else fixtures.sentencepiece(True)
    return ModelTokenizer(made, special_tokens={"bos_token": "<s>", "eos_token": "<|im_end|>"})


def fake_engine(tokens: ModelTokenizer, **fields: Any) -> LocalEngine:
    runner = FakeRunner(block_size=4, num_blocks=256, vocab_size=tokens.num_ids, eos_token_ids=tokens.eos_ids)
    args = LocalEngineArgs(**{"model": "tiny", "block_size": 4, "enable_prefix_caching": False, **fields})
    return LocalEngine(args, runner_factory=lambda _: runner, rng=Random(1))


def request(**fields: Any) -> CompletionRequest:
    return CompletionRequest(model="tiny", prompt=PROMPT, **{"max_tokens": NUM_TOKENS, "ignore_eos": True, **fields})


SHAPES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "a seed": {"temperature": 1.0, "seed": 5},
    "a drawn seed": {"temperature": 0.8},
    "penalties": {"temperature": 0, "presence_penalty": 0.7, "frequency_penalty": -0.4, "repetition_penalty": 1.2},
    "penalties and a seed": {"seed": 9, "frequency_penalty": 1.5, "top_p": 0.9, "top_k": 20},
    "min_tokens": {"temperature": 0, "ignore_eos": False, "min_tokens": NUM_TOKENS},
    "a stop token": {"temperature": 0, "stop_token_at": 11},
    "a stop token that min_tokens bars": {"temperature": 0, "stop_token_at": 6, "min_tokens": 9},
    "one token": {"temperature": 0, "max_tokens": 1},
}


async def with_stops(world: CutWorld, fields: dict[str, Any]) -> CompletionRequest:
    """Stop tokens by where they are in the undisturbed output."""
    at = fields.pop("stop_token_at", None)
    if at is None:
        return request(**fields)
    plain = await world.engines[0].text(make_request("ids", PROMPT, max_tokens=NUM_TOKENS))
    return request(**fields, stop_token_ids=[plain[at]])


async def check_every_cut(world: CutWorld, asked: Any, *, endpoint: str = "completions") -> None:
    whole = await world.run(asked, endpoint=endpoint)
    num_tokens = whole.usage["completion_tokens"]
    assert whole.num_attempts == 1
    for cut in range(num_tokens):
        got = await world.run(asked, [cut], endpoint=endpoint)
        assert got.same_as(whole), f"cut after {cut} tokens: {got} instead of {whole}"
        assert got.num_attempts == 2, cut
    for pieces in ([1] * (num_tokens - 1), [0, 2, 0, 3, 1], [5, 5, 5]):
        got = await world.run(asked, pieces, endpoint=endpoint)
        assert got.same_as(whole), f"cut into {pieces}: {got} instead of {whole}"
        assert got.num_attempts > 1 or not pieces or pieces[0] >= num_tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_every_cut_of_every_shape(shape: str) -> None:
    async def run() -> None:
        tokens = tokenizer()
        async with cut_world(tokens, lambda: fake_engine(tokens)) as world:
            await check_every_cut(world, await with_stops(world, dict(SHAPES[shape])))

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_every_cut_with_half_characters_held_back(kind: str) -> None:
    """The text of random tokens is full of bytes that are no character yet; a chat is detokenized in the same way."""

    async def run() -> None:
        tokens = tokenizer(kind)
        async with cut_world(tokens, lambda: fake_engine(tokens)) as world:
            for seed in (1, 2, 3):
                asked = request(temperature=1.5, seed=seed)
                deltas = (await world.open("completions", asked).done()).deltas
                assert any(delta.num_tokens > 1 for delta in deltas), "nothing was held back"
                await check_every_cut(world, asked)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def stops_in(text: str) -> list[list[str]]:
    """Stop strings for a text: found late, found early, found at its end, begun and never finished, several."""
    never = chr(0x10FFFF)
    middle = len(text) // 2
    return [
        [text[middle : middle + 5]],
        [text[2:4]],
        [text[-3:]],
        [text[middle : middle + 6] + never],
        [text[3:9] + never, text[middle : middle + 4]],
    ]


def test_every_cut_with_stop_strings_partly_matched() -> None:
    async def run() -> None:
        tokens = tokenizer()
        async with cut_world(tokens, lambda: fake_engine(tokens)) as world:
            whole = await world.run(request(temperature=0))
            endings = set[str]()
            for stop in stops_in(whole.text):
                asked = request(temperature=0, stop=stop)
                endings.add((await world.run(asked)).ending)
                await check_every_cut(world, asked)
            assert endings == {"stop", "length"}
            await check_every_cut(world, request(temperature=0, stop=stops_in(whole.text)[1], min_tokens=8))

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_cached_tokens_are_those_of_the_first_attempt_that_gave_a_token() -> None:
    async def run() -> None:
        tokens = tokenizer()
        async with cut_world(tokens, lambda: fake_engine(tokens, enable_prefix_caching=True)) as world:
            asked = request(temperature=0)
            cold = await world.run(asked)
            assert cold.usage["prompt_tokens_details"]["cached_tokens"] == 0
            warm = await world.run(asked)
            cached = warm.usage["prompt_tokens_details"]["cached_tokens"]
            assert cached > 0, "w0's engine has it"
            # The second engine has nothing yet, then the tokens that it resumed from.
            for cut in (1, 5, 9):
                got = await world.run(asked, [cut])
                assert got.same_as(warm)
            assert got.usage["prompt_tokens"] == len(PROMPT) and got.usage["completion_tokens"] == NUM_TOKENS

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.8, "presence_penalty": 0.3},
        {"temperature": 0, "repetition_penalty": 1.3, "stop": ["th"], "min_tokens": 4},
    ],
)
def test_a_real_model_goes_on_as_if_nothing_had_happened(fields: dict[str, Any]) -> None:
    model = Path(str(files("stator") / "models" / "tiny-llama"))

    def engine() -> LocalEngine:
        args = LocalEngineArgs(model=str(model), block_size=16, num_gpu_blocks_override=64, enable_prefix_caching=False)
        return LocalEngine(args, runner_factory=numpy_runner, rng=Random(1))

    async def run() -> None:
        async with cut_world(ModelTokenizer.load(model), engine) as world:
            messages = [ChatMessage("user", "Tell me about the sea.")]
            asked = ChatCompletionRequest(model="tiny", messages=messages, max_tokens=14, **fields)
            whole = await world.run(asked, endpoint="chat")
            for cuts in ([0], [1], [6], [2, 3, 1], [1] * 8):
                got = await world.run(asked, cuts, endpoint="chat")
                assert got.same_as(whole), f"{cuts}: {got} instead of {whole}"

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
