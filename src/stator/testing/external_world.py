"""Real etcd and NATS as the control plane of contract suites, reached through proxies that can be cut."""

import random
from pathlib import Path
from typing import NoReturn

from stator.config.external import EtcdSettings, NatsSettings
from stator.discovery.etcd import EtcdDiscovery
from stator.queue.nats import NatsQueue
from stator.queue.nats_connection import NatsConnection
from stator.testing.hub_world import NAMESPACE, Party, WorldLimits
from stator.testing.real_servers import EtcdServer, NatsServer
from stator.testing.tcp_proxy import TcpProxy


class EtcdParty:
    """A party without a queue."""

    def __init__(self, discovery: EtcdDiscovery) -> None:
        self.discovery = discovery

    @property
    def queue(self) -> NoReturn:
        raise NotImplementedError("this world has no queue")

    async def close(self) -> None:
        await self.discovery.close()


class EtcdWorld:
    """One member whose data is in directory. A `hub_world.LosableWorld`, but for the parties' queue."""

    def __init__(self, directory: Path, limits: WorldLimits, *, seed: int = 0) -> None:
        self.limits = limits
        self.server = EtcdServer(directory / "etcd")
        self._random = random.Random(seed)
        self._proxy = TcpProxy("127.0.0.1", self.server.port)
        self._parties: list[EtcdParty] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._proxy.port}"

    @property
    def settings(self) -> EtcdSettings:
        return EtcdSettings((self.address,))

    async def start(self) -> None:
        await self.server.start()
        await self._proxy.start()

    def discovery(self, namespace: str = NAMESPACE) -> EtcdDiscovery:
        return EtcdDiscovery(
            self.settings,
            namespace=namespace,
            timeout_s=self.limits.timeout_s,
            random_source=self._random,
            return_window_s=self.limits.return_window_s,
            grace_s=self.limits.lease_ttl_s + self.limits.return_window_s,
            limits=self.limits.keys,
            probe_s=1.0,
        )

    async def connect(self, namespace: str = NAMESPACE) -> Party:
        party = EtcdParty(self.discovery(namespace))
        self._parties.append(party)
        return party

    async def cut(self) -> None:
        await self._proxy.cut()

    async def heal(self) -> None:
        if self.server.process is None:
            await self.server.start()
        await self._proxy.start()

    async def lose(self) -> None:
        await self.cut()
        await self.server.wipe()

    async def close(self) -> None:
        for party in self._parties:
            await party.close()
        await self._proxy.close()
        await self.server.kill()


class NatsParty:
    def __init__(self, discovery: EtcdDiscovery, queue: NatsQueue, connection: NatsConnection) -> None:
        self.discovery = discovery
        self.queue = queue
        self._connection = connection

    async def close(self) -> None:
        await self.queue.close()
        await self._connection.close()
        await self.discovery.close()


class NatsWorld:
    """Queues in NATS, leases in etcd. What is cut, healed and lost is NATS."""

    def __init__(self, directory: Path, limits: WorldLimits, *, seed: int = 0) -> None:
        self.limits = limits
        self.etcd = EtcdWorld(directory, limits, seed=seed)
        self.server = NatsServer(directory / "nats")
        self._random = random.Random(seed + 1)
        self._proxy = TcpProxy("127.0.0.1", self.server.port)
        self._parties: list[NatsParty] = []

    @property
    def address(self) -> str:
        return f"nats://127.0.0.1:{self._proxy.port}"

    async def start(self) -> None:
        await self.etcd.start()
        await self.server.start()
        await self._proxy.start()

    async def connect(self, namespace: str = NAMESPACE) -> Party:
        discovery = self.etcd.discovery(namespace)
        timeout_s = self.limits.timeout_s
        connection = NatsConnection(NatsSettings((self.address,)), timeout_s=timeout_s, random_source=self._random)
        queue = NatsQueue(
            connection,
            discovery,
            namespace=namespace,
            timeout_s=timeout_s,
            random_source=self._random,
            limits=self.limits.queue,
        )
        party = NatsParty(discovery, queue, connection)
        self._parties.append(party)
        return party

    async def cut(self) -> None:
        await self._proxy.cut()

    async def heal(self) -> None:
        if self.server.process is None:
            await self.server.start()
        await self._proxy.start()

    async def lose(self) -> None:
        await self.cut()
        await self.server.wipe()

    async def close(self) -> None:
        for party in self._parties:
            await party.close()
        await self._proxy.close()
        await self.server.kill()
        await self.etcd.close()
