"""What is asked of every client, what a client's program printed, and the answer that it must have been given."""

import base64
import json
import urllib.request
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from e2e.processes import REPOSITORY

HERE = Path(__file__).parent
ENVIRONMENT = REPOSITORY / ".venv-clients"
MODEL = "tiny-llama"
QUESTION = "Tell me a story about a fox."
AND_THEN = "And then?"
PLACES = ("sea", "moon")
TEXTS = ("A fox.", "Où est la lune ?", "The sea is bright and the fox is not. " * 8)
"""What every client embeds."""
TOKENS = ((7, 8, 9), (1000,))
"""Which some embed as well."""
NEAR = 1e-6
"""How far a client's number may be from the one in the body."""

RunClient = Callable[..., str]
"""A command, and more of its environment, to its output: the fixture `run_client`."""


@dataclass(frozen=True)
class Deployment:
    """url: ends in /v1."""

    url: str

    def chat(self, **fields: Any) -> Any:
        """The answer to QUESTION, as JSON and without any client."""
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
        return self._ask("/chat/completions", messages=messages, temperature=0, **fields)

    def embed_tokens(self, given: Sequence[Sequence[int]]) -> list[list[float]]:
        return [each["embedding"] for each in self._ask("/embeddings", input=given)["data"]]

    def _ask(self, path: str, **fields: Any) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps({"model": MODEL, **fields}).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    @cached_property
    def short(self) -> Any:
        """What every client is to get that asks for twelve tokens."""
        return self.chat(max_tokens=12)

    @property
    def text(self) -> str:
        return self.short["choices"][0]["message"]["content"]

    @property
    def num_tokens(self) -> tuple[int, int, int]:
        """Of the prompt, of the answer, of both."""
        usage = self.short["usage"]
        return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]

    def two_turns(self, max_tokens: int = 12) -> list[str]:
        """What is answered to QUESTION, and to AND_THEN after that."""
        asked: list[dict[str, str]] = []
        answers: list[str] = []
        for question in (QUESTION, AND_THEN):
            asked.append({"role": "user", "content": question})
            body = self._ask("/chat/completions", messages=asked, temperature=0, max_tokens=max_tokens)
            answers.append(body["choices"][0]["message"]["content"])
            asked.append({"role": "assistant", "content": answers[-1]})
        return answers

    @cached_property
    def embedded(self) -> Any:
        """What every client is to get that embeds TEXTS."""
        return self._ask("/embeddings", input=TEXTS)

    @property
    def vectors(self) -> list[list[float]]:
        return [each["embedding"] for each in self.embedded["data"]]

    @property
    def num_embedded(self) -> int:
        """Tokens of TEXTS."""
        return self.embedded["usage"]["prompt_tokens"]


@dataclass(frozen=True)
class Result:
    """What a client's program printed, use by use."""

    uses: dict[str, dict[str, Any]]

    def __getitem__(self, use: str) -> Any:
        """What that use was given; fails the test with the use's own traceback if it did not come to an end."""
        found = self.uses[use]
        assert "failed" not in found, found["failed"]
        return found["gave"]


def run_uses(run: RunClient, deployment: Deployment, script: str) -> Result:
    path = HERE / script
    interpreter = ENVIRONMENT / "bin" / ("node" if path.suffix == ".mjs" else "python")
    given = [deployment.url, MODEL, QUESTION, AND_THEN, json.dumps(TEXTS)]
    return Result(json.loads(run([interpreter, path, *given]).splitlines()[-1]))


def assert_is_mood(found: Any) -> None:
    assert found.keys() == {"mood", "age"} and found["mood"] in ("calm", "cross") and 0 <= found["age"] <= 99, found


def read_base64(vector: str) -> list[float]:
    return array("f", base64.b64decode(vector, validate=True)).tolist()


def assert_are_near(found: Any, expected: Sequence[Sequence[float]]) -> None:
    """Vectors that a client gave against those of a body, of which no two are alike, in the same order."""
    assert len(found) == len(expected) > 1
    assert min(_distance(one, other) for one, other in combinations(expected, 2)) > 1000 * NEAR
    assert max(_distance(one, other) for one, other in zip(found, expected, strict=True)) <= NEAR


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
