"""The planes as one process holds them: discovery, queues and the request plane's client."""

import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

from stator.config.external import ExternalPlanes
from stator.discovery.base import Discovery
from stator.discovery.hub_client import HubDiscovery
from stator.errors import ConfigError
from stator.graph.neighbour import Neighbour
from stator.hub.client import DEFAULT_TIMEOUT_S
from stator.queue.base import JobQueue
from stator.queue.hub_client import HubQueue
from stator.runtime.directory import InstanceDirectory
from stator.transport.addresses import TcpAddress
from stator.transport.base import TransportClient, TransportServer
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.listening import BindTcp, bind_tcp
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen


class Planes:
    """Owns what it is given and what it opens, from `start` to `close`.

    network: in which client finds colocated services. open_queue: makes the client of one queue. list_queues: see
    queue_names. finish: closes what the queues share. bind: where servers made here get their listening sockets from.
    look_into: another namespace, not started.
    """

    def __init__(
        self,
        client: TransportClient,
        network: InProcessNetwork,
        discovery: Discovery,
        open_queue: Callable[[str], JobQueue],
        *,
        list_queues: Callable[[], Awaitable[list[str]]] | None = None,
        finish: Callable[[], Awaitable[None]] | None = None,
        bind: BindTcp = bind_tcp,
        look_into: Callable[[str], Neighbour] | None = None,
    ) -> None:
        self.client = client
        self.network = network
        self.discovery = discovery
        self.directory = InstanceDirectory(discovery)
        self._open_queue = open_queue
        self._list_queues = list_queues
        self._finish = finish
        self._bind = bind
        self._look_into = look_into
        self._neighbours: dict[str, Neighbour] = {}
        self._queues: dict[str, JobQueue] = {}

    async def start(self) -> None:
        await self.directory.start()

    def queue(self, name: str) -> JobQueue:
        if name not in self._queues:
            self._queues[name] = self._open_queue(name)
        return self._queues[name]

    async def neighbour(self, namespace: str) -> Neighbour:
        """Another namespace of this control plane; the same object for the same name. Closed with the planes.

        Raises ConfigError if it cannot be looked into."""
        if namespace not in self._neighbours:
            if self._look_into is None:
                raise ConfigError(f"namespace {namespace}: this control plane has no others")
            found = self._neighbours[namespace] = self._look_into(namespace)
            await found.start()
        return self._neighbours[namespace]

    async def queue_names(self) -> list[str]:
        """The queues that there are, where no hub tells it. Raises StatorError."""
        return [] if self._list_queues is None else await self._list_queues()

    def server(self, identity: Identity, listen: Listen) -> TransportServer:
        """Not started, and closed by whoever asked for it."""
        return RequestPlaneServer(identity, listen, network=self.network, bind=self._bind)

    async def close(self) -> None:
        for neighbour in self._neighbours.values():
            await neighbour.close()
        await self.directory.close()
        for queue in self._queues.values():
            await queue.close()
        if self._finish is not None:
            await self._finish()
        await self.discovery.close()
        await self.client.close()


def hub_planes(
    identity: Identity, hub: tuple[str, int], *, rng: random.Random | None = None, bind: BindTcp = bind_tcp
) -> Planes:
    """Discovery and queues of the hub at (host, port). Connects on the first use, not here.

    rng: for ids and the jitter of retries, by default the system's. bind: as of Planes.
    """
    network = InProcessNetwork()
    client = RequestPlaneClient(identity, network=network)
    addresses = (str(TcpAddress(*hub)),)
    discovery = HubDiscovery(client, addresses, namespace=identity.namespace, random_source=rng)

    def open_queue(name: str) -> JobQueue:
        return HubQueue(client, addresses, namespace=identity.namespace, name=name, random_source=rng)

    def look_into(namespace: str) -> Neighbour:
        # A hub and all who join it have one token.
        caller = RequestPlaneClient(replace(identity, namespace=namespace))
        watched = HubDiscovery(caller, addresses, namespace=namespace, random_source=rng)
        return Neighbour(namespace, caller, watched)

    return Planes(client, network, discovery, open_queue, bind=bind, look_into=look_into)


def external_planes(identity: Identity, external: ExternalPlanes) -> Planes:
    """Discovery in etcd, queues in NATS. Connects on the first use, not here.

    Raises ConfigError in an engine's environment that lacks their clients.
    """
    # Not above: whoever uses a hub has no need of them, and engines' environments may lack them.
    try:
        from stator.discovery.etcd import EtcdDiscovery
        from stator.queue.nats import nats_queues
        from stator.queue.nats_connection import NatsConnection
        from stator.queue.nats_names import queue_names
    except ImportError as error:
        raise ConfigError(
            f"{sys.executable} lacks {error.name}, which etcd and NATS need: {sys.executable} -m pip install aiohttp "
            f"'nats-py[nkeys]'"
        ) from None
    network = InProcessNetwork()
    client = RequestPlaneClient(identity, network=network)
    discovery = EtcdDiscovery(external.etcd, namespace=identity.namespace)
    connection = NatsConnection(external.nats, timeout_s=DEFAULT_TIMEOUT_S, random_source=random.SystemRandom())
    open_queue = nats_queues(connection, discovery, namespace=identity.namespace, replicas=external.nats.replicas)

    def look_into(namespace: str) -> Neighbour:
        caller = replace(identity, namespace=namespace)
        watched = EtcdDiscovery(external.etcd, namespace=namespace)
        return Neighbour(
            namespace,
            RequestPlaneClient(caller),
            watched,
            lambda token: RequestPlaneClient(replace(caller, token=token)),
        )

    return Planes(
        client,
        network,
        discovery,
        open_queue,
        list_queues=lambda: queue_names(connection, identity.namespace),
        finish=connection.close,
        look_into=look_into,
    )


def open_planes(identity: Identity, hub: tuple[str, int] | None, external: ExternalPlanes | None) -> Planes:
    """Whichever of the two there is."""
    if external is not None:
        return external_planes(identity, external)
    assert hub is not None
    return hub_planes(identity, hub)
