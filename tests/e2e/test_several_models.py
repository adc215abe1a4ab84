"""One frontend, and a second graph in a namespace of its own whose model it serves as well."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from metrics import eventually, parse, total
from processes import Serve, free_port
from services import services

pytestmark = pytest.mark.timeout(180)

SIM = ["--VllmWorker.sim-speed=50", "--VllmWorker.remote-prefill=false"]
OTHER = "bert"
GRAPH = "graphs.agg_router:Processor"


class Front:
    """A frontend in the namespace `stator` that serves the namespace OTHER as well."""

    def __init__(self, directory: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.directory = directory
        self.env = env
        own = [f"--Frontend.port={self.port}", "--Frontend.served_model_name=ours", f"--Frontend.namespaces=[{OTHER}]"]
        self.started: list[Serve] = []
        self.serve = self.start("graphs.agg_router:Frontend", *own, *flags)

    def start(self, target: str, *flags: str, state: str = "state") -> Serve:
        command = ["serve", target, "-f", "configs/tiny-sim.yaml", "--host", "127.0.0.1", *SIM, *flags]
        self.started.append(serve := Serve(command, state_dir=self.directory / state, env=self.env))
        return serve

    def start_other(self, target: str, *flags: str, state: str = "state") -> Serve:
        own = ["--Frontend.served_model_name=theirs", "--namespace", OTHER]
        return self.start(target, *own, *flags, state=state)

    def get(self, path: str) -> tuple[int, bytes]:
        return answered(f"http://127.0.0.1:{self.port}{path}")

    def models(self) -> list[str]:
        return [card["id"] for card in json.loads(self.get("/v1/models")[1])["data"]]

    def health(self) -> dict[str, Any]:
        return json.loads(self.get("/health")[1])

    def ask(self, model: str) -> tuple[int, dict[str, Any]]:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
        status, answer = answered(f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode())
        return status, json.loads(answer)

    def listed(self, *models: str) -> None:
        """Returns when just these models are listed."""
        eventually(self.models, lambda now: now == list(models))

    def kill(self) -> None:
        for serve in self.started:
            if serve.process.poll() is None:
                serve.kill_tree()


def answered(url: str, body: bytes | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def fronts() -> Iterator[list[Front]]:
    started: list[Front] = []
    yield started
    for front in started:
        front.kill()


def check_second_graph_comes_and_goes(front: Front, joining: list[str], state: str) -> None:
    assert front.models() == ["ours"]
    assert front.health()["namespaces"][OTHER] == {"ready": False, "models": {}}
    status, refused = front.ask("theirs")
    assert status == 404 and "Models served here: ours." in refused["error"]["message"]

    other = front.start_other(GRAPH, *joining, "--VllmWorker.ServiceArgs.workers=0", state=state)
    eventually(front.health, lambda now: now["reasons"] == [f"namespace {OTHER}: no worker is ready"])
    assert front.models() == ["ours"]
    status, refused = front.ask("theirs")
    assert (status, refused["error"]["code"]) == (503, "no_instance")
    worker = front.start_other("components.worker:VllmWorker", *joining, state=state)
    front.listed("ours", "theirs")
    for model in ("ours", "theirs"):
        status, answer = front.ask(model)
        assert status == 200, answer
        assert answer["model"] == model and answer["usage"]["completion_tokens"] == 4
    health = front.health()
    assert health["models"] == {model: {"decode": 1, "prefill": 0} for model in ("ours", "theirs")}
    assert health["namespaces"][OTHER]["ready"]
    assert health["reasons"] == []
    samples = parse(front.get("/metrics")[1].decode())
    assert [total(samples, "stator_requests_total", model=model, code="200") for model in ("ours", "theirs")] == [1, 1]
    status, refused = front.ask("nobodys")
    assert status == 404 and "Models served here: ours, theirs." in refused["error"]["message"]

    assert worker.stop() == 0
    front.listed("ours")
    assert other.stop() == 0
    eventually(front.health, lambda now: len(now["reasons"]) == 2)
    status, refused = front.ask("theirs")
    assert (status, refused["error"]["code"]) == (404, "model_not_found")
    assert front.ask("ours")[0] == 200


def test_a_second_graph_joins_the_hub_and_leaves(tmp_path: Path, fronts: list[Front]) -> None:
    hub_port = free_port()
    fronts.append(front := Front(tmp_path, "--hub-port", str(hub_port), "--advertise", "127.0.0.1"))
    front.serve.wait_for("Stator is ready", 60)
    token = tmp_path / "state" / "stator" / "stator.token"
    check_second_graph_comes_and_goes(
        front, ["--join", f"127.0.0.1:{hub_port}", "--token-file", str(token)], state="state"
    )
    stranger = front.start_other(
        GRAPH, "--namespace", "nobodys", "--join", f"127.0.0.1:{hub_port}", "--token-file", str(token)
    )
    stranger.wait_for("list 'nobodys' in Frontend.namespaces", 30)
    assert front.serve.stop() == 0


@pytest.mark.servers
def test_a_second_graph_on_etcd_and_nats_has_a_token_of_its_own(tmp_path: Path, fronts: list[Front]) -> None:
    with asyncio.Runner() as runner:
        external = services(tmp_path)
        env = {"STATOR_TOKEN": "", **runner.run(external.__aenter__())}
        try:
            fronts.append(front := Front(tmp_path, env=env))
            front.serve.wait_for("Stator is ready", 60)
            check_second_graph_comes_and_goes(front, [], state="elsewhere")
            assert front.serve.stop() == 0
        finally:
            for front in fronts:
                front.kill()
            runner.run(external.__aexit__(None, None, None))
