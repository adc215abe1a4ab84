"""A control plane and its clients in one process, for contract suites and tests of what uses discovery and queues.

`MemoryWorld` is memory alone; `HubWorld` is a hub whose clients reach it over a carrier of the request plane, and
which can be cut off, healed and lost.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from stator.core.job_queue import QueueLimits
from stator.core.key_store import KeyStoreLimits
from stator.discovery.base import Discovery
from stator.discovery.hub_client import HubDiscovery
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.hub.server import Hub
from stator.ids import InstanceId
from stator.queue.base import JobQueue
from stator.queue.hub_client import HubQueue
from stator.queue.memory import MemoryQueue
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

NAMESPACE = "test"
TOKEN = "a token for tests"


@dataclass(frozen=True, slots=True)
class WorldLimits:
    """lease_ttl_s: what scenarios ask for. timeout_s: of a client's calls. return_window_s: see discovery.base.
    revisions_outlive_the_state: a server that lost its state goes on with higher ones. lease_end_s: how long a queue
    may take to hear of the end of a lease."""

    lease_ttl_s: float = 10.0
    timeout_s: float = 5.0
    return_window_s: float = 2.0
    revisions_outlive_the_state: bool = True
    lease_end_s: float = 0.0
    queue: QueueLimits = QueueLimits(max_waiting=8, max_dead_letters=4)
    keys: KeyStoreLimits = KeyStoreLimits(max_value_bytes=512 * 1024)


class Party(Protocol):
    """One process's clients of the control plane. Closing it is that process's end: it revokes nothing."""

    @property
    def discovery(self) -> Discovery: ...

    @property
    def queue(self) -> JobQueue: ...

    async def close(self) -> None: ...


class World(Protocol):
    limits: WorldLimits

    async def connect(self, namespace: str = NAMESPACE) -> Party: ...

    async def close(self) -> None: ...


class LosableWorld(World, Protocol):
    """address: what errors must name."""

    @property
    def address(self) -> str: ...

    async def cut(self) -> None:
        """The server cannot be reached; its state lives on."""
        ...

    async def heal(self) -> None: ...

    async def lose(self) -> None:
        """The server is gone with its state; `heal` starts an empty one."""
        ...


@dataclass(slots=True)
class _Party:
    discovery: Discovery
    queue: JobQueue
    finish: Callable[[], Awaitable[None]]

    async def close(self) -> None:
        await self.queue.close()
        await self.discovery.close()
        await self.finish()


class _SharedQueue(MemoryQueue):
    """A MemoryQueue that several parties use: one party's end is not the queue's."""

    async def close(self) -> None:
        pass

    async def close_for_all(self) -> None:
        await super().close()


class MemoryWorld:
    """Everything in memory, shared by the parties of a namespace."""

    def __init__(self, limits: WorldLimits | None = None) -> None:
        self.limits = limits or WorldLimits()
        self._namespaces: dict[str, tuple[MemoryKeyStore, _SharedQueue]] = {}
        self._parties: list[_Party] = []

    async def connect(self, namespace: str = NAMESPACE) -> Party:
        if namespace not in self._namespaces:
            store = MemoryKeyStore(self.limits.keys)
            self._namespaces[namespace] = (store, _SharedQueue(store, self.limits.queue))
        store, queue = self._namespaces[namespace]
        party = _Party(MemoryDiscovery(store), queue, _nothing)
        self._parties.append(party)
        return party

    async def close(self) -> None:
        for party in self._parties:
            await party.close()
        for store, queue in self._namespaces.values():
            await queue.close_for_all()
            store.close()


class HubWorld:
    """A hub reached in process, or with tcp over sockets on loopback; a transport client for each party."""

    def __init__(self, limits: WorldLimits | None = None, *, tcp: bool = False, seed: int = 0) -> None:
        self.limits = limits or WorldLimits()
        self._random = random.Random(seed)
        self._network = InProcessNetwork()
        self._listen = Listen() if tcp else Listen(host=None, inproc_name="hub")
        self._server: RequestPlaneServer | None = None
        self._hub: Hub | None = None
        self._address = ""
        self._parties: list[_Party] = []

    @property
    def address(self) -> str:
        return self._address

    async def start(self) -> None:
        await self.heal()

    async def connect(self, namespace: str = NAMESPACE) -> Party:
        client = RequestPlaneClient(self._identity("party"), network=self._network)
        timeout_s = self.limits.timeout_s
        addresses = (self._address,)
        discovery = HubDiscovery(
            client,
            addresses,
            namespace=namespace,
            timeout_s=timeout_s,
            random_source=self._random,
            return_window_s=self.limits.return_window_s,
            grace_s=self.limits.lease_ttl_s + self.limits.return_window_s,
        )
        queue = HubQueue(client, addresses, namespace=namespace, timeout_s=timeout_s, random_source=self._random)
        party = _Party(discovery, queue, client.close)
        self._parties.append(party)
        return party

    async def cut(self) -> None:
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def heal(self) -> None:
        self._server = RequestPlaneServer(self._identity("hub"), self._listen, network=self._network)
        if self._hub is None:
            self._hub = Hub(
                self._server,
                queue_limits=self.limits.queue,
                key_limits=self.limits.keys,
                random_source=self._random,
            )
        else:
            self._hub.serve_on(self._server)
        await self._server.start()
        self._address = self._server.addresses[0]
        if self._listen.host is not None:
            # The hub comes back where its clients look for it.
            self._listen = Listen(port=int(self._address.rpartition(":")[2]))

    async def lose(self) -> None:
        await self.cut()
        if self._hub is not None:
            await self._hub.close()
            self._hub = None

    async def close(self) -> None:
        for party in self._parties:
            await party.close()
        await self.lose()

    def _identity(self, role: str) -> Identity:
        return Identity(namespace=NAMESPACE, instance_id=InstanceId(f"{role}-1"), role=role, token=TOKEN)


async def _nothing() -> None:
    pass
