"""A hub in this process, and processes of workers as far as operating commands see them."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import msgspec
import pytest

from stator.cli.control import ControlOptions
from stator.cli.drain import DrainOptions, drain
from stator.core.settings import Value
from stator.discovery.base import Lease
from stator.discovery.hub_client import HubDiscovery
from stator.graph.draining import DrainDesk
from stator.hub.server import Hub
from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.messages.instances import DRAIN_ENDPOINT, STATUS_ENDPOINT, DrainPhase, DrainRequest, InstanceInfo
from stator.messages.reports import ReportRequest, WorkerReport
from stator.observability.reporting import Reporter
from stator.runtime.directory import register_instance
from stator.runtime.settings import LiveSettings
from stator.transport.base import Endpoint
from stator.transport.client import RequestPlaneClient
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

HOST = "127.0.0.1"
TOKEN = "a-token-of-the-tests"
LOAD = EngineLoad(
    num_running=3,
    num_waiting=1,
    num_blocks=200,
    num_blocks_used=50,
    num_blocks_held=5,
    prompt_tokens_total=300,
    prompt_tokens_cached_total=100,
    steps_total=7,
)


@dataclass
class Member:
    """A process of one worker, as far as the commands see it. applied: what its settings were changed to."""

    world: "World"
    info: InstanceInfo
    server: RequestPlaneServer
    lease: Lease
    desk: DrainDesk
    settings: LiveSettings
    applied: list[Value]
    changed: asyncio.Event
    outcome: DrainPhase = DrainPhase.DRAINED
    asked: list[DrainRequest] = field(default_factory=list[DrainRequest])
    leaves: bool = True

    def apply(self, value: Value) -> None:
        self.applied.append(value)
        self.changed.set()

    def begin(self, request: DrainRequest) -> None:
        self.asked.append(request)
        self.world.tasks.append(asyncio.ensure_future(self._end(request)))

    async def _end(self, request: DrainRequest) -> None:
        self.desk.show(DrainPhase.DRAINING)
        if not self.leaves:
            self.desk.close()
            return
        self.desk.show(self.outcome)
        await self.lease.revoke()
        await self.server.close()
        if request.restart:
            await self.world.add(f"{self.info.instance_id}-again", self.info.service)


class World:
    def __init__(self, server: RequestPlaneServer, client: RequestPlaneClient) -> None:
        self.server, self.client = server, client
        self.discovery = HubDiscovery(client, server.addresses, namespace="ns")
        self.options = ControlOptions(server.addresses[0].removeprefix("tcp://"), "ns")
        self.members: dict[str, Member] = {}
        self.tasks: list[asyncio.Future[None]] = []
        self.said: list[str] = []

    async def add(
        self,
        name: str,
        service: str = "VllmWorker",
        pid: int = 0,
        host: str = HOST,
        configured: Mapping[str, Value] = {},
    ) -> Member:
        """configured: the settings that it uses, and what they are while they are not set."""
        identity = Identity("ns", InstanceId(name), "decode", TOKEN)
        server = RequestPlaneServer(identity, Listen(host=HOST))
        await server.start()
        lease = await self.discovery.grant_lease()
        endpoints = ("report", DRAIN_ENDPOINT, STATUS_ENDPOINT)
        number = len(self.members)
        info = InstanceInfo(
            InstanceId(name), service, "decode", server.addresses, endpoints, host, pid or 100 + number, model="m"
        )
        settings = LiveSettings(self.discovery, Random(number))
        desk = DrainDesk(
            num_open=lambda: 4, begin=lambda request: member.begin(request), stalls=2, settings=settings.states
        )
        member = self.members[name] = Member(self, info, server, lease, desk, settings, [], asyncio.Event())
        for setting, value in configured.items():
            settings.follow(setting, value, f"{name}.yaml:3", member.apply)
        settings.start()
        for endpoint in desk.endpoints():
            server.register(endpoint)
        server.register(Endpoint("report", ReportRequest, Reporter(lambda: WorkerReport(LOAD)).report))
        await register_instance(self.discovery, lease, info)
        return member

    async def drain(self, name: str, **options: object) -> list[tuple[str, str, int, str | None]]:
        what = msgspec.convert({"name": name, "start_timeout_s": 5.0, **options}, DrainOptions)
        done = await drain(self.options, what, self.said.append)
        return [(one.instance, one.outcome, one.num_ended, one.replacement) for one in done]


@asynccontextmanager
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setenv("STATOR_TOKEN", TOKEN)
    server = RequestPlaneServer(Identity("ns", InstanceId("hub"), "hub", TOKEN), Listen(host=HOST))
    await server.start()
    hub = Hub(server)
    client = RequestPlaneClient(Identity("ns", InstanceId("test"), "client", TOKEN))
    made = World(server, client)
    try:
        async with asyncio.timeout(20):
            yield made
    finally:
        await asyncio.gather(*made.tasks, return_exceptions=True)
        for member in made.members.values():
            await member.settings.close()
            await member.server.close()
        await made.discovery.close()
        await client.close()
        await hub.close()
        await server.close()
