"""`start_engine` with engines over several nodes: groups on discovery in memory, engines that only take notes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import pytest

from stator.config.schema import VllmWorkerConfig
from stator.discovery.base import Discovery, Lease
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.engines.base import EngineHost, NodePlace, SpreadEngine
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo
from stator.messages.engine_groups import ENGINE_GROUPS_PREFIX
from stator.runtime.tasks import TaskOwner
from stator.testing.clock import run_virtual
from stator.worker.engine import start_engine
from stator.worker.engine_group import REMIND_EVERY_S
from stator.worker.host import WorkerHost

CONFIG = VllmWorkerConfig(model="m", engine="vllm")
INFO = cast(EngineInfo, object())


class Notes:
    """Implements SpreadEngine as far as a start needs it."""

    def __init__(self, num_nodes: int = 2, settings: Mapping[str, str] | None = None, port: int | None = None) -> None:
        self.num_nodes = num_nodes
        self.place: NodePlace | None = None
        self.master_port = port
        self.did: list[str] = []
        self._settings = settings or {"tensor-parallel-size": "16"}

    def shared_settings(self) -> Mapping[str, str]:
        return self._settings

    async def start(self, host: EngineHost) -> EngineInfo:
        self.did.append("start")
        return INFO

    async def start_further_node(self, host: EngineHost) -> None:
        self.did.append("start further node")

    async def stop(self) -> None:
        self.did.append("stop")

    def unused(self, *_: Any) -> Any:
        raise AssertionError("not part of a start")

    generate = prefill = abort = release = load = cached_prefix_tokens = watch_kv = reset_prefix_cache = unused
    holds_ended = embed = unused


class Process:
    """One node's worker process: what ServiceContext gives it, and what it was told."""

    def __init__(self, store: MemoryKeyStore, name: str) -> None:
        self.service = "VllmWorker"
        self.instance_id = InstanceId(name)
        self.host = f"host-{name}"
        self.join_command = "stator serve components.worker:VllmWorker --join head:7440"
        self.discovery: Discovery = MemoryDiscovery(store)
        self.lease: Lease
        self.tasks = TaskOwner(name)
        self.left: asyncio.Queue[str] = asyncio.Queue(4)
        self.at_stop: Callable[[], Awaitable[None]] | None = None
        self.dead: list[str] = []

    def leave(self, reason: str) -> None:
        self.left.put_nowait(reason)

    def follow(self, on_stop: Callable[[], Awaitable[None]]) -> None:
        self.at_stop = on_stop

    async def begin(self, engine: Notes) -> "asyncio.Task[EngineInfo | None]":
        self.lease = await self.discovery.grant_lease()
        self.worker_host = WorkerHost(
            instance_id=self.instance_id, client=cast(Any, None), server=cast(Any, None), on_dead=self.dead.append
        )
        return asyncio.ensure_future(start_engine(cast(Any, engine), CONFIG, self.worker_host, self))

    async def end(self, *, killed: bool = False) -> None:
        """killed: its lease is only missed."""
        if not killed:
            await self.lease.revoke()
        await self.tasks.close()
        await self.discovery.close()


async def a_pair(store: MemoryKeyStore) -> tuple[Process, Process, Notes, Notes]:
    first, second, engine_a, engine_b = Process(store, "a"), Process(store, "b"), Notes(), Notes()
    starting = await first.begin(engine_a)
    # The second sees the first's offer.
    await settled()
    assert not starting.done()
    assert await (await second.begin(engine_b)) is None
    assert await starting is INFO
    return first, second, engine_a, engine_b


async def settled() -> None:
    """Everything that is ready to run has run: on the virtual clock time passes only after that."""
    await asyncio.sleep(0.001)


def test_an_engine_of_the_seam_is_told_from_one_that_spreads() -> None:
    assert isinstance(Notes(), SpreadEngine)
    assert not isinstance(object(), SpreadEngine)


def test_one_node_needs_nobody() -> None:
    async def main() -> None:
        store, engine = MemoryKeyStore(), Notes(num_nodes=1)
        process = Process(store, "a")
        assert await (await process.begin(engine)) is INFO
        assert engine.place is None and not store.get_prefix(ENGINE_GROUPS_PREFIX)
        await process.end()

    run_virtual(main())


