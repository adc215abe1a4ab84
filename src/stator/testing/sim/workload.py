"""Requests of all kinds, drawn from a seed, and what each must get if nothing but its own client stands in the way.

The expected text does not come from a cluster: the runner is driven here one sequence at a time, without scheduler,
cache, transfer or transport.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from stator.core.sequence_limits import stop_reason
from stator.engines.local.runner import Chunk, Runner, SampleSpec
from stator.messages.engine import FinishReason, SamplingParams
from stator.messages.openai import ChatMessage
from stator.messages.tokens import unpack
from stator.processor.chat_template import ChatTemplate
from stator.processor.output import OutputText
from stator.processor.tokenizer import ModelTokenizer
from stator.testing.sim.client import Answer, Manners

MODEL_DIR = Path(__file__).resolve().parents[2] / "models" / "tiny-llama"
SERVED_NAME = "sim-model"
BLOCK_SIZE = 16
MAX_MODEL_LEN = 768
NUM_BLOCKS = 96

_PROSE = """
the engine of a small boat reads its map by the light from town where rain falls on tin roofs and no one counts the
hours until morning comes with bread and news about rivers, markets, quiet clerks, two dogs, one red kite
"""
_WORDS = _PROSE.split()
_RARE = ("日本語", "naïve", "😀", "Ελλάδα", "çağ", "🚲🚲", "…", "ß")


@dataclass(slots=True)
class Expected:
    """What an undisturbed deployment answers. ids: every output token that counts, stop token included."""

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class Request:
    number: int
    at: float
    path: str
    body: dict[str, Any]
    manners: Manners
    timeout_s: float | None
    expected: Expected | None
    """None for a sampled request without a seed, whose text nobody can know."""
    prompt_ids: list[int]
    num_tokens_at_most: int
    answer: Answer = field(default_factory=Answer)

    @property
    def name(self) -> str:
        return f"r{self.number}"

    @property
    def summary(self) -> str:
        """What of it matters for reading a trace."""
        chosen = {key: value for key, value in self.body.items() if key not in ("messages", "prompt", "model")}
        manners = self.manners
        return f"{len(self.prompt_ids)} prompt tokens, {chosen}, {manners}, timeout {self.timeout_s}"

    @property
    def encoded(self) -> bytes:
        return msgspec.json.encode(self.body)


@functools.cache
def tokenizer() -> ModelTokenizer:
    return ModelTokenizer.load(MODEL_DIR)


@functools.cache
def _template() -> ChatTemplate:
    source, origin = tokenizer().chat_template or ("", "")
    return ChatTemplate(source, origin=origin, special_tokens=tokenizer().special_tokens)


class Workload:
    """make_runner: a runner like the cluster's, for the expected texts."""

    def __init__(self, rng: Random, make_runner: Callable[[], Runner], *, num_requests: int, over_s: float) -> None:
        self._rng = rng
        self._runner = make_runner()
        self._prefixes = [self._prose(rng.randint(20, 120)) for _ in range(3)]
        starts = sorted(rng.random() * over_s for _ in range(num_requests))
        self.requests = [self._request(number, at) for number, at in enumerate(starts, 1)]

    def _prose(self, num_words: int) -> str:
        rng = self._rng
        return " ".join(rng.choice(_RARE if rng.random() < 0.08 else _WORDS) for _ in range(num_words))

    def _prompt(self) -> str:
        rng = self._rng
        own = self._prose(rng.choice((3, 8, 20, 60)))
        return f"{rng.choice(self._prefixes)} {own}" if rng.random() < 0.6 else own

    def _request(self, number: int, at: float) -> Request:
        rng = self._rng
        chat = rng.random() < 0.5
        body: dict[str, Any] = {"model": SERVED_NAME, "max_tokens": rng.choice((1, 8, 24, 48, 80))}
        if chat:
            messages = [{"role": "user", "content": self._prompt()}]
            if rng.random() < 0.5:
                messages.insert(0, {"role": "system", "content": rng.choice(self._prefixes)})
            body["messages"] = messages
        else:
            body["prompt"] = self._prompt()
        self._sampling(body)
        if rng.random() < 0.75:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        expected = self._expected(body)
        if expected is not None and rng.random() < 0.3 and len(expected.text) > 8:
            start = rng.randrange(len(expected.text) // 2, len(expected.text) - 2)
            body["stop"] = [expected.text[start : start + rng.randint(1, 6)], "never said"]
            expected = self._expected(body)
        timeout_s = rng.choice((0.3, 1.0, 3.0)) if rng.random() < 0.08 else None
        path = "/v1/chat/completions" if chat else "/v1/completions"
        prompt_ids = self._prompt_ids(body)
        return Request(number, at, path, body, self._manners(), timeout_s, expected, prompt_ids, body["max_tokens"])

    def _sampling(self, body: dict[str, Any]) -> None:
        rng = self._rng
        body["temperature"] = 0.0
        if rng.random() < 0.4:
            body["temperature"] = rng.choice((0.5, 1.0))
            if rng.random() < 0.85:
                body["seed"] = rng.getrandbits(31)
        if rng.random() < 0.2:
            body[rng.choice(("presence_penalty", "frequency_penalty"))] = 0.5
        if rng.random() < 0.15:
            body["min_tokens"] = rng.randint(1, body["max_tokens"])
        if rng.random() < 0.1:
            body["ignore_eos"] = True

    def _manners(self) -> Manners:
        rng = self._rng
        manners = Manners()
        kind = rng.random()
        if kind < 0.08:
            manners.leave_after_s = rng.random() * 2
        elif kind < 0.14:
            manners.leave_after_events = rng.randint(1, 20)
        elif kind < 0.24:
            manners.pause_every, manners.pause_s = rng.randint(1, 4), rng.random() * 1.5
        return manners

    # The undisturbed answer.

    def _expected(self, body: dict[str, Any]) -> Expected | None:
        if body["temperature"] > 0 and "seed" not in body:
            return None
        prompt = self._prompt_ids(body)
        sampling = SamplingParams(
            max_tokens=body["max_tokens"],
            min_tokens=body.get("min_tokens", 0),
            temperature=body["temperature"],
            seed=body.get("seed"),
            presence_penalty=body.get("presence_penalty", 0.0),
            frequency_penalty=body.get("frequency_penalty", 0.0),
            ignore_eos=body.get("ignore_eos", False),
        )
        stop_ids = frozenset() if sampling.ignore_eos else tokenizer().eos_ids
        output = OutputText(
            tokenizer().detokenizer(), body.get("stop", ()), min_tokens=sampling.min_tokens, stop_ids=stop_ids
        )
        text = ""
        for token_id, reason in self._generate(prompt, sampling):
            if reason is not None:
                text += output.push_last([token_id], stopped=reason is FinishReason.STOP)
                finish = FinishReason.STOP if output.stopped else reason
                return Expected(text, finish.value, len(prompt), output.num_tokens)
            text += output.push([token_id])
            if output.stopped:
                return Expected(text, FinishReason.STOP.value, len(prompt), output.num_tokens)
        raise AssertionError("an output without an end")

    def _prompt_ids(self, body: dict[str, Any]) -> list[int]:
        if "messages" in body:
            text = _template().render([ChatMessage(**message) for message in body["messages"]])
            return unpack(tokenizer().encode(text, add_special_tokens=False))
        return unpack(tokenizer().encode(body["prompt"], add_special_tokens=True))

    def _generate(self, prompt: list[int], sampling: SamplingParams) -> Any:
        """Token by token, each with the reason that ends the output there or None."""
        runner = self._runner
        table = tuple(range(-(-(len(prompt) + sampling.max_tokens) // runner.block_size)))
        penalized = bool(sampling.presence_penalty or sampling.frequency_penalty)
        output: list[int] = []
        new, start = list(prompt), 0
        while True:
            end = start + len(new)
            histories = (prompt, list(output)) if penalized else (None, None)
            spec = SampleSpec(sampling, sampling.seed or 0, end, len(output), *histories)
            token_id = runner.step([Chunk(table, new, start, spec)])[0]
            assert token_id is not None
            output.append(token_id)
            reason = stop_reason(sampling, output, runner.eos_token_ids)
            yield token_id, reason
            if reason is not None:
                return
            new, start = [token_id], end
