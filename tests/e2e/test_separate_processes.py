"""Services that usually share a process, in processes of their own; and a frontend of several processes."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from metrics import parse
from prompts import PROMPTS
from reference import Reference
from test_graphs import Head

pytestmark = pytest.mark.timeout(240)

TWO_DECODE = "--VllmWorker.ServiceArgs.workers=2"


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def check_answers(head: Head, reference: Reference, times: int = 1) -> None:
    bodies: list[dict[str, Any]] = [
        {"messages": messages, "max_tokens": 16, "stream": stream} for messages in PROMPTS for stream in (True, False)
    ] * times
    for result, body in zip(head.send(bodies), bodies, strict=True):
        assert result["error"] is None
        assert result["text"] == reference.chat(body["messages"], 16).text


def labels(head: Head) -> set[str]:
    starting = head.serve.wait_for(r"starting (.*); the hub").group(1)
    return set(starting.split(", "))


@pytest.mark.parametrize("apart", [("Processor",), ("Router",), ("Processor", "Router")])
def test_the_same_calls_cross_the_request_plane(apart: tuple[str, ...], tmp_path: Path, reference: Reference) -> None:
    flags = [f"--{name}.ServiceArgs.colocate=false" for name in apart]
    head = Head("graphs.agg_router", tmp_path, TWO_DECODE, *flags)
    try:
        assert labels(head) == {"Frontend:1", "VllmWorker:1", "VllmWorker:2", *(f"{name}:1" for name in apart)}
        check_answers(head, reference)
    finally:
        head.serve.stop()


def of_process(head: Head, name: str) -> dict[str, float]:
    samples = [s for s in parse(head.curl("/metrics")) if s.name == f"stator_{name}" and s.labels.get("process")]
    counts: dict[str, float] = {}
    for sample in samples:
        counts[sample.labels["process"]] = counts.get(sample.labels["process"], 0) + sample.value
    return counts


def test_a_frontend_of_several_processes(tmp_path: Path, reference: Reference) -> None:
    head = Head("graphs.agg_router", tmp_path, TWO_DECODE, "--Frontend.ServiceArgs.workers=2")
    try:
        assert labels(head) == {"Frontend:1", "Frontend:2", "Router:1", "VllmWorker:1", "VllmWorker:2"}
        listening = [c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert listening.count(head.port) >= 1
        sent = len(PROMPTS) * 2 * 4
        check_answers(head, reference, times=4)
        # Whoever answers the scrape, it shows both.
        for _ in range(4):
            assert sum(of_process(head, "requests_total").values()) == sent
            assert of_process(head, "frontend_process_up") == {"1": 1.0, "2": 1.0}
        check_responses(head)

        # One dies: the other goes on serving, and the first comes back to the same socket.
        frontends = [p for p in head.serve.tree() if _accepts(p, head.port) and p.pid != head.serve.process.pid]
        assert len(frontends) == 2
        seen = len(head.serve.lines)
        frontends[0].send_signal(signal.SIGKILL)
        head.serve.wait_for(r"Frontend:\d was ended by SIGKILL.*starting it again", 30)
        check_answers(head, reference)
        head.serve.wait_for(r"listening on", 30, start=seen)
        deadline = time.monotonic() + 30
        while of_process(head, "frontend_process_up") != {"1": 1.0, "2": 1.0}:
            assert time.monotonic() < deadline
        check_answers(head, reference)
    finally:
        head.serve.stop()
    with pytest.raises(subprocess.CalledProcessError):
        head.curl("/health")


def check_responses(head: Head) -> None:
    """A response goes on whichever process has the connection."""
    url = f"http://127.0.0.1:{head.port}/v1"

    def ask(text: str, **fields: Any) -> Any:
        # A client, and so a connection, of its own.
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return client.responses.create(model="tiny-llama", input=text, max_output_tokens=4, **fields)

    first = ask("Tell me a story about a fox.")
    deadline = time.monotonic() + 30
    answers: set[str] = set()
    while len({process for process, times in responses_of(head).items() if times}) < 2:
        assert time.monotonic() < deadline
        answers.add(ask("And then?", previous_response_id=first.id, temperature=0).output_text)
    answers.add(ask("And then?", previous_response_id=first.id, temperature=0).output_text)
    assert len(answers) == 1
    for _ in range(8):
        assert json.loads(head.curl(f"/v1/responses/{first.id}"))["output"] == [each.to_dict() for each in first.output]


def responses_of(head: Head) -> dict[str, float]:
    samples = [s for s in parse(head.curl("/metrics")) if s.name == "stator_requests_total"]
    return {s.labels["process"]: s.value for s in samples if s.labels["endpoint"] == "responses"}


def _accepts(process: psutil.Process, port: int) -> bool:
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp"))


def test_the_sockets_directory_is_private_and_goes_with_the_node(tmp_path: Path) -> None:
    # Made by hand: a temporary directory of the test may be too deep for the path of a Unix socket.
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime
        try:
            head = Head("graphs.agg_router", tmp_path, "--Router.ServiceArgs.colocate=false")
        finally:
            del os.environ["XDG_RUNTIME_DIR"]
        try:
            (directory,) = Path(runtime).iterdir()
            assert directory.stat().st_mode & 0o777 == 0o700
            (sock,) = directory.iterdir()
            assert sock.is_socket() and sock.stat().st_mode & 0o777 == 0o600
            routers = [p for p in head.serve.tree() if str(sock) in {c.laddr for c in p.net_connections("unix")}]
            connected = [
                c for p in routers for c in p.net_connections("unix") if c.laddr == str(sock) and c.status != "LISTEN"
            ]
            assert routers and connected
            body = {"messages": PROMPTS[0], "max_tokens": 4}
            assert head.send([body])[0]["error"] is None
            assert json.loads(head.curl("/health"))["status"] == "ready"
        finally:
            head.serve.stop()
        assert list(Path(runtime).iterdir()) == []
