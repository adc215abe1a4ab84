"""`stator config`, `stator status` and `stator drain` on a running deployment, with a hub and with etcd and NATS."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from metrics import Sample, eventually, parse, total
from processes import EXAMPLES, Serve, free_port
from services import services

pytestmark = pytest.mark.timeout(240)

NAMESPACE = "tuned"
LENGTH = "max-local-prefill-length"


class Deployed:
    """The demo graph, a node with a prefill worker, and the commands that operate it. hub: its port, or None."""

    def __init__(self, directory: Path, hub: int | None, environment: dict[str, str]) -> None:
        self._directory = directory
        self._hub = hub
        # Both ways to a control plane are chosen here, whatever the machine's own environment says.
        self._environment = {"STATOR_TOKEN": "", "NATS_SERVER": "", "ETCD_ENDPOINTS": "", **environment}
        self.port = free_port()
        self.nodes: list[Serve] = []

    def serve(self, target: str, *flags: str) -> Serve:
        common = ["-f", "configs/tiny.yaml", "--host", "127.0.0.1", "--namespace", NAMESPACE]
        node = Serve(["serve", target, *common, *flags], state_dir=self._directory, env=self._environment)
        self.nodes.append(node)
        return node

    def start(self) -> None:
        hub = [] if self._hub is None else ["--hub-port", str(self._hub)]
        head = self.serve("graphs.disagg_router:Frontend", f"--Frontend.port={self.port}", *hub)
        head.wait_for("Stator is ready", 120)
        prefill = self.serve("components.prefill_worker:PrefillWorker", *self._join)
        prefill.wait_for("joined ", 120)

    @property
    def _join(self) -> list[str]:
        return [] if self._hub is None else ["--join", f"127.0.0.1:{self._hub}"]

    def command(self, *arguments: str, exit_code: int = 0) -> str:
        told = Serve(
            [*arguments, "--namespace", NAMESPACE, *self._join],
            state_dir=self._directory,
            cwd=EXAMPLES,
            env=self._environment,
        )
        code = told.process.wait(60)
        told.stop()
        assert code == exit_code, told.output
        return told.output

    def settings(self) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in json.loads(self.command("config", "list", "--json"))["settings"]}

    def chat(self, text: str) -> None:
        body = {"model": "tiny-llama", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.loads(response.read())["choices"]

    def scrape(self) -> list[Sample]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            return parse(response.read().decode())

    def prefills(self, outcome: str, samples: list[Sample] | None = None) -> float:
        samples = self.scrape() if samples is None else samples
        return total(samples, "stator_remote_prefill_total", role="decode", outcome=outcome)

    def decisions(self, mode: str, samples: list[Sample]) -> float:
        found = [s.value for s in samples if s.name == "stator_route_decisions_total" and s.labels["mode"] == mode]
        return sum(found)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            assert node.stop() == 0, node.output


@pytest.fixture(params=["hub", pytest.param("etcd and NATS", marks=pytest.mark.servers)])
def deployed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployed]:
    with asyncio.Runner() as runner:
        external = services(tmp_path)
        environment = runner.run(external.__aenter__()) if request.param != "hub" else {}
        made = Deployed(tmp_path / "state", free_port() if request.param == "hub" else None, environment)
        try:
            made.start()
            yield made
        finally:
            for node in made.nodes:
                if node.process.poll() is None:
                    node.kill_tree()
            if environment:
                runner.run(external.__aexit__(None, None, None))


def long_prompt(number: int) -> str:
    """Over 64 tokens, with nothing that a cache has."""
    return f"{number} times " + "And God saw the light, that it was good. " * 8


def test_settings_apply_without_a_restart(deployed: Deployed) -> None:
    assert deployed.settings()[LENGTH]["configured"][0]["value"] == 64
    assert "configs/tiny.yaml:" in deployed.settings()[LENGTH]["configured"][0]["origin"]

    remote = deployed.prefills("remote")
    deployed.chat(long_prompt(1))
    eventually(deployed.scrape, lambda now: deployed.prefills("remote", now) == remote + 1)

    assert f"{LENGTH} is 2000; applied by 1 of 1 processes" in deployed.command("config", "set", LENGTH, "2000")
    local = deployed.prefills("local")
    deployed.chat(long_prompt(2))
    now = eventually(deployed.scrape, lambda now: deployed.prefills("local", now) == local + 1)
    assert deployed.prefills("remote", now) == remote + 1

    # Routing, in the process of the head.
    assert "router-mode is round-robin; applied by 1 of 1" in deployed.command(
        "config", "set", "router-mode", "round-robin"
    )
    deployed.chat(long_prompt(3))
    eventually(deployed.scrape, lambda now: deployed.decisions("round-robin", now) == 1)

    # One that joins later has it from its first request on.
    late = deployed.serve("components.worker:VllmWorker", *deployed._join)
    late.wait_for("joined ", 120)
    late.wait_for(f"{LENGTH} is 2000 now; it was 64")
    view = deployed.settings()[LENGTH]
    assert (view["value"], view["source"], view["num_processes"], view["num_applied"]) == (2000, "set", 2, 2)

    assert "applied by 2 of 2" in deployed.command("config", "unset", LENGTH)
    assert deployed.settings()[LENGTH]["value"] == 64
    refused = deployed.command("config", "set", LENGTH, "long", exit_code=2)
    assert f"stator: {LENGTH}: found long, expected a number" in refused

    # The other commands, by the same way.
    status = json.loads(deployed.command("status", "--json"))
    workers = [one for one in status["instances"] if one["service"] == "VllmWorker"]
    assert len(workers) == 2 and all(one["answers"] and one["lease"]["left_s"] > 0 for one in workers)
    assert [queue["waiting"] for queue in status["queues"]] == [0]
    own = [one for one in workers if one["pid"] in {process.pid for process in late.tree()}]
    assert f"{own[0]['id']}: drained" in deployed.command("drain", own[0]["id"])
    assert late.process.wait(60) == 0, "a node that has nothing left to run stops"
    remote = deployed.prefills("remote")
    deployed.chat(long_prompt(4))
    eventually(deployed.scrape, lambda now: deployed.prefills("remote", now) == remote + 1)
    deployed.stop()
