"""The text one process makes alone: the runner driven token by token, without scheduler, cache or transport."""

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from stator.config.models import resolve_model
from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk, SampleSpec
from stator.messages.engine import SamplingParams
from stator.messages.openai import ChatMessage
from stator.messages.tokens import unpack
from stator.processor import ModelTokenizer
from stator.processor.chat_template import ChatTemplate

BLOCK_SIZE = 64
CONTEXT = 2048
CHUNK = 256


@dataclass(frozen=True)
class Expected:
    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int


class Reference:
    """Greedy answers of a bundled model."""

    def __init__(self, model: str = "stator:tiny-llama") -> None:
        self._dir = resolve_model(model)
        self._runner = NumpyRunner(self._dir, block_size=BLOCK_SIZE, num_blocks=CONTEXT // BLOCK_SIZE)
        self._tokenizer = ModelTokenizer.load(self._dir)
        assert self._tokenizer.chat_template is not None
        source, origin = self._tokenizer.chat_template
        self._template = ChatTemplate(source, origin=origin, special_tokens=self._tokenizer.special_tokens)
        self._known: dict[str, Expected] = {}

    def chat(self, messages: list[dict[str, Any]], max_tokens: int) -> Expected:
        key = json.dumps([messages, max_tokens])
        if key not in self._known:
            text = self._template.render(msgspec.convert(messages, list[ChatMessage]))
            ids = unpack(self._tokenizer.encode(text, add_special_tokens=False))
            self._known[key] = self._generate(ids, max_tokens)
        return self._known[key]

    def _generate(self, prompt_ids: list[int], max_tokens: int) -> Expected:
        runner, blocks = self._runner, list(range(CONTEXT // BLOCK_SIZE))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        ids, output = list(prompt_ids), list[int]()
        computed = 0
        while len(output) < max_tokens:
            chunk = ids[computed : computed + CHUNK]
            last = computed + len(chunk) == len(ids)
            spec = SampleSpec(params, seed=0, position=len(ids), num_output=len(output)) if last else None
            (token,) = runner.step([Chunk(blocks, chunk, computed, spec)])
            computed += len(chunk)
            if token is None:
                continue
            if token in runner.eos_token_ids:
                return self._expected(prompt_ids, output, "stop")
            ids.append(token)
            output.append(token)
        return self._expected(prompt_ids, output, "length")

    def _expected(self, prompt_ids: list[int], output: list[int], finish_reason: str) -> Expected:
        # A stop token counts as generated, though its text is not shown.
        num_output = len(output) + (finish_reason == "stop")
        return Expected(self._tokenizer.decode(output), finish_reason, len(prompt_ids), num_output)