def test_two_nodes_become_rank_0_and_one_that_follows() -> None:
    async def main() -> None:
        first, second, engine_a, engine_b = await a_pair(MemoryKeyStore())
        assert engine_a.did == ["start"] and engine_b.did == ["start further node"]
        place, other = engine_a.place, engine_b.place
        assert place is not None and other is not None
        assert (place.rank, other.rank) == (0, 1)
        assert place.hosts == other.hosts == ("host-a", "host-b")
        assert place.master_address == other.master_address == "host-a"
        assert place.master_port == other.master_port and 1024 <= place.master_port < 65536
        assert other.instance_id == "a"
        assert first.at_stop is None and second.at_stop is not None
        await second.at_stop()
        assert engine_b.did[-1] == "stop"
        first.worker_host.on_dead("its core ended")
        assert first.dead == ["its core ended (node 0 of 2: host-a, host-b; the cause may be on another of them)"]
        await second.end()
        await first.end()

    run_virtual(main())


def test_a_port_that_was_configured_is_taken() -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        first, second, engine = Process(store, "a"), Process(store, "b"), Notes(port=29501)
        starting = await first.begin(engine)
        await settled()
        await (await second.begin(Notes()))
        await starting
        assert engine.place is not None and engine.place.master_port == 29501
        await second.end()
        await first.end()

    run_virtual(main())


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_the_end_of_one_ends_the_other_and_both_form_a_new_group(which: int, killed: bool) -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        pair = (await a_pair(store))[:2]
        gone, left = pair[which], pair[1 - which]
        await gone.end(killed=killed)
        reason = await left.left.get()
        assert f"node {which} of them, {gone.host} ({gone.instance_id}), has ended" in reason
        again = Process(store, "c")
        engine = Notes()
        starting = await again.begin(engine)
        await left.end()
        last = Process(store, "d")
        assert await (await last.begin(Notes())) is None
        assert await starting is INFO and engine.place is not None
        assert engine.place.hosts == ("host-c", "host-d") and engine.place.instance_id == "c"
        await last.end()
        await again.end()

    run_virtual(main())


def test_missing_nodes_are_named_with_the_command_that_starts_them(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        first = Process(store, "a")
        starting = await first.begin(Notes(num_nodes=3))
        await settled()
        second = Process(store, "b")
        waiting = await second.begin(Notes(num_nodes=3))
        await asyncio.sleep(REMIND_EVERY_S + 1)
        for task, process in ((starting, first), (waiting, second)):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await process.end()

    caplog.set_level(logging.INFO, "stator.worker.engine_group")
    run_virtual(main())
    told = [record.getMessage() for record in caplog.records]
    command = "start there\n  stator serve components.worker:VllmWorker --join head:7440"
    assert told[0] == f"node 0 of 3; waiting for 2 more nodes: {command}"
    assert told.count(f"node 0 of 3; waiting for 1 more node: {command}") == 2
    assert told.count(f"node 1 of 3, behind host-a; waiting for 1 more node: {command}") == 2


def test_a_node_with_other_settings_is_refused_and_the_first_waits_on() -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        first, second = Process(store, "a"), Process(store, "b")
        starting = await first.begin(Notes())
        await settled()
        refused = await second.begin(Notes(settings={"tensor-parallel-size": "8"}))
        with pytest.raises(ConfigError, match="tensor-parallel-size is 8 here and 16 there"):
            await refused
        assert not starting.done()
        await second.end()
        third = Process(store, "c")
        await (await third.begin(Notes()))
        assert await starting is INFO
        await third.end()
        await first.end()

    run_virtual(main())


def test_a_start_that_was_given_up_leaves_no_key() -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        first = Process(store, "a")
        starting = await first.begin(Notes())
        await settled()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await first.end()
        assert not store.get_prefix(ENGINE_GROUPS_PREFIX)

    run_virtual(main())


def test_discovery_that_fails_ends_the_start() -> None:
    async def main() -> None:
        process = Process(MemoryKeyStore(), "a")

        async def create(*_: Any) -> bool:
            raise StatorError(ErrorCode.INSTANCE_LOST, "the hub cannot be reached")

        process.discovery.create = create  # type: ignore[method-assign]
        with pytest.raises(StatorError, match="the hub cannot be reached"):
            await (await process.begin(Notes()))
        await process.end()

    run_virtual(main())
