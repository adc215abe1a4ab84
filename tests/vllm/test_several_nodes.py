"""One engine over two nodes, as a user starts it: `stator serve` twice, on loopback, each with one of two ranks.

The text is that of one rank (tests/golden). When a node is killed, the other says so and starts again.
"""

import json
import os
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from e2e.processes import EXAMPLES, REPOSITORY, Serve, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

GOLDEN = REPOSITORY / "tests" / "golden"
UP_S = 240
SHORT = 64
CONFIG = """\
Common:
  model: stator:tiny-llama
  block-size: 32
  max-model-len: 1024

Frontend:
  served_model_name: tiny-llama
  host: 127.0.0.1
  port: {port}

Processor:
  common-configs: [model, block-size, max-model-len]

VllmWorker:
  engine: vllm
  nnodes: 2
  tensor-parallel-size: 2
  dtype: float32
  enforce-eager: true
  kv-cache-memory-bytes: 16777216
  max-num-seqs: 8
  max-num-batched-tokens: 512
  common-configs: [model, block-size, max-model-len]
  ServiceArgs:
    envs:
      PYTHONPATH: "{python_path}"
      VLLM_CPU_OMP_THREADS_BIND: nobind
      OMP_NUM_THREADS: "1"
      GLOO_SOCKET_IFNAME: lo
      VLLM_LOGGING_LEVEL: WARNING
      VLLM_NO_USAGE_STATS: "1"
      HF_HUB_OFFLINE: "1"
"""


FORK = """\
import multiprocessing

get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
"""
"""Read by Python when it starts. vLLM's processes are then forked: each of two would import for some ten seconds, three
times. Nothing of what is tested changes by it."""


class Pair:
    """The head, with one rank, and a node with the other, which was started by the line that the head prints."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        config = directory / "nodes.yaml"
        (directory / "start").mkdir()
        (directory / "start" / "sitecustomize.py").write_text(FORK)
        python_path = os.pathsep.join([str(directory / "start"), os.environ.get("PYTHONPATH", "")])
        config.write_text(CONFIG.format(port=self.port, python_path=python_path))
        flags = ["-f", str(config), "--host", "127.0.0.1"]
        hub_port = str(free_port())
        graph = ["serve", "graphs.agg:Frontend", *flags, "--hub-port", hub_port]
        self.head = Serve(graph, state_dir=directory, cwd=EXAMPLES)
        self.node: Serve | None = None
        self.head.wait_for(r"node 0 of 2; waiting for 1 more node: start there")
        line = self.head.wait_for(r"stator (serve components\.worker:VllmWorker .*)").group(1)
        assert line == f"serve components.worker:VllmWorker -f {config} --join 127.0.0.1:{hub_port}"
        self.command = [*shlex.split(line), "--host", "127.0.0.1"]
        self.directory = directory

    def start_node(self, *flags: str) -> Serve:
        self.node = Serve([*self.command, *flags], state_dir=self.directory, cwd=EXAMPLES)
        return self.node

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        body = {"model": "tiny-llama", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def stop(self) -> None:
        for command in (self.node, self.head):
            if command is not None and command.process.poll() is None:
                command.kill_tree()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def golden_conversations() -> list[tuple[list[dict[str, str]], dict[str, Any]]]:
    """(messages, the golden answer): the short ones of those that have no near tie, which TP could decide otherwise."""
    by_text = {c["text"]: c["messages"] for c in json.loads((GOLDEN / "text.json").read_text())["conversations"]}
    answers = json.loads((GOLDEN / "tiny-llama.json").read_text())["greedy"]
    short = [a for a in answers if a["prompt"] in by_text and not a["near_ties"] and len(a["output_ids"]) <= SHORT]
    return [(by_text[a["prompt"]], a) for a in short]


def worker_process(command: Serve) -> psutil.Process:
    """The process of the node's worker: what its supervisor started."""
    (child,) = (p for p in psutil.Process(command.process.pid).children() if "stator.graph.child" in p.cmdline())
    return child


def test_two_nodes_say_what_one_says_and_end_together(pair: Pair) -> None:
    refused = pair.start_node("--VllmWorker.block-size=64")
    refused.wait_for(r"configured differently: block-size is 64 here and 32 there")
    assert refused.process.wait(30) == 2
    node = pair.start_node()
    node.wait_for(r"this is node 1 of an engine over 2 \(0: 127\.0\.0\.1\)")
    pair.head.wait_for(r"^Stator is ready", UP_S)
    node.wait_for(r"^stator: joined", 30)
    cases = golden_conversations()
    assert len(cases) >= 5
    for messages, golden in cases:
        (choice,) = pair.chat(messages, golden["max_tokens"])["choices"]
        assert choice["message"]["content"] == golden["text"]
        assert choice["finish_reason"] == golden["finish_reason"]

    # The node is gone at once, with everything it could have said: only its lease tells.
    worker_process(node).kill()
    pair.head.wait_for(
        r"the engine runs on 2 nodes, and node 1 of them, 127\.0\.0\.1 \(VllmWorker-\w+\), has ended", 30
    )
    pair.head.wait_for(r"VllmWorker:1 exited with code 75; starting it again", 30)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{pair.port}/health", timeout=10)
    assert caught.value.code == 503
    caught.value.close()
    # Both come back and form a new group, whichever of them is first now.
    node.wait_for(r"VllmWorker:1 was ended by SIGKILL.*; starting it again")
    seen = len(pair.head.lines)
    pair.head.wait_for(r"this is node [01] of an engine over 2", 30, start=max(0, seen - 5))
