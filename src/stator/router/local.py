"""The router of a Processor: its own, in a graph without a Router service, or the linked one."""

from collections.abc import Callable
from random import Random

from stator.config.schema import ProcessorConfig
from stator.errors import StatorError
from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.messages.processor import RouteRequest
from stator.messages.reports import WorkerReport
from stator.messages.routing import DecisionRecord, RouteObservations
from stator.router.router import Router, queue_limits, router_mode
from stator.runtime.directory import InstanceDirectory
from stator.runtime.settings import FollowSetting
from stator.transport.base import Call, Endpoint, Target, TransportClient, TransportServer


class LocalRouter:
    """A Router behind endpoints of the Processor's own server, so that routing has one way of being called.

    follow: see Router.follow_settings."""

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        client: TransportClient,
        server: TransportServer,
        directory: InstanceDirectory,
        config: ProcessorConfig,
        rng: Random,
        follow: FollowSetting | None = None,
    ) -> None:
        self._router = Router(
            client=client,
            directory=directory,
            mode=router_mode(config.router),
            min_workers=1,
            rng=rng,
            limits=queue_limits(config),
        )
        if follow is not None:
            self._router.follow_settings(follow, "router")
        server.register(Endpoint("route", RouteRequest, self._router.route))
        server.register(Endpoint("observe", RouteObservations, self._router.observe))
        self.target = Target(server.addresses, "route", instance_id)

    def decisions(self, call: Call) -> None:
        """As Router.decisions."""
        self._router.decisions(call)

    def report(self) -> WorkerReport:
        return self._router.report()

    def close(self) -> None:
        self._router.close()


class LinkedRouter:
    """A Router service, with the interface of a LocalRouter. find: its target for an endpoint; raises StatorError."""

    def __init__(self, client: TransportClient, find: Callable[[str], Target]) -> None:
        self._client = client
        self._find = find

    def target(self) -> Target:
        return self._find("route")

    def decisions(self, call: Call) -> None:
        """Answers with what the router has."""
        try:
            where = self._find("decisions")
        except StatorError as error:
            call.end(error)
            return
        handle = self._client.open(where, call.request, call, context=call.context, item_type=DecisionRecord)
        call.on_cancel(handle.cancel)

    def report(self) -> WorkerReport:
        """Nothing: the Router reports itself."""
        return WorkerReport(EngineLoad())

    def close(self) -> None:
        pass
