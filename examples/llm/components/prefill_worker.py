"""Computes the KV cache of long prompts for the decode workers. Start as many as you like, on any node, at any time."""

from stator import worker
from stator.graph import ServiceContext, endpoint, on_drain, on_start, on_stop, service
from stator.messages.kv_events import KvItem, KvSubscribe
from stator.messages.lora import LoadLora, LoraLoaded, LoraUnloaded, UnloadLora
from stator.messages.reports import ReportRequest, WorkerReport
from stator.observability.reporting import Reporter, with_stalls
from stator.transport import Call


@service(role="prefill")
class PrefillWorker:
    @on_start
    async def start(self, context: ServiceContext) -> None:
        self.engine = worker.make_engine(context.config, context.rng)
        host = worker.WorkerHost(
            instance_id=context.instance_id, client=context.client, server=context.server, on_dead=context.fail
        )
        info = await worker.start_engine(self.engine, context.config, host, context)
        if info is None:
            return  # A further node of an engine over several: its first node takes the requests.
        context.info_fields(model=info.model, engine=info)
        self.adapters = worker.WorkerAdapters(
            engine=self.engine,
            info=info,
            instance_id=context.instance_id,
            directory=context.directory,
            show=context.show_adapters,
        )
        await context.show_adapters(self.adapters.shown)
        self.jobs = worker.PrefillWorker(
            engine=self.engine,
            info=info,
            host=host,
            queue=context.queue(worker.prefill_queue(info)),
            lease=context.lease,
            rng=context.rng,
            adapters=self.adapters,
        )
        await self.jobs.start()
        context.counts_open(lambda: self.jobs.num_open)
        self.watchdog = worker.ProgressWatchdog(
            self.engine.load, info, timeout_s=context.config.progress_timeout, on_stall=context.stalled
        )
        self.watchdog.start()
        self.reporter = Reporter(lambda: with_stalls(self.jobs.report(), context.stalls))
        self.reporter.start()
        self.kv_publisher = worker.KvPublisher(self.engine)

    @endpoint(request=ReportRequest, item=WorkerReport)
    def report(self, call: Call) -> None:
        """This worker's figures, once a second."""
        self.reporter.report(call)

    @endpoint(request=KvSubscribe, item=KvItem)
    def kv_events(self, call: Call) -> None:
        """The KV blocks this worker holds, and every change, for routers."""
        self.kv_publisher.kv_events(call)

    @endpoint
    async def load_lora(self, request: LoadLora) -> LoraLoaded:
        """Load a LoRA adapter while this worker runs: `stator lora load`."""
        return await self.adapters.load(request)

    @endpoint
    async def unload_lora(self, request: UnloadLora) -> LoraUnloaded:
        """Let an adapter's requests finish, and drop it."""
        return await self.adapters.unload(request)

    @on_drain
    async def drain(self) -> None:
        await self.jobs.drain()

    @on_stop
    async def stop(self) -> None:
        self.watchdog.close()
        self.reporter.close()
        await self.kv_publisher.close()
        await self.adapters.close()
        await self.jobs.close()
        await self.engine.stop()
