"""The planes as one process holds them: discovery, queues and the request plane's client."""

from collections.abc import Callable

from stator.discovery.base import Discovery
from stator.discovery.hub_client import HubDiscovery
from stator.queue.base import JobQueue
from stator.queue.hub_client import HubQueue
from stator.runtime.directory import InstanceDirectory
from stator.transport.addresses import TcpAddress
from stator.transport.base import TransportClient, TransportServer
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen


class Planes:
    """Owns what it is given and what it opens, from `start` to `close`.

    network: in which client finds colocated services. open_queue: makes the client of one queue.
    """

    def __init__(
        self,
        client: TransportClient,
        network: InProcessNetwork,
        discovery: Discovery,
        open_queue: Callable[[str], JobQueue],
    ) -> None:
        self.client = client
        self.network = network
        self.discovery = discovery
        self.directory = InstanceDirectory(discovery)
        self._open_queue = open_queue
        self._queues: dict[str, JobQueue] = {}

    async def start(self) -> None:
        await self.directory.start()

    def queue(self, name: str) -> JobQueue:
        if name not in self._queues:
            self._queues[name] = self._open_queue(name)
        return self._queues[name]

    def server(self, identity: Identity, listen: Listen) -> TransportServer:
        """Not started, and closed by whoever asked for it."""
        return RequestPlaneServer(identity, listen, network=self.network)

    async def close(self) -> None:
        await self.directory.close()
        for queue in self._queues.values():
            await queue.close()
        await self.discovery.close()
        await self.client.close()


def hub_planes(identity: Identity, hub: tuple[str, int]) -> Planes:
    """Discovery and queues of the hub at (host, port). Connects on the first use, not here."""
    network = InProcessNetwork()
    client = RequestPlaneClient(identity, network=network)
    addresses = (str(TcpAddress(*hub)),)
    discovery = HubDiscovery(client, addresses, namespace=identity.namespace)

    def open_queue(name: str) -> JobQueue:
        return HubQueue(client, addresses, namespace=identity.namespace, name=name)

    return Planes(client, network, discovery, open_queue)
