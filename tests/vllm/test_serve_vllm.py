"""`stator serve` with real vLLM in a decode and a prefill worker: the demo's configuration, run by this interpreter."""

import json
import logging
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
NUM_DECODE = 2
FREE_S = 1.0
REPORT_S = 1.0

logger = logging.getLogger(__name__)


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

    def cores(self) -> list[psutil.Process]:
        """vLLM's engine cores below the decode workers."""
        workers = [p for p in self.serve.tree() if p.name().startswith("VllmWorker:")]
        return [p for worker in workers for p in worker.children() if p.name().startswith("VLLM::")]


class Stream:
    """A streaming request, read line by line; `rest` to its end."""

    def __init__(self, deployment: Deployment, **body: Any) -> None:
        cores = deployment.cores()
        assert len(cores) == NUM_DECODE
        before = {core: cpu_s(core) for core in cores}
        filled = {"model": "tiny-llama", "max_tokens": 1000, "stream": True, "ignore_eos": True, **body}
        command = ["curl", "-sS", "-N", "-H", "Content-Type: application/json", "-d", json.dumps(filled)]
        url = f"http://127.0.0.1:{deployment.port}/v1/chat/completions"
        self._client = subprocess.Popen([*command, url], stdout=subprocess.PIPE, text=True)
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.longest_gap_s = 0.0
        while len(self.events) < 30:
            if not self._next():
                self.close()
                raise AssertionError(f"the stream ended before anything could happen to it: {self.events}")
        self.core = max(cores, key=lambda core: cpu_s(core) - before[core])
        """Of the engine that computes it: nothing else runs here."""

    def _next(self) -> bool:
        assert self._client.stdout is not None
        while (line := self._client.stdout.readline()) and not line.startswith("data: "):
            assert not line.strip(), line
        if line.strip() == "data: [DONE]":
            self.done = True
        elif line:
            self.events.append(json.loads(line.removeprefix("data: ")))
        return bool(line)

    def rest(self) -> None:
        last = time.monotonic()
        while self._next():
            now = time.monotonic()
            self.longest_gap_s, last = max(self.longest_gap_s, now - last), now
        self.close()

    def close(self) -> None:
        """The client leaves, if it is still there."""
        self._client.kill()
        assert self._client.stdout is not None
        self._client.stdout.close()
        self._client.wait(10)

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [event["error"] for event in self.events if "error" in event]

    @property
    def text(self) -> str:
        deltas = [choice["delta"] for event in self.events for choice in event.get("choices", ())]
        return "".join(delta.get("content") or "" for delta in deltas)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Asks again and again; a question takes a curl."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {timeout_s:g} s"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    port = free_port()
    interpreters = [f"--{name}.ServiceArgs.python={sys.executable}" for name in ("VllmWorker", "PrefillWorker")]
    flags = [f"--VllmWorker.ServiceArgs.workers={NUM_DECODE}", "--VllmWorker.progress-timeout=3"]
    arguments = ["serve", "graphs.disagg_router:Frontend", "-f", "configs/tiny-vllm.yaml", *interpreters, *flags]
    serve = Serve(
        [*arguments, f"--Frontend.port={port}", "--hub-port", str(free_port())],
        state_dir=tmp_path_factory.mktemp("state"),
        env={"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"},
    )
    try:
        serve.wait_for("ready", READY_S)
        found = Deployment(serve, port)
        until(lambda: found.ready() == {"decode": NUM_DECODE, "prefill": 1}, READY_S)
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
    stream = Stream(deployment, messages=PROMPTS[2])
    left = time.monotonic()
    stream.close()
    gauges = ("stator_worker_running_requests", "stator_worker_kv_blocks_used")
    until(lambda: [deployment.total(name) for name in gauges] == [0, 0])
    took = time.monotonic() - left
    logger.info("nothing of it is left %.2f s after the client left, as workers say once a second", took)
    assert took < FREE_S + REPORT_S


def test_a_core_that_dies_in_mid_stream_costs_no_token_and_is_replaced(deployment: Deployment) -> None:
    undisturbed = Stream(deployment, messages=PROMPTS[0], temperature=0)
    undisturbed.rest()
    lines_before = len(deployment.serve.lines)
    stream = Stream(deployment, messages=PROMPTS[0], temperature=0)
    os.kill(stream.core.pid, signal.SIGKILL)
    stream.rest()
    deployment.serve.wait_for(r"goes on elsewhere after [1-9]\d* tokens", 5, start=lines_before)
    logger.info("longest gap %.3f s; undisturbed %.3f s", stream.longest_gap_s, undisturbed.longest_gap_s)
    assert (stream.errors, stream.done, stream.text) == ([], True, undisturbed.text)
    deployment.serve.wait_for(r"VllmWorker:\d.*its core process ended", 30, start=lines_before)
    until(lambda: deployment.ready()["decode"] == NUM_DECODE, READY_S)
    assert not stream.core.is_running()


def test_what_vllm_cannot_resume_ends_clearly_when_its_core_hangs(deployment: Deployment) -> None:
    lines_before = len(deployment.serve.lines)
    stream = Stream(deployment, messages=PROMPTS[0], temperature=1.0, seed=7)
    hung = time.monotonic()
    os.kill(stream.core.pid, signal.SIGSTOP)
    stream.rest()
    logger.info("the stream ended %.1f s after its core hung", time.monotonic() - hung)
    (error,) = stream.errors
    assert (error["code"], error["param"]) == ("not_resumable", "seed"), error
    assert not stream.done
    # The other one serves on; the process of the hung one ends, and its core with it.
    short = {"model": "tiny-llama", "messages": PROMPTS[0], "max_tokens": 5, "temperature": 0}
    assert "choices" in json.loads(deployment.post("/v1/chat/completions", short))
    deployment.serve.wait_for(
        r"VllmWorker:\d hung: .*made no step for [\d.]+ s with 1 requests", 30, start=lines_before
    )
    until(lambda: not stream.core.is_running())


def test_ctrl_c_leaves_no_process_of_vllms(tmp_path: Path, deployment: Deployment) -> None:
    """The last test of this file: the deployment is gone after it."""
    tree = deployment.serve.tree()  # with a worker that is just starting again
    assert sum(process.name().startswith("VLLM::") for process in tree) >= 2
    assert deployment.serve.stop(60) == 0
    assert not [process for process in tree if process.is_running()]
