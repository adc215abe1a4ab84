"""Chooses the decode worker for each request."""

from components.worker import VllmWorker
from stator import router
from stator.graph import ServiceContext, depends, endpoint, on_start, on_stop, service
from stator.messages.processor import RouteDecision, RouteRequest
from stator.messages.reports import ReportRequest, WorkerReport
from stator.messages.routing import BookingChanges, BookingsRequest, DecisionRecord, DecisionsRequest, RouteObservations
from stator.observability.reporting import Reporter
from stator.transport import Call


@service(role="router", colocate=True)
class Router:
    worker = depends(VllmWorker)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        self.routes = router.Router(
            client=context.client,
            directory=context.directory,
            mode=router.router_mode(context.config.mode),
            min_workers=context.config.min_workers,
            rng=context.rng,
            clocks=context.clocks,
            limits=router.queue_limits(context.config),
            instance_id=context.instance_id,
        )
        self.routes.follow_settings(context.follow_setting, "mode")
        # One that is started again is asked at once, and must not say that there is no worker.
        await context.directory.wait_for(lambda _: True, None)
        self.reporter = Reporter(self.routes.report)
        self.reporter.start()

    @endpoint(request=RouteRequest, item=RouteDecision)
    def route(self, call: Call) -> None:
        """One decision; the call stays open as the booking of the load."""
        self.routes.route(call)

    @endpoint(request=RouteObservations, item=None)
    def observe(self, call: Call) -> None:
        """What became of decisions: cached tokens, lengths, failures."""
        self.routes.observe(call)

    @endpoint(request=BookingsRequest, item=BookingChanges)
    def bookings(self, call: Call) -> None:
        """What this router has sent to workers, and every change, for the routers of other heads."""
        self.routes.bookings(call)

    @endpoint(request=DecisionsRequest, item=DecisionRecord)
    def decisions(self, call: Call) -> None:
        """The last decisions, and why they were made."""
        self.routes.decisions(call)

    @endpoint(request=ReportRequest, item=WorkerReport)
    def report(self, call: Call) -> None:
        """This router's figures, once a second."""
        self.reporter.report(call)

    @on_stop
    async def stop(self) -> None:
        self.reporter.close()
        self.routes.close()
