"""The services of deploy/ from Debian's packages with deploy's own configuration files, and a real Prometheus that
scrapes a running cluster and answers every query of the dashboard."""

import asyncio
import json
import math
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, Serve, free_port

from stator.testing.real_servers import Server

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]

DEPLOY = REPOSITORY / "deploy"
METRICS = DEPLOY / "metrics"


class Configured(Server):
    """A program with one of deploy's files: with this machine's free ports and this test's directory in it."""

    def __init__(self, directory: Path, ready: str, command: Sequence[str]) -> None:
        super().__init__(directory)
        self.ready = ready
        self._command = command

    def command(self) -> Sequence[str]:
        return self._command


def rewritten(source: Path, into: Path, changes: dict[str, str]) -> Path:
    """Every text that is to be changed must be there."""
    text = source.read_text()
    for old, new in changes.items():
        assert old in text, f"{source.name} has no {old!r}"
        text = text.replace(old, new)
    into.mkdir(parents=True, exist_ok=True)
    path = into / source.name
    path.write_text(text)
    return path


def get(address: str, timeout_s: float = 5.0) -> Any:
    with urllib.request.urlopen(address, timeout=timeout_s) as answer:
        body = answer.read()
    return json.loads(body) if body[:1] in b"{[" else body


def test_etcd_and_nats_start_with_their_files_and_are_healthy(tmp_path: Path) -> None:
    client, peer, nats, monitor = (free_port() for _ in range(4))
    etcd_file = rewritten(
        DEPLOY / "etcd.yml",
        tmp_path,
        {
            "/var/lib/etcd": str(tmp_path / "etcd-data"),
            "http://0.0.0.0:2379": f"http://127.0.0.1:{client}",
            "http://127.0.0.1:2379": f"http://127.0.0.1:{client}",
            "http://127.0.0.1:2380": f"http://127.0.0.1:{peer}",
        },
    )
    nats_file = rewritten(
        DEPLOY / "nats.conf",
        tmp_path,
        {
            "/var/lib/nats": str(tmp_path / "nats-data"),
            'host: "0.0.0.0"': 'host: "127.0.0.1"',
            "port: 4222": f"port: {nats}",
            "127.0.0.1:8222": f"127.0.0.1:{monitor}",
        },
    )

    async def run() -> None:
        etcd = Configured(
            tmp_path / "etcd", "ready to serve client requests", ["etcd", "--config-file", str(etcd_file)]
        )
        server = Configured(tmp_path / "nats", "Server is ready", ["nats-server", "--config", str(nats_file)])
        try:
            await asyncio.gather(etcd.start(), server.start())
            assert (await asyncio.to_thread(get, f"http://127.0.0.1:{client}/health"))["health"] == "true"
            assert b"etcd_server_has_leader 1" in await asyncio.to_thread(get, f"http://127.0.0.1:{client}/metrics")
            # What Stator talks to.
            request = urllib.request.Request(f"http://127.0.0.1:{client}/v3/maintenance/status", b"{}")
            with await asyncio.to_thread(urllib.request.urlopen, request) as answer:
                assert json.load(answer)["version"]
            probe = f"http://127.0.0.1:{monitor}/healthz?js-enabled-only=true"
            assert (await asyncio.to_thread(get, probe))["status"] == "ok"
            stream = (await asyncio.to_thread(get, f"http://127.0.0.1:{monitor}/jsz"))["config"]
            assert stream["max_storage"] == 4 << 30 and stream["max_memory"] == 256 << 20
        finally:
            await asyncio.gather(etcd.kill(), server.kill())

    asyncio.run(run())


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[int]:
    """The port of a frontend, with decode and prefill workers behind a KV router, under steady traffic."""
    port = free_port()
    made = ["serve", "graphs.disagg_router:Frontend", "-f", "configs/tiny.yaml", "--hub-port", str(free_port())]
    serve = Serve([*made, f"--Frontend.port={port}", "--host", "127.0.0.1"], state_dir=tmp_path / "state")
    stop = threading.Event()
    client = threading.Thread(target=traffic, args=(port, stop), daemon=True)
    try:
        serve.wait_for("Stator is ready", 120)
        client.start()
        yield port
    finally:
        stop.set()
        if client.ident is not None:
            client.join(60)
        serve.stop()


def traffic(port: int, stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        number += 1
        text = "In the beginning God created the heaven and the earth. " * 6 + f"Verse {number % 5}, asked {number}."
        body = {"model": "tiny-llama", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
        except urllib.error.URLError:
            stop.wait(0.1)


def ask(prometheus: int, expression: str) -> list[float]:
    query = urllib.parse.urlencode({"query": expression})
    answer = get(f"http://127.0.0.1:{prometheus}/api/v1/query?{query}")
    assert answer["status"] == "success" and answer["data"]["resultType"] == "vector", answer
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def eventually(holds: Callable[[], bool], what: Callable[[], str], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < deadline, what()
        pause.wait(0.5)


def test_prometheus_answers_every_query_of_the_dashboard(cluster: int, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "prometheus"
    # A shorter interval only makes this test shorter.
    file = rewritten(METRICS / "prometheus.yml", config, {"scrape_interval: 5s": "scrape_interval: 1s",
                                                          "scrape_timeout: 4s": "scrape_timeout: 1s"})  # fmt: skip
    rewritten(METRICS / "targets.yml", config, {"127.0.0.1:8000": f"127.0.0.1:{cluster}"})
    assert shutil.which("promtool") is not None
    dashboard = json.loads((METRICS / "grafana" / "dashboards" / "stator.json").read_text())
    queries = [(panel, expression(target["expr"])) for panel in dashboard["panels"] for target in panel["targets"]]
    missing = list(queries)

    def answered() -> bool:
        missing[:] = [(panel, text) for panel, text in missing if not plausible(panel, ask(port, text))]
        return not missing

    async def run() -> None:
        command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        server = Configured(config, "Server is ready to receive", [*command, f"--web.listen-address=127.0.0.1:{port}"])
        try:
            await server.start()
            await asyncio.to_thread(
                eventually, answered, lambda: "\n".join(f"{panel['title']}: {text}" for panel, text in missing)
            )
            (choice,) = dashboard["templating"]["list"]
            label = re.fullmatch(r"label_values\((.+), (\w+)\)", choice["definition"])
            assert label is not None
            match = urllib.parse.urlencode({"match[]": label[1]})
            address = f"http://127.0.0.1:{port}/api/v1/label/{label[2]}/values?{match}"
            assert (await asyncio.to_thread(get, address))["data"] == ["stator"]
        finally:
            await server.kill()

    asyncio.run(run())


def expression(template: str) -> str:
    """As Grafana asks it, with all deployments chosen."""
    return template.replace("$__rate_interval", "10s").replace('"$deployment"', '".*"')


def plausible(panel: dict[str, Any], values: list[float]) -> bool:
    """There, numbers, and in the range of their unit; what traffic moves has moved."""
    if not values or not all(math.isfinite(value) and value >= 0 for value in values):
        return False
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if unit == "percentunit":
        return all(value <= 1 for value in values)
    return unit != "s" or any(value > 0 for value in values)
