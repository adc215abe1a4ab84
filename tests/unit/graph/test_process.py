"""The services of one process on the in-process carrier and discovery in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest

from stator.config.schema import WorkerConfig
from stator.config.tree import parse_yaml
from stator.discovery.memory import MemoryDiscovery
from stator.engines.vllm import version
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph import ServiceContext, depends, endpoint, on_drain, on_start, on_stop, service
from stator.graph.graph import build_graph
from stator.graph.planes import Planes
from stator.graph.process import ServiceProcess
from stator.graph.protocol import Announcing, ChildSpec, ExitCode, Ready, Report, Serving
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo, InstanceState
from stator.messages.lora import LoraAdapter
from stator.queue.memory import MemoryQueue
from stator.transport.base import Call
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.settings import Identity


def later(reports: "asyncio.Queue[Report]") -> Callable[[Report], None]:
    """All but the names of the instances, which every process begins with."""

    def put(report: Report) -> None:
        if not isinstance(report, Announcing):
            reports.put_nowait(report)

    return put


class Word(msgspec.Struct, frozen=True):
    text: str


class NamesConfig(msgspec.Struct, frozen=True, kw_only=True):
    greeting: str = "hello"


log: list[str] = []


@service(role="names", config=NamesConfig)
class Names:
    @on_start
    async def start(self, context: ServiceContext) -> None:
        self.greeting = context.config.greeting
        context.info_fields(model="m")
        log.append("names start")

    @endpoint
    async def greet(self, request: Word) -> Word:
        return Word(f"{self.greeting} {request.text}")

    @endpoint
    async def spell(self, request: Word) -> AsyncIterator[str]:
        for letter in request.text:
            yield letter

    @endpoint(request=Word, item=Word)
    def push(self, call: Call) -> None:
        call.items([call.request, call.request])
        call.end()

    @on_drain
    async def drain(self) -> None:
        log.append("names drain")

    @on_stop
    def stop(self) -> None:
        log.append("names stop")


@service
class Greeter:
    names = depends(Names)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        log.append(f"{await self.names.greet(Word('you'))}")
        self.context = context
        context.tasks.spawn(self.work(), "work")

    async def work(self) -> None:
        letters: list[str] = []
        async for items in self.names.spell(Word("abc")):
            letters.extend(items)
        items: list[Any] = []
        async for batch in self.names.stream("push", Word("x")):
            items.extend(batch)
        log.append("".join(letters) + str(len(items)))
        self.context.report_serving("http://here", "m")

    @on_stop
    async def stop(self) -> None:
        log.append("greeter stop")


Greeter.link(Names)


def make_spec(services: Sequence[str], config: str = "") -> ChildSpec:
    return ChildSpec(
        target="t",
        directory=".",
        services=tuple(services),
        index=1,
        namespace="ns",
        hub=("127.0.0.1", 1),
        token="secret",
        host="127.0.0.1",
        advertise="127.0.0.1",
        sections=parse_yaml(config, "f.yaml").children or {},
        source="f.yaml",
        supervisor_pid=0,
        status_fd=0,
    )


async def run(
    process_spec: ChildSpec, root: type[Any], discovery: MemoryDiscovery, reports: "asyncio.Queue[Report]"
) -> tuple[ServiceProcess, "asyncio.Task[ExitCode]"]:
    def connect() -> Planes:
        network = InProcessNetwork()
        client = RequestPlaneClient(Identity("ns", InstanceId("p"), "", "secret"), network=network)
        return Planes(client, network, discovery, lambda _: MemoryQueue())

    process = ServiceProcess(process_spec, build_graph(root), connect, later(reports))
    return process, asyncio.ensure_future(process.run())


def test_services_start_after_those_they_call_and_stop_before_them() -> None:
    async def main() -> None:
        log.clear()
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        discovery = MemoryDiscovery()
        spec = make_spec(["Greeter", "Names"], "Names: {greeting: hi}")
        process, task = await run(spec, Greeter, discovery, reports)
        got = {type(await reports.get()), type(await reports.get())}
        assert got == {Ready, Serving}
        keys = [e.key for e in await discovery.get_prefix("instances/")]
        assert [k.split("/")[1] for k in keys] == ["Greeter", "Names"]
        process.request_stop()
        assert await task is ExitCode.OK
        assert log == ["names start", "Word(text='hi you')", "abc2", "names drain", "greeter stop", "names stop"]

    asyncio.run(main())


def test_adapters_are_shown_while_an_instance_runs_and_its_state_stays() -> None:
    odd = LoraAdapter("odd", "/x")

    @service
    class Changing:
        @on_start
        async def start(self, context: ServiceContext) -> None:
            self.context = context
            # Before it is announced this only notes them.
            await context.show_adapters((odd,))
            contexts.append(context)

        @on_drain
        async def drain(self) -> None:
            await self.context.show_adapters(())
            drained.extend(await shown())

    contexts: list[ServiceContext] = []
    drained: list[InstanceInfo] = []

    async def shown() -> list[InstanceInfo]:
        entries = await contexts[0].discovery.get_prefix("instances/")
        return [msgspec.msgpack.decode(entry.value, type=InstanceInfo) for entry in entries]

    async def main() -> None:
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        process, task = await run(make_spec(["Changing"]), Changing, MemoryDiscovery(), reports)
        assert await reports.get() == Ready()
        (first,) = await shown()
        assert (first.state, first.adapter("odd"), first.adapter("even")) == (InstanceState.READY, odd, None)
        await contexts[0].show_adapters((LoraAdapter("even", "/y"),))
        (then,) = await shown()
        assert then == msgspec.structs.replace(first, adapters=(LoraAdapter("even", "/y"),))
        process.request_stop()
        assert await task is ExitCode.OK
        assert [(info.state, info.adapters) for info in drained] == [(InstanceState.DRAINING, ())]

    asyncio.run(main())


def test_a_lost_lease_ends_the_process_without_draining() -> None:
    async def main() -> None:
        log.clear()
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        discovery = MemoryDiscovery()
        _, task = await run(make_spec(["Names"]), Names, discovery, reports)
        assert await reports.get() == Ready()
        (entry,) = await discovery.get_prefix("instances/")
        assert entry.lease_id is not None
        discovery.store.revoke(entry.lease_id)
        assert await task is ExitCode.FENCED
        assert log == ["names start", "names stop"]

    asyncio.run(main())


def test_a_failing_start_closes_what_was_started() -> None:
    @service
    class Broken:
        names = depends(Names)

        @on_start
        async def start(self) -> None:
            raise ConfigError("no such model")

    Broken.link(Names)

    async def main() -> None:
        log.clear()
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        _, task = await run(make_spec(["Broken", "Names"]), Broken, MemoryDiscovery(), reports)
        with pytest.raises(ConfigError, match="no such model"):
            await task
        assert log == ["names start", "names stop"]
        assert reports.empty()

    asyncio.run(main())


def test_a_service_that_fails_leaves_with_a_failure() -> None:
    @service
    class Dying:
        @on_start
        async def start(self, context: ServiceContext) -> None:
            context.fail("engine is dead")

    async def main() -> None:
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        _, task = await run(make_spec(["Dying"]), Dying, MemoryDiscovery(), reports)
        assert await task is ExitCode.FAILURE

    asyncio.run(main())


def test_what_was_left_alone_by_others_leaves_without_a_failure() -> None:
    @service
    class Left:
        @on_start
        async def start(self, context: ServiceContext) -> None:
            context.leave("the first node has ended")

    async def main() -> None:
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        _, task = await run(make_spec(["Left"]), Left, MemoryDiscovery(), reports)
        assert await task is ExitCode.FENCED

    asyncio.run(main())


def test_a_process_that_works_for_another_instance_is_ready_but_not_announced() -> None:
    @service
    class Further:
        @on_start
        async def start(self, context: ServiceContext) -> None:
            log.append(context.join_command)
            context.follow(self.finish)

        async def finish(self) -> None:
            log.append("finish")

        @endpoint
        async def greet(self, request: Word) -> Word:
            return request

        @on_drain
        async def drain(self) -> None:
            log.append("drain")

        @on_stop
        async def stop(self) -> None:
            log.append("stop")

    async def main() -> None:
        log.clear()
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        discovery = MemoryDiscovery()
        process, task = await run(make_spec(["Further"]), Further, discovery, reports)
        assert await reports.get() == Ready()
        assert not await discovery.get_prefix("instances/")
        process.request_stop()
        assert await task is ExitCode.OK
        (command, *did) = log
        assert command.endswith("Further' --join 127.0.0.1:1 --namespace ns") and did == ["finish"]

    asyncio.run(main())


def test_no_instance_is_an_error_at_the_sink_and_in_a_call() -> None:
    ended: list[StatorError | None] = []

    class Sink:
        def items(self, items: Sequence[Any], /) -> None:
            raise AssertionError("no items were expected")

        def end(self, error: StatorError | None = None, /) -> None:
            ended.append(error)

    @service
    class Lonely:
        names = depends(Names)

        @on_start
        async def start(self, context: ServiceContext) -> None:
            assert self.names.linked and self.names.targets("greet") == []
            self.names.open("greet", Word("x"), Sink())
            assert not ended
            with pytest.raises(StatorError, match="no instance of Names") as caught:
                await self.names.greet(Word("x"))
            assert caught.value.code is ErrorCode.NO_INSTANCE
            with pytest.raises(AttributeError, match="no endpoint 'great' .it has greet, push, spell"):
                _ = self.names.great
            await asyncio.sleep(0)
            context.fail("done")

    async def main() -> None:
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        _, task = await run(make_spec(["Lonely"]), Lonely, MemoryDiscovery(), reports)
        assert await task is ExitCode.FAILURE
        assert [e.code for e in ended if e] == [ErrorCode.NO_INSTANCE]

    asyncio.run(main())


class EngineConfig(WorkerConfig, frozen=True, kw_only=True):
    """A section with an engine."""


@service(role="engine", config=EngineConfig)
class EngineWorker:
    pass


@pytest.mark.parametrize(
    ("installed", "allowed", "said"),
    [
        ("0.33.0", False, "vLLM 0.33.0 is installed, and this version of Stator was tested with"),
        ("0.33.0", True, None),
        ("0.32.0+cpu", False, None),
        (None, True, "vLLM is not installed here"),
    ],
)
def test_an_engine_that_does_not_suit_stops_its_process_before_it_connects(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, allowed: bool, said: str | None
) -> None:
    monkeypatch.setattr(version, "installed_version", lambda: installed)
    spec = make_spec(["EngineWorker"], "EngineWorker: {model: m, engine: vllm}")
    spec = msgspec.structs.replace(spec, allow_untested_engine=allowed)

    async def main() -> None:
        reports: asyncio.Queue[Report] = asyncio.Queue(16)
        discovery = MemoryDiscovery()
        process, task = await run(spec, EngineWorker, discovery, reports)
        if said is not None:
            with pytest.raises(ConfigError, match=said):
                await task
            assert not await discovery.get_prefix("instances/")
            return
        assert await reports.get() == Ready()
        process.request_stop()
        assert await task is ExitCode.OK

    asyncio.run(main())
