"""`stator lora`: whom a command means, and what it shows. On a whole deployment: tests/e2e/test_lora_adapters.py."""

import io

import pytest
from rich.console import Console

from stator.cli.lora import AdapterView, choose, differing, show_adapters
from stator.errors import ConfigError
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo

WORKERS = [InstanceInfo(InstanceId(name), "W", "decode", (), (), "host", 1) for name in ("W-1a", "W-1b", "W-2", "W-2x")]


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        ([], ["W-1a", "W-1b", "W-2", "W-2x"]),
        (["all"], ["W-1a", "W-1b", "W-2", "W-2x"]),
        (["W-1a"], ["W-1a"]),
        (["W-2"], ["W-2"]),
        (["W-2x", "W-1b", "W-2x"], ["W-2x", "W-1b"]),
    ],
)
def test_workers_by_id_or_its_beginning(names: list[str], meant: list[str]) -> None:
    assert [info.instance_id for info in choose(WORKERS, names)] == meant


@pytest.mark.parametrize(("names", "words"), [(["W-1"], "W-1 means 2 workers"), (["X"], "no worker X")])
def test_a_name_that_means_none_or_several_gets_the_list(names: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        choose(WORKERS, names)
    assert "W-2x (decode) on host" in str(raised.value)
    with pytest.raises(ConfigError, match="no worker that takes adapters"):
        choose([], names)


def test_the_list_tells_of_a_name_that_means_two_things() -> None:
    views = [
        AdapterView(name, "m", instance, "decode", "host", "/path", digest)
        for name, instance, digest in (("a", "W-1", "x"), ("a", "W-2", "x"), ("b", "W-1", "y"), ("b", "W-2", "z"))
    ]
    assert differing(views) == ["b"]
    console = Console(file=io.StringIO(), width=200)
    show_adapters(views, console)
    show_adapters([], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "b is not the same adapter on all of them" in text and "no adapter is loaded" in text and "/path" in text
