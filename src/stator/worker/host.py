"""What a worker lends its engine (engines.base.EngineHost), on the request plane of the worker's process."""

import logging
from collections.abc import Callable

from stator.engines.base import NodePlace
from stator.ids import InstanceId
from stator.transport.base import Endpoint, TransportClient, TransportServer
from stator.transport.settings import Identity

logger = logging.getLogger(__name__)


class WorkerHost:
    """on_dead is called at most once, with the engine's reason. place: of an engine over several nodes."""

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        client: TransportClient,
        server: TransportServer,
        on_dead: Callable[[str], None],
    ) -> None:
        self.instance_id = instance_id
        self.client = client
        self.place: NodePlace | None = None
        self._server = server
        self._on_dead: Callable[[str], None] | None = on_dead

    @property
    def identity(self) -> Identity:
        return self._server.identity

    @property
    def addresses(self) -> tuple[str, ...]:
        """Those that another process can use: they travel to peers."""
        return tuple(a for a in self._server.addresses if not a.startswith("inproc://"))

    def register(self, endpoint: Endpoint) -> None:
        self._server.register(endpoint)

    def on_dead(self, reason: str) -> None:
        callback, self._on_dead = self._on_dead, None
        if callback is not None:
            if (place := self.place) is not None:
                hosts = ", ".join(place.hosts)
                reason += f" (node {place.rank} of {place.num_nodes}: {hosts}; the cause may be on another of them)"
            logger.error("the engine of %s is dead: %s", self.instance_id, reason)
            callback(reason)
