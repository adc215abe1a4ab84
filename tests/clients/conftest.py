"""Clients of other makers against one deployment.

Each client lives in an environment of its own (`make install-clients`) and runs as a program that prints what it was
given; nothing of it is imported here.
"""

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from e2e.processes import REPOSITORY, Serve, free_port
from stator.config.models import resolve_model

HERE = Path(__file__).parent
ENVIRONMENT = REPOSITORY / ".venv-clients"
MODEL = "tiny-llama"
QUESTION = "Tell me a story about a fox."
RUN_S = 150.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (ENVIRONMENT / ".installed").exists() and not os.environ.get("STATOR_REQUIRE_CLIENTS"):
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason="the clients are not installed: make test-clients"))


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


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    model = tmp_path_factory.mktemp("model")
    for file in resolve_model(f"stator:{MODEL}").iterdir():
        shutil.copy(file, model)
    # The bundled template has no words for tools, which a loop of calls and results needs.
    shutil.copy(HERE / "tools.jinja", model / "chat_template.jinja")
    port, hub_port = free_port(), free_port()
    own = [f"--Common.model={model}", f"--Frontend.port={port}", "--hub-port", str(hub_port)]
    graph = ["serve", "graphs.agg_router:Frontend", "-f", "configs/tiny.yaml"]
    serve = Serve([*graph, *own, "--advertise", "127.0.0.1"], state_dir=tmp_path_factory.mktemp("state"))
    try:
        serve.wait_for("ready", 90)
        yield Deployment(f"http://127.0.0.1:{port}/v1")
    finally:
        serve.stop()


@dataclass(frozen=True)
class Result:
    """What a client's program printed, use by use."""

    uses: dict[str, dict[str, Any]]

    def __getitem__(self, use: str) -> Any:
        """What that use was given; fails the test with the use's own traceback if it did not come to an end."""
        found = self.uses[use]
        assert "failed" not in found, found["failed"]
        return found["gave"]


RunClient = Callable[..., str]


@pytest.fixture(scope="session")
def run_client(tmp_path_factory: pytest.TempPathFactory) -> RunClient:
    """Runs a command in the clients' environment, with nothing of this user's settings, and returns its output."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.defpath}",
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        # Its table of prices is otherwise fetched at each start.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
    }

    def run(command: Sequence[str | Path], **more: str) -> str:
        """more: of the environment."""
        done = subprocess.run(
            command, cwd=home, env={**environment, **more}, capture_output=True, text=True, timeout=RUN_S
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def run_uses(run: RunClient, deployment: Deployment, script: str) -> Result:
    path = HERE / script
    interpreter = ENVIRONMENT / "bin" / ("node" if path.suffix == ".mjs" else "python")
    return Result(json.loads(run([interpreter, path, deployment.url, MODEL, QUESTION]).splitlines()[-1]))


@pytest.fixture(scope="session")
def langchain(run_client: RunClient, deployment: Deployment) -> Result:
    return run_uses(run_client, deployment, "python/langchain_uses.py")


@pytest.fixture(scope="session")
def litellm(run_client: RunClient, deployment: Deployment) -> Result:
    return run_uses(run_client, deployment, "python/litellm_uses.py")


@pytest.fixture(scope="session")
def openai_node(run_client: RunClient, deployment: Deployment) -> Result:
    return run_uses(run_client, deployment, "node/openai_uses.mjs")


@pytest.fixture(scope="session")
def ai_sdk(run_client: RunClient, deployment: Deployment) -> Result:
    return run_uses(run_client, deployment, "node/ai_sdk_uses.mjs")
