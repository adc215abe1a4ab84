"""The OpenAI-compatible HTTP address."""

from random import Random

from components.processor import Processor
from stator import frontend
from stator.graph import ServiceContext, depends, on_drain, on_start, on_stop, service
from stator.observability.monitor import WorkerMonitor


@service(role="frontend")
class Frontend:
    processor = depends(Processor)

    @on_start
    async def start(self, context: ServiceContext) -> None: ...
