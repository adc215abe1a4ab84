"""Decodes: takes requests from the Processor and streams tokens. Has long prompts prefilled elsewhere if configured."""

from components.prefill_worker import PrefillWorker
from stator import worker
from stator.graph import ServiceContext, depends, endpoint, on_drain, on_start, on_stop, service
from stator.messages.embeddings import Embedding, EmbedRequest
from stator.messages.engine import EngineRequest, PrefillDone, PrefillDoneReply, PrefillTaken, TokenDelta
from stator.messages.kv_events import KvItem, KvSubscribe
from stator.messages.lora import LoadLora, LoraLoaded, LoraUnloaded, UnloadLora
from stator.messages.reports import ReportRequest, WorkerReport
from stator.observability.reporting import Reporter, with_stalls
from stator.transport import Call


@service(role="decode")
class VllmWorker:
    prefill_worker = depends(PrefillWorker)

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
        self.requests = worker.DecodeWorker(
            engine=self.engine,
            info=info,
            host=host,
            policy=worker.disagg_policy(context.config),
            queue=context.queue(worker.prefill_queue(info)),
            directory=context.directory,
            adapters=self.adapters,
        )
        self.requests.follow_settings(context.follow_setting)
        await self.requests.start()
        context.counts_open(lambda: self.requests.num_open)
        self.watchdog = worker.ProgressWatchdog(
            self.engine.load, info, timeout_s=context.config.progress_timeout, on_stall=context.stalled
        )
        self.watchdog.start()
        self.reporter = Reporter(lambda: with_stalls(self.requests.report(), context.stalls))
        self.reporter.start()
        self.kv_publisher = worker.KvPublisher(self.engine)

    @endpoint(request=EngineRequest, item=TokenDelta)
    def generate(self, call: Call) -> None:
        """Tokens of one request, as the engine makes them."""
        self.requests.generate(call)

    @endpoint(request=EmbedRequest, item=Embedding)
    def embed(self, call: Call) -> None:
        """The vector of one input, if the engine makes embeddings."""
        self.requests.embed(call)

    @endpoint(request=PrefillDone, item=PrefillDoneReply)
    def prefill_done(self, call: Call) -> None:
        """A prefill worker has computed a prompt of ours, or could not."""
        self.requests.prefill_done(call)

    @endpoint(request=PrefillTaken)
    def prefill_taken(self, call: Call) -> None:
        """A prefill worker computes a prompt of ours; we end the call if it need not."""
        self.requests.prefill_taken(call)

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
        await self.requests.drain()

    @on_stop
    async def stop(self) -> None:
        self.watchdog.close()
        self.reporter.close()
        await self.kv_publisher.close()
        await self.adapters.close()
        await self.requests.close()
        await self.engine.stop()
