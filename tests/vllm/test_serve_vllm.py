"""`stator serve` with real vLLM in a decode and a prefill worker: the demo's configuration, run by this interpreter."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from e2e.metrics import parse, total
from e2e.processes import Serve, free_port
from e2e.prompts import PROMPTS
from e2e.reference import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

READY_S = 240.0


class Deployment:
    def __init__(self, serve: Serve, port: int) -> None:
        self.serve = serve
        self.port = port

    def curl(self, path: str, *arguments: str) -> str:
        command = ["curl", "-sS", "-N", *arguments, f"http://127.0.0.1:{self.port}{path}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def post(self, path: str, body: dict[str, Any]) -> str:
        return self.curl(path, "-H", "Content-Type: application/json", "-d", json.dumps(body))

    def total(self, name: str, **labels: str) -> float:
        return total(parse(self.curl("/metrics")), name, **labels)

    def ready(self) -> dict[str, int]:
        """Ready workers of the model, by role."""
        models = json.loads(self.curl("/health"))["models"]
        return models.get("tiny-llama", {"decode": 0, "prefill": 0})

    def core(self, service: str) -> psutil.Process:
        """vLLM's engine core below the worker of that service."""
        (worker,) = [p for p in self.serve.tree() if p.name() == f"{service}:1"]
        (core,) = [p for p in worker.children() if p.name().startswith("VLLM::")]
        return core


def until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Asks again and again; a question takes a curl."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {timeout_s:g} s"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    port = free_port()
    interpreters = [f"--{name}.ServiceArgs.python={sys.executable}" for name in ("VllmWorker", "PrefillWorker")]
    arguments = ["serve", "graphs.disagg_router:Frontend", "-f", "configs/tiny-vllm.yaml", *interpreters]
    serve = Serve(
        [*arguments, f"--Frontend.port={port}", "--hub-port", str(free_port())],
        state_dir=tmp_path_factory.mktemp("state"),
        env={"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"},
    )
    try:
        serve.wait_for("ready", READY_S)
        found = Deployment(serve, port)
        until(lambda: found.ready() == {"decode": 1, "prefill": 1}, READY_S)
        yield found
    finally:
        serve.stop(60)


def test_texts_are_the_local_engines_and_long_prompts_are_prefilled_elsewhere(deployment: Deployment) -> None:
    reference = Reference()
    for messages in PROMPTS:
        expected = reference.chat(messages, 40)
        body = {"model": "tiny-llama", "messages": messages, "max_tokens": 40, "temperature": 0}
        answer = json.loads(deployment.post("/v1/chat/completions", body))
        choice = answer["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
        assert answer["usage"]["completion_tokens"] == expected.num_output_tokens
    until(lambda: deployment.total("stator_worker_prompt_tokens_transferred_total", role="decode") > 100)
    assert deployment.total("stator_remote_prefill_total", outcome="fallback") == 0


def test_a_client_that_leaves_frees_its_blocks(deployment: Deployment) -> None:
    body = {"model": "tiny-llama", "messages": PROMPTS[2], "max_tokens": 1000, "stream": True, "ignore_eos": True}
    command = ["curl", "-sS", "-N", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    url = f"http://127.0.0.1:{deployment.port}/v1/chat/completions"
    with subprocess.Popen([*command, url], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline().startswith(b"data: ")
        client.kill()
    gauges = ("stator_worker_running_requests", "stator_worker_kv_blocks_used")
    until(lambda: [deployment.total(name) for name in gauges] == [0, 0])


def test_a_core_that_dies_in_mid_stream_ends_the_request_clearly_and_is_replaced(deployment: Deployment) -> None:
    body = {"model": "tiny-llama", "messages": PROMPTS[0], "max_tokens": 1000, "stream": True, "ignore_eos": True}
    command = ["curl", "-sS", "-N", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    url = f"http://127.0.0.1:{deployment.port}/v1/chat/completions"
    lines_before = len(deployment.serve.lines)
    core = deployment.core("VllmWorker")
    with subprocess.Popen([*command, url], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline().startswith("data: ")
        os.kill(core.pid, signal.SIGKILL)
        rest = client.stdout.read()
        assert client.wait(60) == 0
    # No other decode worker is there to go on with it: one error event, and no claim to be done.
    assert '"error"' in rest and "[DONE]" not in rest
    deployment.serve.wait_for(r"VllmWorker:1.*its core process ended", 30, start=lines_before)
    until(lambda: deployment.ready()["decode"] == 1, READY_S)
    short = {"model": "tiny-llama", "messages": PROMPTS[0], "max_tokens": 5, "temperature": 0}
    assert "choices" in json.loads(deployment.post("/v1/chat/completions", short))
    assert not core.is_running()


def test_ctrl_c_leaves_no_process_of_vllms(tmp_path: Path, deployment: Deployment) -> None:
    """The last test of this file: the deployment is gone after it."""
    tree = deployment.serve.tree()
    assert sum(process.name().startswith("VLLM::") for process in tree) >= 2
    assert deployment.serve.stop(60) == 0
    assert not [process for process in tree if process.is_running()]
