"""`stator demo --engine sim`: no model, its answer in the time of what is simulated; and a GPU cluster's file here."""

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Serve, free_port

pytestmark = pytest.mark.timeout(240)

STEP_S = 26.9e-3
"""One decode step of 405b-h100-fp8."""


def chat(port: int, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0, **fields}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[tuple[Serve, int]]:
    port = free_port()
    made = ["demo", "--engine", "sim", "--port", str(port), "--hub-port", str(free_port())]
    serve = Serve(made, state_dir=tmp_path)
    try:
        serve.wait_for("ready", 90)
        yield serve, port
    finally:
        serve.stop()


def test_the_demo_answers_in_the_simulated_time(demo: tuple[Serve, int]) -> None:
    serve, port = demo
    assert "stator demo --engine sim --join" in serve.output
    assert "simulating 405b-h100-fp8 at speed 1: 8593 KV blocks of 64 tokens; constants: " in serve.output
    begin = time.monotonic()
    answer = chat(port, model="tiny-llama", max_tokens=40, ignore_eos=True)
    seconds = time.monotonic() - begin
    (choice,) = answer["choices"]
    text = choice["message"]["content"]
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 40)
    assert text.isascii() and len(text.split()) > 20
    assert seconds > 40 * STEP_S - 0.01, "no faster than the hardware"
    again = chat(port, model="tiny-llama", max_tokens=40, ignore_eos=True)
    assert again["choices"][0]["message"]["content"] == text


def test_a_file_for_gpus_runs_where_there_are_none(tmp_path: Path) -> None:
    port = free_port()
    made = [
        "serve", "graphs.agg_router:Frontend", "-f", "configs/multinode-405b.yaml", "--hub-port", str(free_port()),
        f"--Frontend.port={port}", "--Frontend.served_model_name=big", "--Common.model=stator:tiny-llama",
        "--VllmWorker.engine=sim", "--VllmWorker.step-times=405b-h200-fp8", "--VllmWorker.sim-speed=10",
    ]  # fmt: skip
    serve = Serve(made, state_dir=tmp_path)
    try:
        serve.wait_for("ready", 90)
        assert "VllmWorker is simulated: its ServiceArgs.resources.gpu (8) is ignored" in serve.output
        assert "simulating 405b-h200-fp8 at speed 10: 35156 KV blocks" in serve.output
        assert chat(port, model="big", max_tokens=5)["usage"]["completion_tokens"] == 5
    finally:
        serve.stop()
