"""What is asked of every client, what a client's program printed, and the answer that it must have been given."""

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from e2e.processes import REPOSITORY

HERE = Path(__file__).parent
ENVIRONMENT = REPOSITORY / ".venv-clients"
MODEL = "tiny-llama"
QUESTION = "Tell me a story about a fox."
PLACES = ("sea", "moon")

RunClient = Callable[..., str]
"""A command, and more of its environment, to its output: the fixture `run_client`."""


@dataclass(frozen=True)
class Deployment:
    """url: ends in /v1."""

    url: str

    def chat(self, **fields: Any) -> Any:
        """The answer to QUESTION, as JSON and without any client."""
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
        body = {"model": MODEL, "messages": messages, "temperature": 0, **fields}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode())
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
    return Result(json.loads(run([interpreter, path, deployment.url, MODEL, QUESTION]).splitlines()[-1]))


def assert_is_mood(found: Any) -> None:
    assert found.keys() == {"mood", "age"} and found["mood"] in ("calm", "cross") and 0 <= found["age"] <= 99, found
