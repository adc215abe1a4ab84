"""Chooses the decode worker for each request."""

from random import Random

from components.worker import VllmWorker
from stator import router
from stator.graph import ServiceContext, depends, endpoint, on_start, on_stop, service
from stator.messages.processor import RouteDecision, RouteRequest
from stator.transport import Call


@service(role="router", colocate=True)
class Router:
    worker = depends(VllmWorker)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        self.routes = router.Router(
            directory=context.directory,
            mode=router.router_mode(context.config.mode),
            min_workers=context.config.min_workers,
            rng=Random(),
        )

    @endpoint(request=RouteRequest, item=RouteDecision)
    def route(self, call: Call) -> None:
        """One decision; the call stays open as the booking of the load."""
        self.routes.route(call)

    @on_stop
    async def stop(self) -> None:
        self.routes.close()
