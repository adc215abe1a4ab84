"""Clients of other makers against one deployment.

Each client lives in an environment of its own (`make install-clients`) and runs as a program that prints what it was
given; nothing of it is imported here.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from clients.programs import ENVIRONMENT, HERE, MODEL, Deployment, RunClient
from e2e.processes import Serve, free_port
from stator.config.models import resolve_model

RUN_S = 150.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (ENVIRONMENT / ".installed").exists() and not os.environ.get("STATOR_REQUIRE_CLIENTS"):
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason="the clients are not installed: make test-clients"))


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
