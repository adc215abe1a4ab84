"""The same requests to vLLM's own server and to Stator with vLLM: bodies and streams, field by field.

Whatever differs is in `own_server_differences` and in docs/reference/vllm-server.md, with its reason.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e.processes import Serve, free_port
from stator.config.models import resolve_model
from vllm_engines.own_server_differences import OTHER_ANSWERS, RULES
from vllm_engines.own_server_requests import REQUESTS, Ask

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

MODEL = "tiny-llama"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "vllm-server.md"
READY_S = 240.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
ENGINE = {
    "dtype": "float32",
    "block-size": 64,
    "max-model-len": 512,
    "max-num-seqs": 16,
    "max-num-batched-tokens": 512,
    "kv-cache-memory-bytes": 64 << 20,
    "enforce-eager": True,
    "enable-prefix-caching": True,
}


@dataclass(frozen=True)
class Both:
    ours: str
    theirs: str


def until_ready(url: str, process: "subprocess.Popen[bytes] | None") -> None:
    command = [
        "curl",
        "-sSf",
        "--retry",
        "1000",
        "--retry-delay",
        "0",
        "--retry-all-errors",
        "--max-time",
        str(READY_S),
    ]
    done = subprocess.run([*command, "-o", "/dev/null", url], capture_output=True, text=True)
    assert done.returncode == 0, (done.stderr, process and process.poll())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    directory = tmp_path_factory.mktemp("servers")
    # As on a new machine: some requests are the first for which a kernel is compiled, and that takes its time.
    environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(directory / "kernels")}
    port, own_port = free_port(), free_port()
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(resolve_model(f"stator:{MODEL}")),
    ]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(own_port)]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--max-logprobs", "20"]
    for key, value in ENGINE.items():
        command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    log = (directory / "vllm.log").open("wb")
    own = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True)
    flags = [f"--VllmWorker.{key}={value}".replace("=True", "=true") for key, value in ENGINE.items()]
    flags += [
        f"--VllmWorker.ServiceArgs.python={sys.executable}",
        f"--Processor.max-model-len={ENGINE['max-model-len']}",
    ]
    serve = Serve(
        ["serve", "graphs.agg_router:Frontend", "-f", "configs/tiny-vllm.yaml", *flags]
        + [f"--Frontend.port={port}", "--hub-port", str(free_port())],
        state_dir=directory,
        env=environment,
    )
    try:
        until_ready(f"http://127.0.0.1:{own_port}/health", own)
        until_ready(f"http://127.0.0.1:{port}/health", None)
        yield Both(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{own_port}")
    finally:
        own.terminate()
        serve.stop(60)
        try:
            own.wait(30)
        except subprocess.TimeoutExpired:
            own.kill()
        log.close()


def answer(base: str, ask: Ask) -> tuple[int, Any]:
    """(status, body), a stream's body being its events put together."""
    data = None if ask.body is None else json.dumps({"model": MODEL, **ask.body}).encode()
    request = urllib.request.Request(base + ask.path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=150) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    if text.startswith("data: "):
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return status, joined([json.loads(event) for event in events[:-1]])
    return status, json.loads(text) if text else None


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client has at the end; how the text was cut into events says nothing."""
    whole: dict[str, Any] = {"text": {}, "endings": {}, "keys": set(), "usage": events[-1].get("usage"), "scores": []}
    for event in events:
        whole["keys"] |= {key for key, value in event.items() if value is not None}
        for choice in event["choices"]:
            index = str(choice["index"])
            delta = choice.get("delta", choice)
            whole["text"][index] = whole["text"].get(index, "") + (delta.get("content") or delta.get("text") or "")
            whole["scores"] += [token["logprob"] for token in (choice["logprobs"] or {}).get("content", ())]
            if choice["finish_reason"]:
                whole["endings"][index] = choice["finish_reason"]
    return {**whole, "keys": sorted(whole["keys"])}


def differences(ours: Any, theirs: Any, path: str) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: list[str] = []
        for key in sorted({*ours, *theirs}):
            where = f"{path}.{key}"
            if key not in theirs:
                found.append(f"+ {where} = {ours[key]!r}")
            elif key not in ours:
                found.append(f"- {where} = {theirs[key]!r}")
            else:
                found += differences(ours[key], theirs[key], where)
        return found
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            line
            for n, (a, b) in enumerate(zip(ours, theirs, strict=True))
            for line in differences(a, b, f"{path}[{n}]")
        ]
    if isinstance(ours, float) and isinstance(theirs, float):
        return [] if abs(ours - theirs) < 1e-3 else [f"~ {path}: {ours!r} != {theirs!r}"]
    return [] if ours == theirs else [f"~ {path}: {ours!r} != {theirs!r}"]


@pytest.mark.parametrize("ask", REQUESTS, ids=lambda ask: ask.name)
def test_the_same_but_for_what_is_told(both: Both, ask: Ask) -> None:
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(lambda base: answer(base, ask), (both.ours, both.theirs))
    if ask.name in OTHER_ANSWERS:
        assert ours[0] == 200
        return
    lines = differences({"status": ours[0], "body": ours[1]}, {"status": theirs[0], "body": theirs[1]}, "")
    assert not [line for line in lines if not any(rule.covers(line) for rule in RULES)]


def test_users_are_told() -> None:
    told = PAGE.read_text()
    for reason in [*(rule.reason for rule in RULES), *OTHER_ANSWERS.values()]:
        assert f"| {reason} |" in told, reason
