"""What the README promises on one machine: the demo, its curl, the load test users know, and a clean end."""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from metrics import Sample, eventually, parse, total
from processes import Serve, free_port
from prompts import PROMPTS
from reference import Reference

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serve, int]]:
    port, hub_port = free_port(), free_port()
    serve = Serve(
        ["demo", "--port", str(port), "--hub-port", str(hub_port)], state_dir=tmp_path_factory.mktemp("state")
    )
    try:
        serve.wait_for("ready", 90)
        yield serve, port
    finally:
        serve.stop()


def curl(port: int, path: str, *arguments: str) -> str:
    done = subprocess.run(
        ["curl", "-sS", "-N", *arguments, f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def scrape(port: int) -> list[Sample]:
    return parse(curl(port, "/metrics"))


def post(port: int, path: str, body: dict[str, object]) -> str:
    return curl(port, path, "-H", "Content-Type: application/json", "-d", json.dumps(body))


def test_the_printed_curl_works_when_pasted(demo: tuple[Serve, int]) -> None:
    serve, _ = demo
    text = serve.output
    start = text.index("curl ")
    command = re.sub(r"\\\n\s*", " ", text[start:]).split("\n")[0]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert '"content"' in done.stdout, done.stdout


def test_chat_and_completions_give_the_reference_text(demo: tuple[Serve, int]) -> None:
    _, port = demo
    reference = Reference()
    for messages in PROMPTS:
        expected = reference.chat(messages, 40)
        body = {"model": "tiny-llama", "messages": messages, "max_tokens": 40, "temperature": 0}
        answer = json.loads(post(port, "/v1/chat/completions", body))
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert answer["choices"][0]["finish_reason"] == expected.finish_reason
        assert answer["usage"]["completion_tokens"] == expected.num_output_tokens
    body = {"model": "tiny-llama", "prompt": "In the beginning God created", "max_tokens": 12, "temperature": 0}
    answer = json.loads(post(port, "/v1/completions", body))
    assert "heaven" in answer["choices"][0]["text"]


def test_models_and_health(demo: tuple[Serve, int]) -> None:
    _, port = demo
    assert [m["id"] for m in json.loads(curl(port, "/v1/models"))["data"]] == ["tiny-llama"]
    assert json.loads(curl(port, "/v1/models/tiny-llama"))["id"] == "tiny-llama"
    assert curl(port, "/health", "-o", "/dev/null", "-w", "%{http_code}") == "200"
    assert curl(port, "/live", "-o", "/dev/null", "-w", "%{http_code}") == "200"
    unknown = json.loads(post(port, "/v1/chat/completions", {"model": "gpt-9", "messages": PROMPTS[0]}))
    assert "tiny-llama" in unknown["error"]["message"]


def test_a_hundred_identical_requests_at_once_all_end_and_hit_the_prefix_cache(
    demo: tuple[Serve, int], tmp_path: Path
) -> None:
    serve, port = demo
    lines_before = len(serve.lines)
    messages = [{"role": "user", "content": "Tell me a long story about a fox. " + PROMPTS[3][0]["content"]}]
    body = {"model": "tiny-llama", "messages": messages, "max_tokens": 300, "stream": True, "temperature": 0,
            "ignore_eos": True}  # fmt: skip
    (tmp_path / "body.json").write_text(json.dumps(body))
    command = (
        "seq 1 100 | xargs -I{} -P100 curl -sSN -o out.{} -H 'Content-Type: application/json' -d @body.json "
        f"http://127.0.0.1:{port}/v1/chat/completions"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    texts = set[str]()
    for number in range(1, 101):
        events = (tmp_path / f"out.{number}").read_text().strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        texts.add("".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]))
        assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]][-1] == "length"
    assert len(texts) == 1
    assert len(texts.pop()) > 300
    stats = serve.wait_for(
        r"VllmWorker.*Avg prompt throughput: [\d.]+ tokens/s, Avg generation throughput: [\d.]+ tokens/s, "
        r"Running: \d+ reqs, Waiting: \d+ reqs, KV cache usage: [\d.]+%, Prefix cache hit rate: [\d.]+%",
        start=lines_before,
    )
    assert stats
    generated = "stator_worker_generation_tokens_total"
    samples = eventually(lambda: scrape(port), lambda found: total(found, generated, role="decode") >= 100 * 299)
    cached = total(samples, "stator_worker_prompt_tokens_cached_total", role="decode")
    prompts = total(samples, "stator_worker_prompt_tokens_total", role="decode")
    assert cached / prompts > 0.5


def test_a_client_that_leaves_frees_its_blocks(demo: tuple[Serve, int]) -> None:
    _, port = demo
    body = {"model": "tiny-llama", "messages": PROMPTS[2], "max_tokens": 900, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        received = b""
        while b"data: " not in received:
            received += client.recv(65536)
    eventually(
        lambda: scrape(port),
        lambda found: (
            total(found, "stator_worker_running_requests") == total(found, "stator_worker_kv_blocks_used") == 0
        ),
    )


def test_ctrl_c_leaves_no_process_port_or_shared_memory(tmp_path: Path) -> None:
    port, hub_port = free_port(), free_port()
    shared_before = set(Path("/dev/shm").iterdir())
    serve = Serve(["demo", "--port", str(port), "--hub-port", str(hub_port)], state_dir=tmp_path)
    serve.wait_for("ready", 90)
    tree = serve.tree()
    assert len(tree) >= 4, tree
    code = serve.stop()
    assert code == 0, serve.output
    assert not [p for p in tree if psutil.pid_exists(p.pid) and p.is_running()]
    for number in (port, hub_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", number))
    assert set(Path("/dev/shm").iterdir()) <= shared_before


def test_a_killed_supervisor_takes_everything_along(tmp_path: Path) -> None:
    serve = Serve(["demo", "--port", str(free_port()), "--hub-port", str(free_port())], state_dir=tmp_path)
    serve.wait_for("ready", 90)
    children = serve.tree()[1:]
    serve.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    serve.kill_tree()
