"""Every example graph serves, and decode workers come and go."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from metrics import parse, total
from processes import EXAMPLES, Serve, free_port
from prompts import PROMPTS
from reference import Reference

pytestmark = pytest.mark.timeout(240)

CLIENT = Path(__file__).with_name("load_client.py")
LONG_STORY = [{"role": "user", "content": "Tell me a long story about a fox."}]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


class Head:
    """A graph on free ports of this machine."""

    def __init__(self, graph: str, state: Path, *overrides: str, cwd: Path = EXAMPLES) -> None:
        self.port, self.hub_port, self.state = free_port(), free_port(), state
        own = [f"--Frontend.port={self.port}", "--hub-port", str(self.hub_port), "--advertise", "127.0.0.1"]
        command = ["serve", f"{graph}:Frontend", "-f", "configs/tiny.yaml", *own, *overrides]
        self.serve = Serve(command, state_dir=state, cwd=cwd)
        self.serve.wait_for("ready", 90)

    @property
    def environment(self) -> dict[str, str]:
        """Of a command that is to find the token."""
        return {**os.environ, "XDG_STATE_HOME": str(self.state)}

    def join(self, target: str, *overrides: str) -> Serve:
        arguments = ["serve", target, "-f", "configs/tiny.yaml", "--join", f"127.0.0.1:{self.hub_port}", *overrides]
        joined = Serve(arguments, state_dir=self.state)
        joined.wait_for("joined", 60)
        return joined

    def send(
        self, bodies: list[dict[str, Any]], when_streaming: Callable[[], object] = lambda: None
    ) -> list[dict[str, Any]]:
        """when_streaming: called once every stream has its first text."""
        plan = {
            "url": f"http://127.0.0.1:{self.port}/v1/chat/completions",
            "requests": [{"body": {"model": "tiny-llama", "temperature": 0, **body}} for body in bodies],
        }
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, str(CLIENT)], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as client:
            assert client.stdin is not None and client.stderr is not None
            client.stdin.write(json.dumps(plan))
            client.stdin.close()
            client.stdin = None
            if any(body.get("stream") for body in bodies) and client.stderr.readline() == "streaming\n":
                when_streaming()
            out, errors = client.communicate(timeout=120)
        assert client.returncode == 0, errors
        return json.loads(out)

    def curl(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.port}{path}"
        return subprocess.run(["curl", "-sS", url], capture_output=True, text=True, timeout=20, check=True).stdout


@pytest.mark.parametrize("graph", ["graphs.agg", "graphs.agg_router", "graphs.disagg", "graphs.disagg_router"])
def test_an_example_graph_serves_the_reference_text(graph: str, tmp_path: Path, reference: Reference) -> None:
    head = Head(graph, tmp_path)
    try:
        results = head.send([{"messages": m, "max_tokens": 24, "stream": True} for m in PROMPTS])
        for result, messages in zip(results, PROMPTS, strict=True):
            expected = reference.chat(messages, 24)
            assert result["error"] is None
            assert (result["text"], result["finish_reason"]) == (expected.text, expected.finish_reason)
        prefill = json.loads(head.curl("/health"))["models"]["tiny-llama"]["prefill"]
        assert prefill == ("disagg" in graph)
    finally:
        head.serve.stop()


def test_a_joined_decode_worker_shares_the_load_and_its_death_costs_no_token(
    tmp_path: Path, reference: Reference
) -> None:
    head = Head("graphs.agg_router", tmp_path)
    joined = head.join("components.worker:VllmWorker")
    try:
        bodies = [{"messages": LONG_STORY, "max_tokens": 500, "stream": True, "ignore_eos": True}] * 4
        results = head.send(bodies, when_streaming=joined.kill_tree)
        head.serve.wait_for(r"goes on elsewhere after [1-9]\d* tokens", 5)
        alone = head.send(bodies[:1])[0]
        assert [r["error"] for r in results] == [None] * 4
        assert {r["text"] for r in results} == {alone["text"]}
        assert all(r["done"] and r["finish_reason"] == "length" for r in results)
    finally:
        joined.kill_tree()
        head.serve.stop()


def test_workers_of_one_service_run_as_several_processes(tmp_path: Path, reference: Reference) -> None:
    head = Head("graphs.agg_router", tmp_path, "--VllmWorker.ServiceArgs.workers=2")
    try:
        results = head.send([{"messages": PROMPTS[1], "max_tokens": 16}] * 6)
        assert {r["text"] for r in results} == {reference.chat(PROMPTS[1], 16).text}
        samples = parse(head.curl("/metrics"))
        assert len([s for s in samples if s.name == "stator_worker_kv_blocks"]) == 2
        assert total(samples, "stator_worker_kv_blocks", role="decode") == 2 * 1024
    finally:
        head.serve.stop()
