import asyncio
import logging

import msgspec
import pytest

from stator.discovery.memory import MemoryDiscovery
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo, InstanceState, instance_key
from stator.runtime.directory import DirectoryChange, InstanceDirectory, register_instance, update_instance_state
from stator.testing.clock import run_virtual
from stator.testing.hub_world import HubWorld


def info(name: str, *, service: str = "VllmWorker", role: str = "decode", model: str | None = "m") -> InstanceInfo:
    return InstanceInfo(InstanceId(name), service, role, (f"inproc://{name}",), ("generate",), "host", 1, model=model)


def ids(infos: list[InstanceInfo]) -> list[str]:
    return [found.instance_id for found in infos]


def test_instances_come_change_and_go() -> None:
    async def main() -> None:
        discovery = MemoryDiscovery()
        directory = InstanceDirectory(discovery)
        changes: list[DirectoryChange] = []
        unsubscribe = directory.subscribe(changes.append)
        assert not directory.synced
        await directory.start()
        await directory.wait_for(lambda view: view.instances() == [], 5.0)
        lease_b, lease_a = await discovery.grant_lease(), await discovery.grant_lease()
        b = info("b")
        await register_instance(discovery, lease_b, b)
        await register_instance(discovery, lease_a, info("a", service="PrefillWorker", role="prefill"))
        await directory.wait_for(lambda view: len(view.instances()) == 2, 5.0)
        assert directory.synced
        assert ids(directory.instances()) == ["a", "b"]
        assert ids(directory.instances(role="decode")) == ["b"]
        assert ids(directory.instances(service="PrefillWorker")) == ["a"]
        assert ids(directory.instances(model="m", role="prefill")) == ["a"]
        assert directory.instances(model="other") == []
        assert directory.get(InstanceId("b")) == b
        assert directory.get(InstanceId("c")) is None

        draining = await update_instance_state(discovery, lease_b, b, InstanceState.DRAINING)
        await directory.wait_for(lambda view: not view.instances(role="decode"), 5.0)
        assert directory.instances(role="decode", ready_only=False) == [draining]
        await lease_b.revoke()
        await directory.wait_for(lambda view: view.get(InstanceId("b")) is None, 5.0)
        assert [(ids(list(c.added)), ids(list(c.removed)), ids(list(c.changed))) for c in changes] == [
            (["b"], [], []),
            (["a"], [], []),
            ([], [], ["b"]),
            ([], ["b"], []),
        ]
        later: list[DirectoryChange] = []
        directory.subscribe(later.append)
        assert [ids(list(change.added)) for change in later] == [["a"]]
        unsubscribe()
        await lease_a.revoke()
        await directory.wait_for(lambda view: not view.instances(), 5.0)
        assert len(changes) == 4
        await directory.close()
        await discovery.close()

    run_virtual(main())


def test_what_is_not_an_instance_is_said_once_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        discovery = MemoryDiscovery()
        directory = InstanceDirectory(discovery)
        key = instance_key("VllmWorker", InstanceId("a"))
        await discovery.put(key, b"\xc1 not msgpack")
        await discovery.put(key, msgspec.msgpack.encode({"instance_id": 7}))
        await discovery.put(key, msgspec.msgpack.encode({"instance_id": "a"}).replace(b"\xa1a", b"\xa1\x80"))
        await directory.start()
        await directory.wait_for(lambda view: view.synced, 5.0)
        await discovery.put(key, b"")
        lease = await discovery.grant_lease()
        await register_instance(discovery, lease, info("b"))
        await directory.wait_for(lambda view: ids(view.instances()) == ["b"], 5.0)
        await register_instance(discovery, lease, info("a"))
        await directory.wait_for(lambda view: ids(view.instances()) == ["a", "b"], 5.0)
        await discovery.put(key, b"broken again")
        await directory.wait_for(lambda view: ids(view.instances()) == ["b"], 5.0)
        await directory.close()
        await discovery.close()

    with caplog.at_level(logging.WARNING):
        run_virtual(main())
    complaints = [record for record in caplog.records if record.name == "stator.runtime.directory"]
    assert len(complaints) == 2
    assert all("instances/VllmWorker/a" in record.getMessage() for record in complaints)


def test_a_listener_that_raises_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        discovery = MemoryDiscovery()
        directory = InstanceDirectory(discovery)
        seen: list[DirectoryChange] = []

        def broken(change: DirectoryChange) -> None:
            raise RuntimeError("broken listener")

        directory.subscribe(broken)
        directory.subscribe(seen.append)
        await directory.start()
        await register_instance(discovery, await discovery.grant_lease(), info("a"))
        await directory.wait_for(lambda view: bool(view.instances()), 5.0)
        assert len(seen) == 1
        await directory.close()
        await discovery.close()

    run_virtual(main())
    assert "broken listener" in caplog.text


def test_waiting_gives_up_after_its_timeout() -> None:
    async def main() -> None:
        discovery = MemoryDiscovery()
        directory = InstanceDirectory(discovery)
        await directory.start()
        with pytest.raises(TimeoutError):
            await directory.wait_for(lambda view: bool(view.instances()), 3.0)
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)
        await directory.close()
        await discovery.close()

    run_virtual(main())


def test_the_last_view_stays_while_the_hub_is_away() -> None:
    async def main() -> None:
        world = HubWorld()
        await world.start()
        worker, watcher = await world.connect(), await world.connect()
        directory = InstanceDirectory(watcher.discovery)
        await directory.start()
        lease = await worker.discovery.grant_lease()
        await register_instance(worker.discovery, lease, info("a"))
        await directory.wait_for(lambda view: bool(view.instances()), 5.0)
        changes: list[DirectoryChange] = []
        directory.subscribe(changes.append)
        await world.cut()
        with pytest.raises(TimeoutError):
            await directory.wait_for(lambda view: not view.instances(), 5.0)
        await world.heal()
        with pytest.raises(TimeoutError):
            await directory.wait_for(lambda view: not view.instances(), 30.0)
        assert len(changes) == 1, "the same state again is no change"
        await world.lose()
        await world.heal()
        with pytest.raises(TimeoutError):
            await directory.wait_for(lambda view: not view.instances(), 30.0)
        assert len(changes) == 1, "who registers again at an empty hub was never gone"
        await worker.close()
        await world.lose()
        await world.heal()
        await directory.wait_for(lambda view: not view.instances(), 30.0)
        assert [change.removed for change in changes[1:]] == [(info("a"),)]
        await directory.close()
        await world.close()

    run_virtual(main())
