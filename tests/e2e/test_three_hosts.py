"""The main job: prefill on two other hosts, decode on the head, streamed to a client. Hosts are network namespaces."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, Hosts
from metrics import Sample, eventually, parse, total
from processes import Serve
from prompts import PROMPTS
from reference import Reference

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

CLIENT = Path(__file__).with_name("load_client.py")
CONFIG = "configs/tiny.yaml"
TOKEN = {"STATOR_TOKEN": "three-hosts-test-token-0123456789abcdef"}


class Cluster:
    """A head with a decode worker, and prefill nodes."""

    def __init__(self, hosts: list[Host], state: Path, *overrides: str) -> None:
        self.head_host = hosts[0]
        self.state = state
        self.overrides = overrides
        self.head = self._serve(hosts[0], "graphs.agg_router:Frontend")
        self.head.wait_for("ready", 90)
        self.prefill = {host.name: self.join(host) for host in hosts[1:]}
        for serve in self.prefill.values():
            serve.wait_for("joined", 60)

    def _serve(self, host: Host, target: str, *more: str) -> Serve:
        arguments = ["serve", target, "-f", CONFIG, *more, *self.overrides]
        return Serve(arguments, state_dir=self.state / host.name, namespace=host.namespace, env=TOKEN)

    def join(self, host: Host, target: str = "components.prefill_worker:PrefillWorker", *more: str) -> Serve:
        return self._serve(host, target, "--join", f"{self.head_host.address}:7440", *more)

    @property
    def url(self) -> str:
        return f"http://{self.head_host.address}:8000"

    def _inside(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.head_host.namespace, *command]

    def start_requests(self, bodies: list[dict[str, Any]]) -> "subprocess.Popen[str]":
        plan = {"url": f"{self.url}/v1/chat/completions", "requests": [{"body": b} for b in bodies]}
        client = subprocess.Popen(
            self._inside(sys.executable, str(CLIENT)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert client.stdin is not None
        client.stdin.write(json.dumps(plan))
        client.stdin.close()
        client.stdin = None
        return client

    def results(self, client: "subprocess.Popen[str]") -> list[dict[str, Any]]:
        out, _ = client.communicate(timeout=300)
        assert client.returncode == 0
        return json.loads(out)

    def send(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.results(self.start_requests(bodies))

    def metrics(self) -> list[Sample]:
        done = subprocess.run(
            self._inside("curl", "-sf", f"{self.url}/metrics"), capture_output=True, text=True, timeout=20, check=True
        )
        return parse(done.stdout)

    def stop(self) -> None:
        for serve in [*self.prefill.values(), self.head]:
            serve.stop()


def body(messages: list[dict[str, Any]], max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny-llama",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Hosts("head", "a", "b") as hosts:
        cluster = Cluster(hosts, tmp_path)
        try:
            yield cluster
        finally:
            cluster.stop()


def check(result: dict[str, Any], messages: list[dict[str, Any]], max_tokens: int, reference: Reference) -> None:
    expected = reference.chat(messages, max_tokens)
    assert result["error"] is None, result
    assert result["text"] == expected.text
    assert result["finish_reason"] == expected.finish_reason
    assert result["usage"]["prompt_tokens"] == expected.num_prompt_tokens
    assert result["usage"]["completion_tokens"] == expected.num_output_tokens


def test_prompts_are_prefilled_on_the_other_hosts_and_decoded_on_the_head(
    cluster: Cluster, reference: Reference
) -> None:
    for _ in range(2):
        results = cluster.send([body(messages, 64) for messages in PROMPTS])
        for result, messages in zip(results, PROMPTS, strict=True):
            check(result, messages, 64, reference)
            assert result["done"]
    transferred = "stator_worker_prompt_tokens_transferred_total"
    samples = eventually(cluster.metrics, lambda found: total(found, transferred, role="decode") > 1000)
    prefilled = {
        s.labels["host"]: s.value
        for s in samples
        if s.name == "stator_worker_prompt_tokens_computed_total" and s.labels["role"] == "prefill"
    }
    assert len(prefilled) == 2, prefilled
    assert sum(prefilled.values()) > 1000, prefilled
    assert total(samples, "stator_worker_generation_tokens_total", role="prefill") == 0
    assert total(samples, "stator_worker_generation_tokens_total", role="decode") > 64
    assert total(samples, "stator_remote_prefill_total", role="decode", outcome="remote") >= 3
    # The second round found its prompts in the decode worker's cache.
    assert all(
        r["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for r in results if r["usage"]["prompt_tokens"] > 128
    )


def test_killing_a_prefill_node_with_jobs_in_hand_costs_no_request(cluster: Cluster, reference: Reference) -> None:
    # Different long prompts, so that each is a job of its own: many queued, several in hand on both nodes.
    conversations = [
        [{"role": "user", "content": f"Story number {n}. " + PROMPTS[2][-1]["content"]}] for n in range(100)
    ]
    client = cluster.start_requests([body(messages, 24) for messages in conversations])
    cluster.prefill["a"].wait_for("took prefill job", 60)
    cluster.prefill["a"].kill_tree()
    results = cluster.results(client)
    assert len(results) == 100
    for result, messages in zip(results, conversations, strict=True):
        check(result, messages, 24, reference)
        assert result["done"]
    # A node may join again at any time, and takes jobs.
    started = len(cluster.prefill["b"].lines)
    more = cluster.send([body([{"role": "user", "content": "Once more. " + PROMPTS[2][-1]["content"]}], 8)])
    assert more[0]["error"] is None
    cluster.prefill["b"].wait_for("took prefill job", 30, start=min(started, len(cluster.prefill["b"].lines)) - started)


def test_sigterm_of_a_joined_decode_node_in_mid_stream_costs_no_request(cluster: Cluster, reference: Reference) -> None:
    """With less grace than the streams need: those are handed on to the head's own worker."""
    node = cluster.join(cluster.head_host, "components.worker:VllmWorker", "--grace", "1.5")
    try:
        node.wait_for("joined", 60)
        story = [{"role": "user", "content": "Tell me a long story about a fox."}]
        client = cluster.start_requests([body(story, 700, ignore_eos=True)] * 8)
        running = "stator_worker_running_requests"
        eventually(
            cluster.metrics,
            lambda found: (
                len([s for s in found if s.name == running and s.labels["role"] == "decode" and s.value]) == 2
            ),
        )
        node.process.send_signal(signal.SIGTERM)
        results = cluster.results(client)
        cluster.head.wait_for(r"goes on elsewhere after [1-9]\d* tokens", 5)
        assert node.process.wait(20) == 0
    finally:
        node.stop()
    assert [r["error"] for r in results] == [None] * 8
    assert {(r["done"], r["finish_reason"], r["usage"]["completion_tokens"]) for r in results} == {
        (True, "length", 700)
    }
    (alone,) = cluster.send([body(story, 700, ignore_eos=True)])
    assert {r["text"] for r in results} == {alone["text"]}
