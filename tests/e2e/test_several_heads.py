"""Two heads of one deployment on etcd and NATS, with a frontend and a router each."""

import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from metrics import Sample, eventually, parse, total
from processes import Serve, free_port
from services import services

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

NAMESPACE = "heads"
KNOWN_WITHIN_S = 0.01
PROMPT = "And God said, Let there be light: and there was light. " * 12


class Node:
    def __init__(self, directory: Path, env: dict[str, str], target: str, *flags: str) -> None:
        self.port = free_port()
        common = ["-f", "configs/tiny.yaml", "--host", "127.0.0.1", "--namespace", NAMESPACE]
        own = [f"--Frontend.port={self.port}"] if target.endswith("Frontend") else []
        self.begun = time.monotonic()
        self.serve = Serve(["serve", target, *common, *own, *flags], state_dir=directory, env=env)

    def chat(self, text: str, max_tokens: int = 4) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        body = {"model": "tiny-llama", "messages": messages, "max_tokens": max_tokens, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as got:
            return json.loads(got.read())

    def cached(self, text: str) -> int:
        return self.chat(text)["usage"]["prompt_tokens_details"]["cached_tokens"]

    def scrape(self) -> list[Sample]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            return parse(response.read().decode())


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    with asyncio.Runner() as runner:
        external = services(tmp_path)
        try:
            yield {"STATOR_TOKEN": "", **runner.run(external.__aenter__())}
        finally:
            runner.run(external.__aexit__(None, None, None))


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    started: list[Node] = []
    yield started
    for node in started:
        if node.serve.process.poll() is None:
            node.serve.kill_tree()


def of_peers(name: str, samples: list[Sample]) -> float:
    return total(samples, f"stator_router_{name}")


def test_a_second_head_is_warm_and_both_know_what_the_other_sends(
    tmp_path: Path, env: dict[str, str], nodes: list[Node]
) -> None:
    def start(target: str, *flags: str) -> Node:
        # Nothing but the services tells nodes of each other.
        node = Node(tmp_path / f"state-{len(nodes)}", env, target, *flags)
        nodes.append(node)
        return node

    first = start("graphs.agg_router:Frontend", "--VllmWorker.ServiceArgs.workers=2")
    first.serve.wait_for("Stator is ready", 120)
    first.chat(PROMPT)
    assert first.cached(PROMPT) > 100

    second = start("graphs.head:Frontend")
    second.serve.wait_for("Stator is ready|joined etcd", 120)
    eventually(second.scrape, lambda now: of_peers("index_settled_workers", now) >= 2)
    warm_s = time.monotonic() - second.begun
    assert second.cached(PROMPT) > 100, "the first request through a new router goes where its prefix is"
    for node in (first, second):
        eventually(node.scrape, lambda now: of_peers("peers", now) == 2, timeout_s=20)

    with ThreadPoolExecutor(16) as pool:
        texts = [f"{number} {PROMPT}" for number in range(60)]
        answers = list(pool.map(lambda n: (first, second)[n % 2].chat(texts[n], 16), range(60)))
    assert all(answer["usage"]["completion_tokens"] for answer in answers)
    # Each frontend shows what every router reports.
    samples = eventually(first.scrape, lambda now: of_peers("peer_bookings", now) == 0)
    within = total(samples, "stator_router_peer_delay_seconds_bucket", le=str(KNOWN_WITHIN_S))
    told = total(samples, "stator_router_peer_delay_seconds_count")
    sys.stdout.write(f"\nwarm after {warm_s:.1f} s; {within / told:.0%} of {told:.0f} changes known within 10 ms\n")
    assert told > 60
    assert within / told > 0.5, "on a machine that also computes the model on all of its cores"

    # One that dies with requests open takes its bookings along.
    with ThreadPoolExecutor(4) as pool:
        lost = [pool.submit(second.chat, f"Number {number}. {PROMPT}", 1500) for number in range(4)]
        eventually(first.scrape, lambda now: of_peers("peer_bookings", now) >= 2)
        second.serve.kill_tree()
        assert all(one.exception() is not None for one in lost)
    eventually(first.scrape, lambda now: of_peers("peers", now) == 0 and of_peers("peer_bookings", now) == 0, 30)
    assert first.cached(PROMPT) > 100
    assert first.serve.stop() == 0
