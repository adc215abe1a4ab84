"""How a process leaves: on a signal, on a call, when its engine hangs, after it stood still."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.errors import ErrorCode, StatorError
from stator.graph import ServiceContext, endpoint, on_drain, on_start, on_stop, process, service
from stator.graph.graph import build_graph
from stator.graph.planes import Planes
from stator.graph.process import ServiceProcess
from stator.graph.protocol import ChildSpec, ExitCode, Hung, Leaving, Ready, Report
from stator.ids import InstanceId, RequestId
from stator.messages.instances import (
    DRAIN_ENDPOINT,
    STATUS_ENDPOINT,
    DrainPhase,
    DrainProgress,
    DrainRequest,
    InstanceInfo,
    InstanceState,
    InstanceStatus,
    StatusRequest,
)
from stator.queue.memory import MemoryQueue
from stator.runtime.context import CallContext
from stator.transport import calls
from stator.transport.base import Call, Target
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.settings import Identity


class Nothing(msgspec.Struct, frozen=True):
    pass


class Holder:
    """What the service below shares with the test."""

    context: ServiceContext
    log: list[str]
    open: list[Call]
    finish: asyncio.Event
    stop_hangs: bool


held = Holder()


@service(role="holder")
class Holding:
    """Calls of `hold` stay open until the test finishes them."""

    @on_start
    def start(self, context: ServiceContext) -> None:
        held.context = context
        context.counts_open(lambda: len(held.open))

    @endpoint(request=Nothing, item=Nothing)
    def hold(self, call: Call) -> None:
        held.open.append(call)

    @on_drain
    async def drain(self, context: ServiceContext) -> None:
        held.log.append(f"drain handed_over={context.handed_over}")
        await held.finish.wait()
        for call in held.open:
            call.items([Nothing()])
            call.end()
        held.open.clear()

    @on_stop
    async def stop(self) -> None:
        held.log.append("stop")
        if held.stop_hangs:
            await asyncio.Event().wait()


async def one_iteration() -> None:
    await asyncio.sleep(0)


@dataclass
class World:
    discovery: MemoryDiscovery
    client: RequestPlaneClient
    process: ServiceProcess
    task: "asyncio.Task[ExitCode]"
    reports: list[Report] = field(default_factory=list[Report])

    def info(self) -> InstanceInfo | None:
        found = self.discovery.store.get_prefix("instances/")
        return msgspec.msgpack.decode(found[0].value, type=InstanceInfo) if found else None

    def target(self, name: str) -> Target:
        context = held.context
        return Target(context.server.addresses, name, context.instance_id)

    def drain(self, **request: Any) -> "asyncio.Task[list[DrainProgress]]":
        async def collect() -> list[DrainProgress]:
            found: list[DrainProgress] = []
            stream = calls.stream(
                self.client,
                self.target(DRAIN_ENDPOINT),
                DrainRequest(**request),
                context=CallContext(RequestId("drain")),
                item_type=DrainProgress,
            )
            async for items in stream:
                found += items
            return found

        return asyncio.ensure_future(collect())

    async def status(self) -> InstanceStatus:
        return await calls.call(
            self.client,
            self.target(STATUS_ENDPOINT),
            StatusRequest(),
            context=CallContext(RequestId("status")),
            item_type=InstanceStatus,
        )

    def hold(self) -> "asyncio.Task[Any]":
        return asyncio.ensure_future(
            calls.call(self.client, self.target("hold"), Nothing(), context=CallContext(RequestId("h")))
        )

    async def until(self, done: Any) -> None:
        async with asyncio.timeout(5):
            while not done():
                await one_iteration()


@asynccontextmanager
async def running(clock: Any = None, **changes: Any) -> AsyncIterator[World]:
    held.log, held.open, held.finish, held.stop_hangs = [], [], asyncio.Event(), False
    discovery = MemoryDiscovery(MemoryKeyStore())
    network = InProcessNetwork()
    client = RequestPlaneClient(Identity("ns", InstanceId("test"), "client", None), network=network)
    spec = ChildSpec(
        target="", directory="", services=("Holding",), index=1, namespace="ns", hub=("127.0.0.1", 1), token="secret",
        host="127.0.0.1", advertise="127.0.0.1", sections={}, source="t.yaml",
        supervisor_pid=0, status_fd=0,
    )  # fmt: skip
    spec = msgspec.structs.replace(spec, **changes)
    reports: list[Report] = []
    options: dict[str, Any] = {} if clock is None else {"clock": clock}
    made = ServiceProcess(
        spec,
        build_graph(Holding),
        lambda: Planes(client, network, discovery, lambda name: MemoryQueue(discovery.store, name=name)),
        reports.append,
        **options,
    )
    task = asyncio.ensure_future(made.run())
    world = World(discovery, client, made, task, reports)
    try:
        await world.until(lambda: Ready() in reports or task.done())
        yield world
    finally:
        held.finish.set()
        made.request_stop()
        await asyncio.gather(task, return_exceptions=True)


def run(main: Any) -> None:
    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("restart", [False, True])
def test_a_drain_leaves_discovery_finishes_and_ends_the_process(restart: bool) -> None:
    async def main() -> None:
        async with running() as world:
            held_call = world.hold()
            await world.until(lambda: held.open)
            assert (await world.status()).drain is None
            drained = world.drain(restart=restart)
            await world.until(lambda: held.log)
            info = world.info()
            assert info is not None and info.state is InstanceState.DRAINING
            status = await world.status()
            assert status.num_open == 1
            assert status.drain is not None and status.drain.phase is DrainPhase.DRAINING
            later = world.drain()
            assert not drained.done() and not world.task.done()
            held.finish.set()
            progress = await drained
            assert (progress[0].num_open, progress[-1].num_open) == (1, 0)
            assert [p.phase for p in progress if p.phase.is_last] == [DrainPhase.DRAINED]
            assert progress[-1].restart is restart
            # Whoever asks later watches the same drain.
            assert (await later)[-1].restart is restart
            await held_call
            assert await world.task is (ExitCode.RESTART if restart else ExitCode.DRAINED)
            assert held.log == [f"drain handed_over={restart}", "stop"]
            assert world.info() is None

    run(main)


def test_what_is_left_at_the_end_of_the_time_is_cut_off() -> None:
    async def main() -> None:
        async with running() as world:
            held_call = world.hold()
            await world.until(lambda: held.open)
            progress = await world.drain(timeout_s=0.4)
            assert (progress[-1].phase, progress[-1].num_open) == (DrainPhase.CUT_OFF, 1)
            assert await world.task is ExitCode.DRAINED
            with pytest.raises(StatorError) as caught:
                await held_call
            assert caught.value.info.elsewhere

    run(main)


def test_a_signal_drains_in_the_same_way_within_the_grace() -> None:
    async def main() -> None:
        async with running(grace_s=0.6) as world:
            held_call = world.hold()
            await world.until(lambda: held.open)
            world.process.request_stop()
            with pytest.raises(StatorError):
                await held_call
            assert await world.task is ExitCode.OK
            assert held.log == ["drain handed_over=False", "stop"]

    run(main)


def test_a_signal_shortens_a_long_drain() -> None:
    async def main() -> None:
        async with running(grace_s=0.1) as world:
            held_call = world.hold()
            await world.until(lambda: held.open)
            drained = world.drain(timeout_s=3600.0)
            await world.until(lambda: held.log)
            world.process.request_stop()
            with pytest.raises(StatorError):
                await held_call
            assert (await drained)[-1].phase is DrainPhase.CUT_OFF
            assert await world.task is ExitCode.DRAINED

    run(main)


def test_a_process_that_may_overlap_waits_for_its_successor() -> None:
    async def main() -> None:
        async with running(overlaps=True) as world:
            drained = world.drain(restart=True)
            await world.until(lambda: Leaving() in world.reports)
            info = world.info()
            assert info is not None and info.state is InstanceState.READY and not held.log
            held.finish.set()
            world.process.request_stop()  # What the supervisor does once the successor is ready.
            progress = await drained
            assert progress[0].phase is DrainPhase.SUCCESSOR and progress[-1].phase is DrainPhase.DRAINED
            assert await world.task is ExitCode.RESTART

    run(main)


def test_without_a_successor_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SUCCESSOR_TIMEOUT_S", 0.05)

    async def main() -> None:
        async with running(overlaps=True) as world:
            with pytest.raises(StatorError, match="Holding:1 goes on: what was to take its place") as caught:
                await world.drain(restart=True)
            assert caught.value.code is ErrorCode.DEADLINE
            info = world.info()
            assert info is not None and info.state is InstanceState.READY and not world.task.done()
            # And may be asked again.
            held.finish.set()
            assert (await world.drain())[-1].phase is DrainPhase.DRAINED
            assert await world.task is ExitCode.DRAINED

    run(main)


def test_a_bad_time_is_refused_and_nothing_begins() -> None:
    async def main() -> None:
        async with running() as world:
            with pytest.raises(StatorError, match="timeout_s is -1"):
                await world.drain(timeout_s=-1.0)
            assert (await world.status()).drain is None

    run(main)


def test_a_hung_engine_ends_calls_and_lease_at_once_and_cannot_hold_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "HUNG_STOP_S", 0.2)

    async def main() -> None:
        async with running(stalls=2) as world:
            held.stop_hangs = True
            held_call = world.hold()
            await world.until(lambda: held.open)
            assert (await world.status()).stalls == held.context.stalls == 2
            held.context.stalled("no step for 8 s")
            with pytest.raises(StatorError) as caught:
                await held_call
            assert caught.value.info.elsewhere
            assert world.info() is None
            assert not world.task.done() or held.log == ["stop"]
            assert await world.task is ExitCode.STALLED
            assert world.process.left_behind
            assert Hung("Holding: no step for 8 s") in world.reports
            assert held.log == ["stop"], "nothing is drained"

    run(main)


def test_a_process_that_stood_still_for_a_lease_fences_itself_before_it_sends_anything() -> None:
    async def main() -> None:
        now = 0.0
        async with running(clock=lambda: now) as world:
            held_call = world.hold()
            await world.until(lambda: held.open)
            now = held.context.lease.ttl_s - 0.5
            world.process.resumed()
            assert not world.task.done()
            now += held.context.lease.ttl_s
            world.process.resumed()
            with pytest.raises(StatorError):
                await held_call
            assert await world.task is ExitCode.FENCED
            assert held.log == ["stop"], "nothing is drained"

    run(main)
