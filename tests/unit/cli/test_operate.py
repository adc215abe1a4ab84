"""`stator drain` and `stator status` against a hub in this process, and as commands."""

import asyncio
import io
import json
import socket
from pathlib import Path

import msgspec
import pytest
from operating_world import HOST, TOKEN, world
from rich.console import Console
from typer.testing import CliRunner

from stator.cli import main
from stator.cli.drain import choose
from stator.cli.status import SCHEMA, InstanceView, Status, read_status, show
from stator.errors import ConfigError, StatorError
from stator.ids import InstanceId, JobId
from stator.messages.instances import DrainPhase, DrainRequest, InstanceInfo
from stator.queue.hub_client import HubQueue

# Status.


def test_status_shows_instances_leases_drains_and_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            first = await w.add("W-1")
            silent = await w.add("W-2")
            await silent.server.close()
            queue = HubQueue(w.client, w.server.addresses, namespace="ns", name="prefill-x")
            await queue.put(JobId("j"), b"")
            status = await read_status(w.options)
            assert (status.schema, status.namespace) == (SCHEMA, "ns")
            assert status.hub is not None and status.hub.uptime_s >= 0 and int(status.hub.epoch, 16) > 0
            (waiting,) = status.queues
            assert (waiting.name, waiting.waiting, waiting.in_flight, waiting.dead_letters) == ("prefill-x", 1, 0, 0)
            one, other = status.instances
            assert (one.id, one.service, one.role, one.state, one.model) == (
                "W-1", "VllmWorker", "decode", "ready", "m",
            )  # fmt: skip
            assert one.answers and (one.num_open, one.stalls, one.drain) == (4, 2, None)
            assert one.engine is not None and one.lease is not None
            assert (one.engine.running, one.engine.waiting, one.engine.kv_usage, one.engine.steps) == (3, 1, 0.25, 7)
            assert one.engine.prefix_hit_rate == 0.333
            assert 0 < one.lease.left_s <= one.lease.ttl_s == 10.0
            assert not other.answers and other.engine is None and other.num_open is None and other.lease is not None

            first.leaves = False
            with pytest.raises(StatorError):
                await w.drain("W-1", restart=True)
            (drain_view,) = [i.drain for i in (await read_status(w.options)).instances if i.drain is not None]
            assert (drain_view.phase, drain_view.num_open, drain_view.restart) == ("draining", 4, True)

            shown = Console(file=io.StringIO(), width=300)
            show(await read_status(w.options), shown)
            text = shown.file.getvalue()  # type: ignore[attr-defined]
            assert "draining 0 s, restart" in text and "ready, silent" in text and "25%" in text and "33%" in text
            assert "prefill-x" in text and "namespace ns" in text
            await queue.close()

    asyncio.run(scene())


def test_the_documented_fields_are_those_of_json() -> None:
    """docs/guide/operating.md names every field, so that none is renamed unseen."""
    guide = (Path(__file__).parents[3] / "docs" / "guide" / "operating.md").read_text()
    encoded = msgspec.json.schema_components([Status])[1]
    fields = {name for struct in encoded.values() for name in struct["properties"]}
    assert {"instances", "lease", "num_open", "dead_letters"} <= fields
    assert {f for f in fields if f"`{f}`" not in guide} == set()
    assert InstanceView.__struct_fields__[:6] == ("id", "service", "role", "host", "pid", "state")


# Drain.


def test_one_instance_by_the_beginning_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            await w.add("W-1a")
            other = await w.add("W-2b")
            assert await w.drain("W-1", timeout_s=7.0) == [("W-1a", "drained", 0, None)]
            assert w.members["W-1a"].asked == [DrainRequest(restart=False, timeout_s=7.0)] and not other.asked
            assert w.said[0] == "W-1a: draining, 4 requests left (0 s)" and "W-1a: drained in 0.0 s" in w.said[-1]

    asyncio.run(scene())


