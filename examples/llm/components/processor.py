"""Turns OpenAI requests into token ids and token ids into text."""

from functools import partial
from random import Random

from components.router import Router
from components.worker import VllmWorker
from stator import processor
from stator.config.models import resolve_model
from stator.graph import ServiceContext, depends, endpoint, on_drain, on_start, on_stop, service
from stator.messages.openai import ChatCompletionRequest, CompletionRequest
from stator.messages.processor import CompletionDelta
from stator.router import LocalRouter
from stator.transport import Call


@service(role="processor", colocate=True)
class Processor:
    router = depends(Router)
    worker = depends(VllmWorker)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        config = context.config
        model_dir = resolve_model(config.model)
        # A graph without a Router still needs somebody to choose the worker: then it is done here.
        self.local_router = None if self.router.linked else self.choose_here(context)
        self.processor = processor.Processor(
            model_names=[config.served_model_name or config.model],
            tokenizer=processor.ModelTokenizer.load(model_dir),
            block_size=config.block_size,
            max_model_len=config.max_model_len or processor.context_length(model_dir),
            client=context.client,
            router=self.local_router.target if self.local_router else partial(self.router.target, "route"),
            rng=Random(),
            settings=processor.ProcessorSettings(migration_limit=config.migration_limit),
            defaults=processor.SamplingDefaults.load(model_dir),
        )

    def choose_here(self, context: ServiceContext) -> LocalRouter:
        return LocalRouter(
            instance_id=context.instance_id,
            server=context.server,
            directory=context.directory,
            config=context.config,
            rng=Random(),
        )

    @endpoint(request=ChatCompletionRequest, item=CompletionDelta)
    def chat(self, call: Call) -> None:
        self.processor.chat(call)

    @endpoint(request=CompletionRequest, item=CompletionDelta)
    def completions(self, call: Call) -> None:
        self.processor.completions(call)

    @on_drain
    async def drain(self) -> None:
        await self.processor.drain()

    @on_stop
    async def stop(self) -> None:
        await self.processor.close()
        if self.local_router:
            self.local_router.close()
