"""Turns OpenAI requests into token ids and token ids into text."""

from components.router import Router
from components.worker import VllmWorker
from stator import processor
from stator.config.hub import Needs, resolve_async
from stator.graph import ServiceContext, depends, endpoint, on_drain, on_start, on_stop, service
from stator.messages.embeddings import Embedding, EmbeddingsRequest
from stator.messages.openai import ChatCompletionRequest, CompletionRequest
from stator.messages.processor import CompletionDelta
from stator.messages.reports import ReportRequest, WorkerReport
from stator.messages.routing import DecisionRecord, DecisionsRequest
from stator.messages.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from stator.observability.reporting import Reporter
from stator.router import LinkedRouter, LocalRouter
from stator.transport import Call


@service(role="processor", colocate=True)
class Processor:
    router = depends(Router)
    worker = depends(VllmWorker)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        config = context.config
        # A model on the hub may have to be downloaded first; of it only the small files are needed here.
        model_dir = (await resolve_async(config.model, config.revision, needs=Needs.TOKENIZER)).directory
        name = config.served_model_name or config.model
        context.info_fields(model=name)
        # A graph without a Router still needs somebody to choose the worker: then it is done here.
        self.routes = LinkedRouter(context.client, self.router.target) if self.router.linked else choose_here(context)
        self.processor = processor.Processor(
            model_names=[name],
            tokenizer=processor.ModelTokenizer.load(model_dir),
            block_size=config.block_size,
            max_model_len=config.max_model_len or processor.context_length(model_dir),
            client=context.client,
            router=self.routes.target,
            rng=context.rng,
            directory=context.directory,
            settings=processor.ProcessorSettings(
                migration_limit=config.migration_limit,
                migration_wait_s=config.migration_wait_s,
                tool_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser,
                model_type=processor.model_type(model_dir),
            ),
            defaults=processor.SamplingDefaults.load(model_dir),
        )
        context.counts_open(lambda: self.processor.num_open)
        self.reporter = Reporter(self.routes.report)
        self.reporter.start()

    @endpoint(request=ChatCompletionRequest, item=CompletionDelta)
    def chat(self, call: Call) -> None:
        self.processor.chat(call)

    @endpoint(request=CompletionRequest, item=CompletionDelta)
    def completions(self, call: Call) -> None:
        self.processor.completions(call)

    @endpoint(request=ChatCompletionRequest, item=CompletionDelta)
    def count_tokens(self, call: Call) -> None:
        """The length of a prompt, which no worker is asked for."""
        self.processor.count_tokens(call)

    @endpoint(request=TokenizeRequest, item=Tokenized)
    def tokenize(self, call: Call) -> None:
        self.processor.tokenize(call)

    @endpoint(request=DetokenizeRequest, item=Detokenized)
    def detokenize(self, call: Call) -> None:
        self.processor.detokenize(call)

    @endpoint(request=EmbeddingsRequest, item=Embedding)
    def embeddings(self, call: Call) -> None:
        self.processor.embeddings(call)

    @endpoint(request=DecisionsRequest, item=DecisionRecord)
    def decisions(self, call: Call) -> None:
        """The last decisions of the router that this Processor asks, and why they were made."""
        self.routes.decisions(call)

    @endpoint(request=ReportRequest, item=WorkerReport)
    def report(self, call: Call) -> None:
        """The figures of the router here, if there is one, once a second."""
        self.reporter.report(call)

    @on_drain
    async def drain(self) -> None:
        await self.processor.drain()

    @on_stop
    async def stop(self) -> None:
        self.reporter.close()
        await self.processor.close()
        self.routes.close()


def choose_here(context: ServiceContext) -> LocalRouter:
    return LocalRouter(
        instance_id=context.instance_id,
        client=context.client,
        server=context.server,
        directory=context.directory,
        config=context.config,
        rng=context.rng,
        follow=context.follow_setting,
    )
