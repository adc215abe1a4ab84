"""Nodes on two hosts that talk over mutual TLS, as a user sets it up, and nodes that are not let in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Host, Hosts
from metrics import Sample, eventually, parse, total
from processes import EXAMPLES, Serve
from prompts import PROMPTS
from reference import Reference

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

TOKEN = "tls-test-token-0123456789abcdef"
LONG = [{"role": "user", "content": "And God saw the light, that it was good. " * 12}]


def certs(directory: Path, *arguments: str) -> str:
    command = Serve(["certs", *arguments], state_dir=directory, cwd=directory)
    code = command.process.wait(60)
    command.stop()
    assert code == 0, command.output
    return command.output


class Nodes:
    def __init__(self, directory: Path, head: Host) -> None:
        self.directory, self.head = directory, head
        self.started: list[Serve] = []

    def serve(self, host: Host, target: str, *flags: str, tls: str | None) -> Serve:
        env = {"STATOR_TOKEN": TOKEN, "STATOR_TLS_DIR": "" if tls is None else str(self.directory / tls)}
        arguments = ["serve", target, "-f", "configs/tiny.yaml", *flags]
        node = Serve(arguments, state_dir=self.directory / host.name, namespace=host.namespace, env=env)
        self.started.append(node)
        return node

    def join(self, host: Host, *, tls: str | None) -> Serve:
        join = ["--join", f"{self.head.address}:7440"]
        return self.serve(host, "components.prefill_worker:PrefillWorker", *join, tls=tls)

    def curl(self, path: str, body: dict[str, object] | None = None) -> str:
        data = [] if body is None else ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        command = ["ip", "netns", "exec", self.head.namespace, "curl", "-sS", f"http://{self.head.address}:8000{path}"]
        return subprocess.run([*command, *data], capture_output=True, text=True, timeout=60, check=True).stdout

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        body = {"model": "tiny-llama", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        return json.loads(self.curl("/v1/chat/completions", body))["choices"][0]["message"]["content"]

    def scrape(self) -> list[Sample]:
        return parse(self.curl("/metrics"))


def test_a_deployment_over_mutual_tls(tmp_path: Path) -> None:
    with Hosts("head", "prefill") as (head, prefill):
        certs(tmp_path, "init", "ca")
        certs(tmp_path, "init", "another")
        assert "export STATOR_TLS_DIR=" in certs(tmp_path, "issue", "ca", "--host", head.address, "--out", "head")
        certs(tmp_path, "issue", "ca", "--host", prefill.address, "--out", "prefill")
        certs(tmp_path, "issue", "another", "--host", prefill.address, "--out", "stranger")
        nodes = Nodes(tmp_path, head)
        try:
            first = nodes.serve(head, "graphs.agg_router:Frontend", tls="head")
            first.wait_for("ready", 90)
            first.wait_for("set STATOR_TLS_DIR to files of its own")
            nodes.join(prefill, tls="prefill").wait_for("joined", 60)

            reference = Reference()
            for messages in [*PROMPTS, LONG]:
                assert nodes.chat(messages, 16) == reference.chat(messages, 16).text
            eventually(
                nodes.scrape,
                lambda now: total(now, "stator_remote_prefill_total", role="decode", outcome="remote") >= 1,
            )

            without = nodes.join(prefill, tls=None)
            without.wait_for("this server takes connections over TLS only; give this node a certificate", 60)
            assert without.process.wait(30) == 2
            nodes.join(prefill, tls="stranger").wait_for("is not of this deployment's authority", 60)

            status = ["ip", "netns", "exec", prefill.namespace, *_stator("status", "--join", f"{head.address}:7440")]
            env = {"STATOR_TOKEN": TOKEN, "STATOR_TLS_DIR": str(tmp_path / "prefill")}
            shown = subprocess.run(
                status, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, cwd=EXAMPLES
            )
            assert shown.returncode == 0 and "PrefillWorker" in shown.stdout, shown
        finally:
            for node in reversed(nodes.started):
                if node.process.poll() is None:
                    node.stop()


def _stator(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "stator.cli.main", *arguments]
