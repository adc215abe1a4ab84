"""One running service: its object, its server, its hooks."""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.graph.context import ServiceContext
from stator.graph.service import EndpointSpec, EndpointStyle, ServiceSpec
from stator.messages.instances import DRAIN_ENDPOINT, STATUS_ENDPOINT, InstanceState
from stator.runtime.context import CallContext
from stator.runtime.directory import register_instance
from stator.transport import calls
from stator.transport.base import Endpoint

logger = logging.getLogger(__name__)


class RunningService:
    """Hooks of one instance in their order; nothing here decides when."""

    def __init__(
        self, spec: ServiceSpec, context: ServiceContext, instance: object, call_tasks: calls.CallTasks
    ) -> None:
        self.spec = spec
        self.context = context
        self.instance = instance
        self._call_tasks = call_tasks
        self._started = False
        self._announced: tuple[InstanceState, int] | None = None
        self._announcing = asyncio.Lock()
        context.announce_again = self._announce_again

    async def start(self) -> None:
        """Run the on_start hooks, then take calls. Raises what a hook raises."""
        for hook in self.spec.start_hooks:
            await self._run(hook)
        if self.context.stop_following is not None:
            return
        self._started = True
        for endpoint in self.spec.endpoints:
            self.context.server.register(self._endpoint(endpoint))

    def _endpoint(self, spec: EndpointSpec) -> Endpoint:
        method = getattr(self.instance, spec.attribute)
        if spec.style is EndpointStyle.PUSH:
            return Endpoint(spec.name, spec.request_type, method)
        function = method if spec.takes_context else _without_context(method, spec.style)
        return self._call_tasks.endpoint(spec.name, spec.request_type, function)

    async def announce(self, state: InstanceState, pid: int) -> None:
        """Put this instance into discovery, or change its state there. Not one that works for another."""
        context = self.context
        if context.stop_following is not None:
            return
        self._announced = state, pid
        await self._register()

    async def _announce_again(self) -> None:
        """With what the service says of itself now."""
        try:
            await self._register()
        except StatorError as error:
            if error.code is not ErrorCode.INSTANCE_LOST:
                raise
            logger.warning("%s shows its change to others when the hub is back: %s", self.spec.name, error)

    async def _register(self) -> None:
        context = self.context
        names = (*(endpoint.name for endpoint in self.spec.endpoints), DRAIN_ENDPOINT, STATUS_ENDPOINT)
        # One at a time, so that the last one to say something is the last one that discovery hears.
        async with self._announcing:
            if self._announced is None:
                return
            state, pid = self._announced
            await register_instance(context.discovery, context.lease, context.info(state, endpoints=names, pid=pid))

    async def drain(self) -> None:
        for hook in self.spec.drain_hooks if self._started else ():
            await self._run_quietly(hook)

    async def stop(self) -> None:
        """Run the on_stop hooks, end the tasks and stop listening. A hook that fails is logged."""
        for hook in self.spec.stop_hooks if self._started else ():
            await self._run_quietly(hook)
        if (stop_following := self.context.stop_following) is not None:
            try:
                await stop_following()
            except Exception:
                logger.exception("%s: what it ran for another instance failed to stop", self.spec.name)
        await self.context.tasks.close()
        await self._call_tasks.close()
        await self.context.server.close()

    async def _run(self, hook: str) -> None:
        method: Any = getattr(self.instance, hook)
        takes_context = bool(inspect.signature(method).parameters)
        result: Any = method(self.context) if takes_context else method()
        if inspect.isawaitable(result):
            await result

    async def _run_quietly(self, hook: str) -> None:
        try:
            await self._run(hook)
        except Exception:
            logger.exception("%s: the hook %s failed", self.spec.name, hook)


def _without_context(method: Any, style: EndpointStyle) -> calls.Function:
    async def answer(request: Any, _context: CallContext) -> Any:
        return await method(request)

    async def generate(request: Any, _context: CallContext) -> AsyncIterator[Any]:
        async with contextlib.aclosing(method(request)) as items:
            async for item in items:
                yield item

    return generate if style is EndpointStyle.STREAM else answer
