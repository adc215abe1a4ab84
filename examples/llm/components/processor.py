"""Turns OpenAI requests into token ids and token ids into text."""

from components.router import Router
from components.worker import VllmWorker
from stator import processor, router
from stator.graph import ServiceContext, depends, endpoint, on_start, on_stop, service
from stator.messages.openai import ChatCompletionRequest, CompletionRequest
from stator.messages.processor import CompletionDelta
from stator.transport import Call


@service(role="processor", colocate=True)
class Processor:
    router = depends(Router)
    worker = depends(VllmWorker)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        # A graph without a Router still needs a choice of worker: one is then made here, in turn or as configured.
        self.routes = route_target(self.router, context)
        self.completions = Completions.load(context.config, client=context.client, router=self.routes.target)

    @endpoint(request=ChatCompletionRequest, item=CompletionDelta)
    def chat(self, call: Call) -> None:
        self.completions.chat(call)

    @endpoint(request=CompletionRequest, item=CompletionDelta)
    def completions(self, call: Call) -> None:
        self.completions.completions(call)

    @on_stop
    async def stop(self) -> None:
        self.routes.close()
