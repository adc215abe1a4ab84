"""Every component is drained and started again under load, one after another, and no request notices."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import EXAMPLES
from reference import Reference
from steady import steady_load
from test_graphs import Head

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def stator(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command for the running deployment."""
    command = [sys.executable, "-m", "stator.cli.main", *arguments, "--join", f"127.0.0.1:{head.hub_port}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=EXAMPLES, env=head.environment)


def drain(head: Head, *arguments: str) -> list[dict[str, Any]]:
    done = stator(head, "drain", *arguments, "--json")
    assert done.returncode == 0, done.stderr + head.serve.output
    return json.loads(done.stdout)["drained"]


def pids(head: Head) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for instance in json.loads(stator(head, "status", "--json").stdout)["instances"]:
        found.setdefault(instance["service"], set()).add(instance["pid"])
    return found


def test_every_component_in_turn(tmp_path: Path, reference: Reference) -> None:
    """Also for clients that open a connection for each request: none is refused and none is reset."""
    flags = ["--VllmWorker.ServiceArgs.workers=2"]
    flags += [f"--{name}.ServiceArgs.colocate=false" for name in ("Processor", "Router")]
    head = Head("graphs.disagg_router", tmp_path, *flags)
    services = ("VllmWorker", "PrefillWorker", "Router", "Processor", "Frontend")
    try:
        before = pids(head)
        with (
            steady_load(head.port, reference, at_once=10) as kept,
            steady_load(head.port, reference, at_once=10, force_close=True) as fresh,
        ):
            drained = [one for service in services for one in drain(head, service, "--all", "--restart")]
        assert [one["service"] for one in drained] == [services[0], *services]
        assert all(one["outcome"] == "drained" and one["replacement"] for one in drained)
        after = pids(head)
        assert all(len(after[service]) == len(before[service]) for service in services)
        assert all(not after[service] & before[service] for service in services)
        # Answers kept coming: nothing waited for a whole restart.
        assert min(kept["num"], fresh["num"]) > 50 and max(kept["longest_s"], fresh["longest_s"]) < 20
    finally:
        assert head.serve.stop() == 0
    assert "failed" not in head.serve.output


def test_a_frontend_of_two_processes_and_then_of_none(tmp_path: Path, reference: Reference) -> None:
    head = Head("graphs.agg_router", tmp_path, "--Frontend.ServiceArgs.workers=2")
    try:
        with steady_load(head.port, reference, at_once=6, max_tokens=8) as report:
            assert len(drain(head, "Frontend", "--all", "--restart")) == 2
            # For good: the other one goes on alone.
            first = next(iter(json.loads(stator(head, "status", "--json").stdout)["instances"]))
            assert first["service"] == "Frontend"
            assert drain(head, first["id"])[0]["replacement"] is None
        assert report["num"] > 20
        drain(head, "Frontend")
        refused = subprocess.run(["curl", "-s", f"http://127.0.0.1:{head.port}/live"], timeout=20)
        assert refused.returncode == 7
        for number in (1, 2):
            assert f"Frontend:{number} was drained on request; it is not started again" in head.serve.output
    finally:
        assert head.serve.stop() == 0
