"""The choice of a worker in a graph without a Router service: made in the Processor's own process."""

from random import Random

from stator.config.schema import ProcessorConfig
from stator.ids import InstanceId
from stator.messages.processor import RouteRequest
from stator.router.router import Router, router_mode
from stator.runtime.directory import InstanceDirectory
from stator.transport.base import Endpoint, Target, TransportServer


class LocalRouter:
    """A Router behind a `route` endpoint of the Processor's own server, so that routing has one way of being called."""

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        server: TransportServer,
        directory: InstanceDirectory,
        config: ProcessorConfig,
        rng: Random,
    ) -> None:
        self._router = Router(directory=directory, mode=router_mode(config.router), min_workers=1, rng=rng)
        server.register(Endpoint("route", RouteRequest, self._router.route))
        self.target = Target(server.addresses, "route", instance_id)

    def close(self) -> None:
        self._router.close()
