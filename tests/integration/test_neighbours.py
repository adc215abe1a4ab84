"""A process of one namespace looks into another one of the same control plane, and calls an instance there."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from deployment import run

from stator.config.external import EtcdSettings, ExternalPlanes, NatsSettings
from stator.discovery.base import Lease
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph.hub_node import running_hub
from stator.graph.neighbour import Neighbour
from stator.graph.planes import Planes, external_planes, hub_planes
from stator.graph.token import TOKEN_KEY
from stator.ids import InstanceId, RequestId
from stator.messages.instances import InstanceInfo
from stator.runtime.context import CallContext
from stator.runtime.directory import register_instance
from stator.testing.real_servers import EtcdServer, free_port
from stator.transport import Call, Endpoint, Identity, Listen, RequestPlaneServer, Target, call

TOKEN, THEIR_TOKEN = "ours-0123456789", "theirs-0123456789"


def identity(namespace: str, token: str = TOKEN) -> Identity:
    return Identity(namespace, InstanceId(f"{namespace}-1"), "test", token)


@asynccontextmanager
async def opened(*all_planes: Planes) -> AsyncIterator[None]:
    try:
        for planes in all_planes:
            await planes.start()
        yield
    finally:
        for planes in all_planes:
            await planes.close()


class Instance:
    """One that answers `say` with its name, shown for as long as its lease lives."""

    def __init__(self, name: str, planes: Planes, identity: Identity) -> None:
        self.planes = planes
        self.server = RequestPlaneServer(identity, Listen())
        self.name = InstanceId(name)
        self.server.instance_id = self.name
        self.server.register(Endpoint("say", str, self._say))
        self.lease: Lease | None = None

    def _say(self, said: Call) -> None:
        said.items([f"{said.request}, I am {self.name}"])
        said.end()

    async def __aenter__(self) -> Target:
        await self.server.start()
        self.lease = await self.planes.discovery.grant_lease(2.0)
        info = InstanceInfo(self.name, "P", "processor", self.server.addresses, ("say",), "h", 1, model="m")
        await register_instance(self.planes.discovery, self.lease, info)
        return Target(info.addresses, "say", self.name)

    async def __aexit__(self, *_: object) -> None:
        assert self.lease is not None
        await self.lease.revoke()
        await self.server.close()


async def ask(client: Any, target: Target) -> str:
    return await call(client, target, "hello", context=CallContext(RequestId("r")), item_type=str)


async def seen(neighbour: Neighbour, *names: str) -> None:
    await neighbour.directory.wait_for(lambda d: [i.instance_id for i in d.instances()] == list(names), 5)


async def check(ours: Planes, theirs: Planes, them: Identity) -> None:
    """An instance of the other namespace comes, is called by who looks into it and by nobody else, and goes."""
    neighbour = await ours.neighbour("theirs")
    assert await ours.neighbour("theirs") is neighbour
    await seen(neighbour)
    async with Instance("p1", theirs, them) as target:
        await seen(neighbour, "p1")
        assert await ask(neighbour, target) == "hello, I am p1"
        with pytest.raises(StatorError) as refused:
            await ask(ours.client, target)
        assert refused.value.code is ErrorCode.UNAUTHORIZED
        assert ours.directory.instances() == []
        assert [i.instance_id for i in theirs.directory.instances()] == ["p1"]
    await seen(neighbour)


def test_on_a_hub_that_takes_both() -> None:
    async def scene() -> None:
        async with running_hub("ours", TOKEN, Listen(), ["theirs"]) as port:
            ours, theirs = (hub_planes(identity(name), ("127.0.0.1", port)) for name in ("ours", "theirs"))
            async with opened(ours, theirs):
                await check(ours, theirs, identity("theirs"))

    run(scene)


def test_a_hub_takes_no_namespace_that_it_was_not_told_of() -> None:
    async def scene() -> None:
        async with running_hub("ours", TOKEN, Listen(), ["theirs"]) as port:
            ours = hub_planes(identity("ours"), ("127.0.0.1", port))
            async with opened(ours):
                with pytest.raises(ConfigError, match=r"namespace third: .*list 'third' in Frontend.namespaces"):
                    await ours.neighbour("third")
            guest = hub_planes(identity("theirs", "not the token"), ("127.0.0.1", port))
            async with opened(guest):
                with pytest.raises(StatorError, match="token"):
                    await guest.discovery.get("k")

    run(scene)


def test_a_hub_that_is_away_is_waited_for() -> None:
    async def scene() -> None:
        port = free_port()
        ours, theirs = (hub_planes(identity(name), ("127.0.0.1", port)) for name in ("ours", "theirs"))
        async with opened(ours, theirs):
            neighbour = await ours.neighbour("theirs")
            async with running_hub("ours", TOKEN, Listen(port=port), ["theirs"]):
                async with Instance("p1", theirs, identity("theirs")):
                    await seen(neighbour, "p1")

    run(scene)


@pytest.mark.servers
@pytest.mark.parametrize("token", [TOKEN, THEIR_TOKEN])
def test_on_etcd_the_token_of_a_namespace_that_drew_one_is_read_there(tmp_path: Path, token: str) -> None:
    async def scene() -> None:
        etcd = EtcdServer(tmp_path)
        await etcd.start()
        try:
            external = ExternalPlanes(EtcdSettings((etcd.address,)), NatsSettings(("nats://127.0.0.1:1",)))
            them = identity("theirs", token)
            ours, theirs = external_planes(identity("ours"), external), external_planes(them, external)
            async with opened(ours, theirs):
                if token != TOKEN:
                    await theirs.discovery.put(TOKEN_KEY, token.encode())
                await check(ours, theirs, them)
        finally:
            await etcd.kill()

    run(scene)
