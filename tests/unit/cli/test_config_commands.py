"""`stator config` against a hub in this process, and as a command."""

import asyncio
import io
import json
from typing import Any

import pytest
from operating_world import World, world
from rich.console import Console
from typer.testing import CliRunner

from stator.cli import main
from stator.cli.settings import (
    Processes,
    change_setting,
    describe_change,
    find_setting,
    parse_value,
    read_settings,
    show_settings,
    view_of,
)
from stator.core.settings import SETTINGS, Document
from stator.errors import ConfigError, StatorError
from stator.messages.instances import SettingState

LENGTH = "max-local-prefill-length"


async def command(w: World, *arguments: str, namespace: str = "ns") -> Any:
    options = ["--namespace", namespace, "--join", str(w.options.join)]
    return await asyncio.to_thread(CliRunner().invoke, main.typer_app, ["config", *arguments, *options])


def test_it_is_set_shown_and_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            one = await w.add("W-1", configured={LENGTH: 64})
            other = await w.add("W-2", configured={LENGTH: 64})
            (view,) = await read_settings(w.options, [LENGTH])
            assert (view.value, view.source, view.version, view.default) == (64, "configured", None, 1000)
            assert [(c.value, c.origin, c.num_processes) for c in view.configured] == [
                (64, "W-1.yaml:3", 1), (64, "W-2.yaml:3", 1),
            ]  # fmt: skip

            change = await change_setting(w.options, "max_local_prefill_length", "500", 5.0)
            assert describe_change(change) == [f"{LENGTH} is 500; applied by 2 of 2 processes"]
            assert one.applied == other.applied == [500]
            assert (change.setting.source, change.setting.num_applied, change.late) == ("set", 2, [])

            late = await w.add("W-3", configured={LENGTH: 7})
            await late.settings.wait_synced(5.0)
            assert late.applied == [500]

            change = await change_setting(w.options, LENGTH, None, 5.0)
            assert describe_change(change) == [
                f"{LENGTH} is not set; each process has what it is configured with; applied by 3 of 3 processes"
            ]
            assert (one.applied, late.applied) == ([500, 64], [500, 7])

    asyncio.run(scene())


def test_a_process_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            await w.add("W-1", configured={LENGTH: 64})
            await (await w.add("W-2", configured={LENGTH: 64})).server.close()
            result = await command(w, "set", LENGTH, "5", "--timeout", "0")
            assert result.exit_code == 1
            assert "not yet by W-2 on 127.0.0.1" in result.output
            (view,) = await read_settings(w.options, [LENGTH])
            assert (view.value, view.num_silent) == (5, 1), "it was written even so"

    asyncio.run(scene())


def test_as_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            await w.add("W-1", configured={LENGTH: 64})
            listed = await command(w, "list")
            assert listed.exit_code == 0, listed.output
            assert all(name in listed.output for name in SETTINGS) and "not used" in listed.output
            set_ = await command(w, "set", "router-mode", "round-robin")
            assert set_.exit_code == 0 and set_.output == "router-mode is round-robin; no process uses it now\n"
            got = json.loads((await command(w, "get", "router-mode", "--json")).output)
            assert (got["value"], got["source"], got["num_processes"]) == ("round-robin", "set", 0)
            settings = json.loads((await command(w, "list", "--json")).output)["settings"]
            assert [one["name"] for one in settings] == list(SETTINGS)
            unset = await command(w, "unset", "router-mode")
            assert unset.exit_code == 0 and "router-mode is not set; it is kv (default)" in unset.output

            for arguments, says in (
                (("set", LENGTH, "many"), f"{LENGTH}: found many, expected a number from 0 to 1000000000"),
                (("set", LENGTH, "-3"), f"{LENGTH}: found -3, expected a number from 0"),
                (("set", "router-mode", "round-robbin"), "expected one of kv, round-robin"),
                (("set", "max-local-prefil-length", "3"), f"did you mean {LENGTH}"),
                (("get", "temperature"), "there is no setting temperature"),
            ):
                refused = await command(w, *arguments)
                assert refused.exit_code == 2 and says in refused.output, refused.output

    asyncio.run(scene())


def test_what_somebody_wrote_by_hand_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            await w.add("W-1", configured={LENGTH: 64})
            await w.discovery.put(f"settings/{LENGTH}", b"500")
            (view,) = await read_settings(w.options, [LENGTH])
            assert view.invalid is not None and (view.value, view.source) == (64, "configured")
            shown = Console(file=io.StringIO(), width=300)
            show_settings([view], shown)
            assert "the store has something that cannot be used" in shown.file.getvalue()  # type: ignore[attr-defined]
            await change_setting(w.options, LENGTH, "9", 5.0)
            assert w.members["W-1"].applied == [9]

    asyncio.run(scene())


def test_a_newer_value_of_somebody_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with world(monkeypatch) as w:
            member = await w.add("W-1", configured={LENGTH: 64})

            async def newer() -> None:
                await member.changed.wait()
                await w.discovery.put(f"settings/{LENGTH}", b'{"version": 9007199254740991, "value": 3}')

            # It never becomes current here, so that the command goes on asking until the other one wrote.
            silent = await w.add("W-2", configured={LENGTH: 64})
            await silent.server.close()
            writing = asyncio.ensure_future(newer())
            with pytest.raises(StatorError, match="was changed by somebody else meanwhile"):
                await change_setting(w.options, LENGTH, "5", 15.0)
            await writing

    asyncio.run(scene())


def state(value: int, configured: int, origin: str = "default", version: int = 0) -> SettingState:
    return SettingState(LENGTH, value, configured, origin, version, False)


def test_processes_that_are_configured_differently() -> None:
    processes = Processes([("a", (state(1, 1, "f.yaml:1"),)), ("b", (state(2, 2, "f.yaml:9"),))], ["c"])
    view = view_of(SETTINGS[LENGTH], None, None, processes)
    assert (view.value, view.source, view.num_processes, view.num_silent) == (None, "configured", 2, 1)
    set_ = view_of(SETTINGS[LENGTH], Document(5, 3), None, processes)
    assert (set_.value, set_.source, set_.num_applied) == (3, "set", 0)
    shown = Console(file=io.StringIO(), width=200)
    show_settings([view], shown)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "different" in text and "1 (f.yaml:1, 1 processes)" in text and "1 processes did not answer" in text


def test_names_and_values() -> None:
    assert find_setting("Router_Mode").name == "router-mode"
    assert parse_value(SETTINGS["conditional-disagg"], "on") is True
    with pytest.raises(ConfigError, match="expected true or false"):
        parse_value(SETTINGS["conditional-disagg"], "1")
