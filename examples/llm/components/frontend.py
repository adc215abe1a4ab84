"""The OpenAI-compatible HTTP address, with the health and the figures of the whole deployment."""

from components.processor import Processor
from stator import frontend
from stator.graph import ServiceContext, depends, endpoint, on_drain, on_start, on_stop, service
from stator.messages.metrics import MetricsSnapshot, SnapshotRequest
from stator.observability.metrics import Metrics
from stator.observability.monitor import WorkerMonitor
from stator.transport import Call


@service(role="frontend")
class Frontend:
    processor = depends(Processor)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        started, instances = int(context.clocks.time()), context.directory.instances
        metrics = Metrics()
        # With ServiceArgs.workers above 1 this is one of several processes on one listening socket.
        self.copies = frontend.FrontendCopies(
            instance_id=context.instance_id,
            client=context.client,
            server=context.server,
            directory=context.directory,
            metrics=metrics,
            process=context.process,
            copies=context.copies,
        )
        app = frontend.FrontendApp(
            client=context.client,
            targets=self.processor.targets,
            models=lambda: frontend.models_of(instances(), started),
            health=lambda: frontend.health_of(instances()),
            metrics=metrics,
            scrape=self.copies.scrape,
            rng=context.rng,
            wall=context.clocks.time,
        )
        self.server = frontend.FrontendServer(
            app, host=context.config.host, port=context.config.port, fd=context.listen_fd
        )
        await self.server.start()
        context.counts_open(lambda: self.server.num_open)
        self.monitor = WorkerMonitor(
            client=context.client, directory=context.directory, sink=metrics.workers, rng=context.rng
        )
        context.tasks.spawn(self.report_when_ready(context), "report when ready")

    async def report_when_ready(self, context: ServiceContext) -> None:
        """Tells the user once a request can be finished."""
        directory = context.directory
        await directory.wait_for(lambda d: frontend.health_of(d.instances()).ready, None)
        model = next(i.model for i in directory.instances(role="decode") if i.model)
        host = context.host if context.config.host in ("0.0.0.0", "::") else context.config.host
        context.report_serving(f"http://{host}:{self.server.port}", model)

    @endpoint(request=SnapshotRequest, item=MetricsSnapshot)
    def metrics(self, call: Call) -> None:
        """This process's own figures, for the other processes of this frontend."""
        self.copies.snapshot(call)

    @on_drain
    async def drain(self, context: ServiceContext) -> None:
        if context.handed_over:
            await self.server.hand_over()
        else:
            await self.server.drain()

    @on_stop
    async def stop(self) -> None:
        self.monitor.close()
        await self.server.stop()