def test_all_of_a_service_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            first, second, prefill = await w.add("W-1"), await w.add("W-2"), await w.add("P-1", "PrefillWorker")
            first.outcome = DrainPhase.CUT_OFF
            done = await w.drain("VllmWorker", all_of_service=True, restart=True)
            assert done == [("W-1", "cut_off", 4, "W-1-again"), ("W-2", "drained", 0, "W-2-again")]
            assert first.asked and second.asked and not prefill.asked
            again = [w.said.index(f"{name}: started again as {name}-again") for name in ("W-1", "W-2")]
            assert again[0] < w.said.index("W-2: draining, 4 requests left (0 s)") < again[1]
            assert any("4 requests had no time to finish and were handed on" in line for line in w.said)

    asyncio.run(scene())


def test_a_drain_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            (await w.add("W-1")).leaves = False
            with pytest.raises(StatorError, match="ended before it was drained; its log has the reason"):
                await w.drain("W-1")

    asyncio.run(scene())


def instance(name: str, service: str = "VllmWorker", pid: int = 1, host: str = "a") -> InstanceInfo:
    return InstanceInfo(InstanceId(name), service, "decode", (), (), host, pid)


def test_what_a_name_means() -> None:
    known = [instance("W-12", pid=1), instance("W-1", pid=2), instance("X-1", "Xs", pid=3), instance("X-2", "Xs", 3)]
    assert choose(known, "W-1", False) == [known[1]], "a whole id goes before the beginning of another"
    assert choose(known, "W-12", False) == [known[0]]
    assert [i.pid for i in choose(known, "VllmWorker", True)] == [1, 2]
    assert len(choose(known, "Xs", True)) == 1, "a process is drained once"
    assert choose([known[0]], "VllmWorker", False) == [known[0]]
    with pytest.raises(
        ConfigError, match="VllmWorker means 2 instances; name one, or --all for all of VllmWorker:\n  W"
    ):
        choose(known, "VllmWorker", False)
    with pytest.raises(ConfigError, match="W means 2 instances; name one:"):
        choose(known, "W", False)
    with pytest.raises(ConfigError, match="no instance Y; the instances:\n  W-12 on a\n"):
        choose(known, "Y", False)
    with pytest.raises(ConfigError, match="no instance of a service Y; the services: VllmWorker, Xs"):
        choose(known, "Y", True)
    with pytest.raises(ConfigError, match="there is none"):
        choose([], "Y", False)


# As commands.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("arguments", [["status"], ["drain", "W"]])
def test_without_a_head_or_a_token(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join = ["--join", f"{HOST}:{free_port()}"]
    monkeypatch.setenv("STATOR_TOKEN", TOKEN)
    result = CliRunner().invoke(main.typer_app, [*arguments, *join])
    assert result.exit_code == 2
    assert f"stator: there is no head at {join[1]}" in result.output and "--join HOST[:PORT]" in result.output
    monkeypatch.delenv("STATOR_TOKEN")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    result = CliRunner().invoke(main.typer_app, [*arguments, *join])
    assert result.exit_code == 2 and "needs the deployment's token" in result.output


def test_status_as_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            await w.add("W-1")
            arguments = ["status", "--json", "--namespace", "ns", "--join", w.options.join]
            result = await asyncio.to_thread(CliRunner().invoke, main.typer_app, arguments)
            assert result.exit_code == 0, result.output
            assert [one["id"] for one in json.loads(result.output)["instances"]] == ["W-1"]
            table = await asyncio.to_thread(CliRunner().invoke, main.typer_app, [a for a in arguments if a != "--json"])
            assert table.exit_code == 0 and "W-1" in table.output
            wrong = await asyncio.to_thread(
                CliRunner(env={"STATOR_TOKEN": "another"}).invoke, main.typer_app, arguments
            )
            assert wrong.exit_code == 2 and "refused this command" in wrong.output

    asyncio.run(scene())
