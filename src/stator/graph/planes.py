"""The planes as one process holds them: discovery, queues and the request plane's client."""

from collections.abc import Callable

from stator.discovery.base import Discovery
from stator.queue.base import JobQueue
from stator.runtime.directory import InstanceDirectory
from stator.transport.base import TransportClient, TransportServer
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen


class Planes:
    """Owns what it is given and what it opens, from `start` to `close`.

    identity: who this process is when it calls others. open_queue: makes the client of one queue.
    """

    def __init__(self, identity: Identity, discovery: Discovery, open_queue: Callable[[str], JobQueue]) -> None:
        self.discovery = discovery
        self.directory = InstanceDirectory(discovery)
        self.network = InProcessNetwork()
        self.client: TransportClient = RequestPlaneClient(identity, network=self.network)
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
        await self.client.close()
        await self.directory.close()
        for queue in self._queues.values():
            await queue.close()
        await self.discovery.close()
