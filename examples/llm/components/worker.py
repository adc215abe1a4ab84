"""Decodes: takes requests from the Processor and streams tokens. Has long prompts prefilled elsewhere if configured."""

from components.prefill_worker import PrefillWorker
from stator import worker
from stator.graph import ServiceContext, depends, endpoint, on_drain, on_start, on_stop, service
from stator.messages.engine import EngineRequest, PrefillDone, PrefillDoneReply, TokenDelta
from stator.messages.kv_events import KvItem, KvSubscribe
from stator.messages.reports import ReportRequest, WorkerReport
from stator.observability.reporting import Reporter
from stator.transport import Call


@service(role="decode")
class VllmWorker:
    prefill_worker = depends(PrefillWorker)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        self.engine = worker.make_engine(context.config)
        host = worker.WorkerHost(
            instance_id=context.instance_id, client=context.client, server=context.server, on_dead=context.fail
        )
        info = await worker.start_engine(self.engine, context.config, host, context)
        if info is None:
            return  # A further node of an engine over several: its first node takes the requests.
        context.info_fields(model=info.model, engine=info)
        self.requests = worker.DecodeWorker(
            engine=self.engine,
            info=info,
            host=host,
            policy=worker.disagg_policy(context.config),
            queue=context.queue(worker.prefill_queue(info)),
            directory=context.directory,
        )
        await self.requests.start()
        self.reporter = Reporter(self.requests.report)
        self.reporter.start()
        self.kv_publisher = worker.KvPublisher(self.engine)

    @endpoint(request=EngineRequest, item=TokenDelta)
    def generate(self, call: Call) -> None:
        """Tokens of one request, as the engine makes them."""
        self.requests.generate(call)

    @endpoint(request=PrefillDone, item=PrefillDoneReply)
    def prefill_done(self, call: Call) -> None:
        """A prefill worker has computed a prompt of ours, or could not."""
        self.requests.prefill_done(call)

    @endpoint(request=ReportRequest, item=WorkerReport)
    def report(self, call: Call) -> None:
        """This worker's figures, once a second."""
        self.reporter.report(call)

    @endpoint(request=KvSubscribe, item=KvItem)
    def kv_events(self, call: Call) -> None:
        """The KV blocks this worker holds, and every change, for routers."""
        self.kv_publisher.kv_events(call)

    @on_drain
    async def drain(self) -> None:
        await self.requests.drain()

    @on_stop
    async def stop(self) -> None:
        self.reporter.close()
        await self.kv_publisher.close()
        await self.requests.close()
        await self.engine.stop()
