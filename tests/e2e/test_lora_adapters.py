"""A LoRA adapter on one of two decode workers of a whole deployment: loaded, listed, routed there, unloaded."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from metrics import eventually
from processes import EXAMPLES, Serve, free_port
from services import services
from test_several_models import answered

pytestmark = pytest.mark.timeout(120)

PROMPT = "one two three four five six seven eight nine ten " * 8


class Deployment:
    """`stator serve` with two decode workers on the sim engine, and `stator lora` on it. env: of both."""

    def __init__(self, directory: Path, env: dict[str, str] | None = None) -> None:
        self.port, hub_port = free_port(), free_port()
        self.env = {"XDG_STATE_HOME": str(directory), **(env or {})}
        self.join = [] if env else ["--join", f"127.0.0.1:{hub_port}"]
        command = [
            "serve", "graphs.agg_router:Frontend", "-f", "configs/tiny-sim.yaml", "--host", "127.0.0.1",
            f"--Frontend.port={self.port}", "--VllmWorker.ServiceArgs.workers=2", "--Router.min-workers=2",
            "--VllmWorker.sim-speed=50", "--VllmWorker.remote-prefill=false", "--VllmWorker.enable-lora=true",
            "--Common.block-size=16", *([] if env else ["--hub-port", str(hub_port)]),
        ]  # fmt: skip
        self.serve = Serve(command, state_dir=directory, env=env)
        self.serve.wait_for("Stator is ready", 60)
        eventually(self.ready_workers, lambda number: number == 2)

    def lora(self, *arguments: str) -> tuple[int, dict[str, Any], str]:
        command = [sys.executable, "-m", "stator.cli.main", "lora", *arguments, *self.join, "--json"]
        environment = {"PATH": "/usr/bin:/bin", **self.env}
        done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    def get(self, path: str) -> dict[str, Any]:
        return json.loads(answered(f"http://127.0.0.1:{self.port}{path}")[1])

    def ready_workers(self) -> int:
        return self.get("/health")["models"].get("tiny-llama", {}).get("decode", 0)

    def cards(self) -> dict[str, str | None]:
        """Of each model that is listed, its parent."""
        return {card["id"]: card["parent"] for card in self.get("/v1/models")["data"]}

    def ask(self, model: str) -> tuple[int, dict[str, Any]]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        status, answer = answered(f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode())
        return status, json.loads(answer)


def check_an_adapter_comes_and_goes(deployment: Deployment, directory: Path) -> None:
    path = directory / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"r": 8}))
    assert deployment.cards() == {"tiny-llama": None}
    status, plain = deployment.ask("tiny-llama")
    assert status == 200
    status, refused = deployment.ask("odd")
    assert (status, refused["error"]["code"]) == (404, "model_not_found")

    code, told, said = deployment.lora("load", "odd", "/nowhere/at/all")
    assert code == 1 and [change["outcome"] for change in told["changes"]] == ["failed"] * 2
    assert "there is no directory /nowhere/at/all on this node" in said
    code, told, said = deployment.lora("load", "odd", str(path), "--instance", "VllmWorker")
    assert code == 2 and "VllmWorker means 2 workers" in said
    one = said.split("\n")[1].split()[0]
    code, told, _ = deployment.lora("load", "odd", str(path), "--instance", one)
    assert code == 0 and [(c["instance"], c["outcome"]) for c in told["changes"]] == [(one, "loaded")]
    _, told, _ = deployment.lora("list")
    assert [(a["name"], a["model"], a["instance"]) for a in told["adapters"]] == [("odd", "tiny-llama", one)]
    eventually(deployment.cards, lambda cards: cards == {"odd": "tiny-llama", "tiny-llama": None})

    answers = [deployment.ask("odd") for _ in range(6)]
    assert [status for status, _ in answers] == [200] * 6
    texts = {answer["choices"][0]["text"] for _, answer in answers}
    assert len(texts) == 1 and plain["choices"][0]["text"] not in texts
    assert {answer["model"] for _, answer in answers} == {"odd"}
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for _, answer in answers]
    assert cached[0] == 0 and min(cached[1:]) > 32, "all but the first find their prompt where the first was"

    code, told, _ = deployment.lora("load", "odd", str(path))
    assert sorted(change["outcome"] for change in told["changes"]) == ["already_loaded", "loaded"]
    code, told, _ = deployment.lora("unload", "odd", "--timeout", "5")
    assert code == 0 and [change["outcome"] for change in told["changes"]] == ["unloaded"] * 2
    eventually(deployment.cards, lambda cards: cards == {"tiny-llama": None})
    assert deployment.ask("odd")[0] == 404
    code, _, said = deployment.lora("unload", "odd")
    assert code == 2 and "no worker has the adapter 'odd'" in said
    assert deployment.ask("tiny-llama")[1]["choices"] == plain["choices"]
    assert deployment.serve.stop() == 0


def test_an_adapter_comes_and_goes(tmp_path: Path) -> None:
    check_an_adapter_comes_and_goes(Deployment(tmp_path), tmp_path)


@pytest.mark.servers
def test_on_etcd_and_nats(tmp_path: Path) -> None:
    with asyncio.Runner() as runner:
        external = services(tmp_path)
        env = {"STATOR_TOKEN": "", **runner.run(external.__aenter__())}
        try:
            check_an_adapter_comes_and_goes(Deployment(tmp_path, env), tmp_path)
        finally:
            runner.run(external.__aexit__(None, None, None))
