"""The connector's workers, joined over loopback: a fake KV cache, everything else real."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stator.core.kv_handover import Hold, Load, LoadParams, StepWork
from stator.engines.vllm.tcp_worker import ConnectorSettings, TransferWorker
from stator.errors import ConfigError
from stator.ids import InstanceId, RequestId, TransferId
from stator.runtime.loop import run_loop
from stator.testing.engine_bench import until

BLOCK_BYTES = 2_621_440
"""More than one piece of the stream."""


class FakeBlocks:
    """Block contents by id; a block that was never filled is all zeros."""

    def __init__(self, layout: str = "same") -> None:
        self.layout = layout
        self.contents: dict[int, bytes] = {}
        self.on_export: Callable[[], None] = lambda: None
        self.num_marks = 0

    def mark(self) -> None:
        self.num_marks += 1

    def export_blocks(self, block_ids: Sequence[int], num_bytes: int, /) -> list[bytes]:
        self.on_export()
        return [self.contents[block_id] for block_id in block_ids[: max(1, num_bytes // BLOCK_BYTES)]]

    def import_blocks(self, blocks: Sequence[tuple[int, bytes]], /) -> None:
        if any(len(content) != BLOCK_BYTES for _, content in blocks):
            raise ValueError("of another size")
        self.contents.update(blocks)


class Side:
    def __init__(self, token_file: Path, name: str, **fields: Any) -> None:
        self.blocks = FakeBlocks(fields.pop("layout", "same"))
        settings = ConnectorSettings(
            namespace=fields.pop("namespace", "n"), instance_id=InstanceId(name), token_file=str(token_file), **fields
        )
        self.worker = TransferWorker(settings, self.blocks)
        self.name = name
        self.addresses = self.worker.start()
        self.sent: list[str] = []
        self.received: list[str] = []
        self.failed: set[int] = set()

    def hold(self, *block_ids: int) -> None:
        for block_id in block_ids:
            self.blocks.contents[block_id] = bytes([block_id]) * BLOCK_BYTES
        self.worker.submit(StepWork(holds=[Hold(TransferId("t"), RequestId("p"), block_ids)]))

    def take(self) -> bool:
        sent, received = self.worker.take_ended()
        self.failed |= self.worker.take_failed_block_ids()
        self.sent += sent
        self.received += received
        return bool(sent or received)

    def wait_ended(self) -> None:
        run_loop(until(self.take))


@contextmanager
def sides(tmp_path: Path, prefill: dict[str, Any] | None = None, **fields: Any) -> Iterator[tuple[Side, Side]]:
    token_file = tmp_path / "token"
    token_file.write_text("secret")
    token_file.chmod(0o600)
    one = Side(token_file, "one", **(prefill or {}))
    two = Side(fields.pop("token_file", token_file), "two", **fields)
    try:
        yield one, two
    finally:
        for side in (one, two):
            side.worker.stop()


def load_from(one: Side, first: int, *block_ids: int) -> StepWork:
    return StepWork(loads=[Load(RequestId("d"), source_of(one), first, block_ids)])


def source_of(one: Side) -> LoadParams:
    return LoadParams(TransferId("t"), InstanceId(one.name), (one.addresses,), 8, 4, 1, 1)


def test_blocks_arrive_and_the_hold_ends(tmp_path: Path) -> None:
    with sides(tmp_path) as (one, two):
        one.hold(5, 6, 7)
        two.worker.submit(load_from(one, 1, 41, 42))
        two.wait_ended()
        one.wait_ended()
        assert (two.received, two.failed, one.sent) == (["d"], set(), ["p"])
        assert two.blocks.contents == {41: bytes([6]) * BLOCK_BYTES, 42: bytes([7]) * BLOCK_BYTES}
        assert two.blocks.num_marks == 1


def test_a_fetch_that_comes_before_the_hold_waits_for_it(tmp_path: Path) -> None:
    with sides(tmp_path) as (one, two):
        one.worker.submit(StepWork(announced=[TransferId("t")]))
        two.worker.submit(load_from(one, 0, 41))
        assert not two.take()
        one.hold(5)
        two.wait_ended()
        assert (two.failed, sorted(two.blocks.contents)) == (set(), [41])


def test_a_release_that_comes_before_the_hold_is_remembered(tmp_path: Path) -> None:
    with sides(tmp_path) as (one, two):
        one.worker.submit(StepWork(announced=[TransferId("t")]))
        two.worker.submit(StepWork(releases=[source_of(one)]))
        # On the same connection as the release, so answered after it: the fetch waits in the server for the decision.
        two.worker.submit(load_from(one, 0, 41))
        two.worker.cancel(["d"])
        two.wait_ended()
        one.hold(5)
        one.wait_ended()
        assert one.sent == ["p"]


def test_a_withdrawn_prefill_fails_those_who_wait_for_it(tmp_path: Path) -> None:
    with sides(tmp_path) as (one, two):
        one.worker.submit(StepWork(announced=[TransferId("t")]))
        two.worker.submit(load_from(one, 0, 41, 42))
        one.worker.submit(StepWork(withdrawn=[TransferId("t")]))
        two.wait_ended()
        assert (two.received, two.failed, one.sent) == (["d"], {41, 42}, [])


def test_a_hold_that_nobody_fetches_expires(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sides(tmp_path, {"hold_s": 0.05}) as (one, _):
        one.hold(5)
        one.wait_ended()
        assert one.sent == ["p"]
        assert "nobody fetched the KV blocks of t" in caplog.text


def test_a_load_cancelled_amid_leaves_nothing_on_either_side(tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()
    with sides(tmp_path) as (one, two):

        def hold_up() -> None:
            entered.set()
            assert go_on.wait(10)

        one.blocks.on_export = hold_up
        one.hold(5, 6)
        two.worker.submit(load_from(one, 0, 41, 42))
        assert entered.wait(10)
        two.worker.cancel(["another", "d"])
        two.wait_ended()
        go_on.set()
        one.wait_ended()
        assert (two.received, two.failed, one.sent) == (["d"], set(), ["p"])
        assert two.blocks.contents == {}


def test_a_load_cancelled_before_it_began_is_reported_too(tmp_path: Path) -> None:
    with sides(tmp_path) as (one, two):
        one.hold(5)
        two.worker.submit(load_from(one, 0, 41))
        two.worker.cancel(["d"])
        two.wait_ended()
        one.wait_ended()
        assert (two.received, one.sent) == (["d"], ["p"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"layout": "other"}, "laid out otherwise"), ({"namespace": "m"}, "namespace"), ({}, "token")],
)
def test_a_peer_that_does_not_fit_gets_nothing(
    tmp_path: Path, fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    if reason == "token":
        fields = {"token_file": tmp_path / "wrong"}
        (tmp_path / "wrong").write_text("guessed")
        (tmp_path / "wrong").chmod(0o600)
    with sides(tmp_path, **fields) as (one, two), caplog.at_level(logging.WARNING):
        one.hold(5)
        two.worker.submit(load_from(one, 0, 41))
        two.wait_ended()
        assert (two.received, two.failed, two.blocks.contents) == (["d"], {41}, {})
        assert reason in caplog.text
        if reason == "laid out otherwise":
            one.wait_ended()  # It may say that it needs them no more.
        else:
            assert not one.take()


def test_a_dead_peer_fails_the_load(tmp_path: Path) -> None:
    with sides(tmp_path) as (one, two):
        one.hold(5)
        one.worker.stop()
        assert one.take(), "the hold ends with its engine"
        two.worker.submit(load_from(one, 0, 41))
        two.wait_ended()
        assert (two.received, two.failed) == (["d"], {41})


def test_contents_that_do_not_fit_fail_the_load(tmp_path: Path) -> None:
    with sides(tmp_path) as (one, two):
        one.hold(5)
        one.blocks.contents[5] = b"short"
        two.worker.submit(load_from(one, 0, 41))
        two.wait_ended()
        assert (two.received, two.failed) == (["d"], {41})


def test_a_token_that_others_may_read_and_a_port_that_is_taken_stop_the_start(tmp_path: Path) -> None:
    with sides(tmp_path) as (one, _):
        port = int(one.addresses[0].rpartition(":")[2])
        with pytest.raises(ConfigError, match=str(port)):
            Side(tmp_path / "token", "three", port=port)
        (tmp_path / "token").chmod(0o644)
        with pytest.raises(ConfigError, match="may be read by others"):
            Side(tmp_path / "token", "three")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"namespace": "n", "instance_id": "i"}, "token_file"),
        ({"namespace": "", "instance_id": "i", "token_file": "t"}, "needs a namespace"),
        ({"namespace": "n", "instance_id": "i", "token_file": "t", "hold_s": 0}, "above 0"),
        ({"namespace": "n", "instance_id": "i", "token_file": "t", "port": "x"}, "port"),
    ],
)
def test_settings_that_cannot_work_are_named(extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ConnectorSettings.parse(extra)
    assert ConnectorSettings.parse({"namespace": "n", "instance_id": "i", "token_file": "t", "x": 1}).port == 0
