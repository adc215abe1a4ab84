"""The OpenAI-compatible HTTP address, with the health and the figures of the whole deployment."""

from components.processor import Processor
from stator import frontend
from stator.graph import ServiceContext, depends, endpoint, on_drain, on_start, on_stop, service
from stator.messages.metrics import MetricsSnapshot, SnapshotRequest
from stator.messages.responses import ResponseFound, ResponseLookup
from stator.observability.metrics import Metrics
from stator.observability.monitor import WorkerMonitor
from stator.transport import Call


@service(role="frontend")
class Frontend:
    processor = depends(Processor)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        metrics = Metrics()
        # Models of our own namespace, and of those that the configuration lists.
        self.served = frontend.Namespaces(
            context.namespace,
            directory=context.directory,
            client=context.client,
            targets=self.processor.targets,
            others=await context.neighbours(context.config.namespaces),
            created=int(context.clocks.time()),
        )
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
        self.kept_responses = frontend.SharedResponseKeeper(
            instance_id=context.instance_id, client=context.client, directory=context.directory
        )
        app = frontend.FrontendApp(
            client=self.served.client,
            targets=self.processor.targets,
            models=self.served.models,
            health=self.served.health,
            metrics=metrics,
            scrape=self.copies.scrape,
            rng=context.rng,
            wall=context.clocks.time,
            of_model=self.served.of_model,
            everywhere=self.served.everywhere,
            responses=self.kept_responses,
        )
        self.server = frontend.FrontendServer(
            app, host=context.config.host, port=context.config.port, fd=context.listen_fd
        )
        await self.server.start()
        context.counts_open(lambda: self.server.num_open)
        self.monitors = [
            WorkerMonitor(client=client, directory=directory, sink=metrics.workers, rng=context.rng)
            for client, directory in self.served.sources()
        ]
        context.tasks.spawn(self.report_when_ready(context), "report when ready")

    async def report_when_ready(self, context: ServiceContext) -> None:
        """Tells the user once a request can be finished."""
        model = await self.served.ready()
        host = context.host if context.config.host in ("0.0.0.0", "::") else context.config.host
        context.report_serving(f"http://{host}:{self.server.port}", model)

    @endpoint(request=SnapshotRequest, item=MetricsSnapshot)
    def metrics(self, call: Call) -> None:
        """This process's own figures, for the other processes of this frontend."""
        self.copies.snapshot(call)

    @endpoint(request=ResponseLookup, item=ResponseFound)
    def responses(self, call: Call) -> None:
        """What this process keeps of `/v1/responses`, for the deployment's other frontends."""
        self.kept_responses.answer(call)

    @on_drain
    async def drain(self, context: ServiceContext) -> None:
        if context.handed_over:
            await self.server.hand_over()
        else:
            await self.server.drain()

    @on_stop
    async def stop(self) -> None:
        for monitor in self.monitors:
            monitor.close()
        self.served.close()
        await self.server.stop()
