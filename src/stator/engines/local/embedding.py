"""Inputs that a local engine makes embeddings of: one at a time, part by part, between the steps of sequences.

The executor takes jobs in the order of the calls, and a step is given to it when the one before is over: so parts and
steps take turns.
"""

import asyncio
import logging
from collections.abc import Iterator

from stator.engines.local.executor import StepExecutor
from stator.engines.local.pooling import EmbeddingRunner
from stator.engines.sinks import end_sink, push_last
from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId
from stator.messages.embeddings import Embedding, EmbedRequest
from stator.messages.tokens import num_tokens, unpack
from stator.transport.base import Sink

logger = logging.getLogger(__name__)

MAX_WAITING = 4096


class EmbeddingLine:
    """Who waits with the smaller priority is first, then who came first. The caller has checked the requests."""

    def __init__(self, runner: EmbeddingRunner, executor: StepExecutor) -> None:
        self._runner = runner
        self._executor = executor
        self._open: dict[RequestId, tuple[EmbedRequest, Sink]] = {}
        self._task: asyncio.Task[None] | None = None

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._open

    def begin(self, request: EmbedRequest, sink: Sink) -> None:
        """Raises StatorError(OVERLOADED) if too many wait already."""
        if len(self._open) >= MAX_WAITING:
            raise StatorError(ErrorCode.OVERLOADED, f"{MAX_WAITING} inputs wait for their embedding already")
        self._open[request.request_id] = request, sink
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="embeddings")

    def cancel(self, request_id: RequestId) -> Sink | None:
        """The sink of an input that is not computed any further; the caller ends it."""
        found = self._open.pop(request_id, None)
        return None if found is None else found[1]

    def cancel_all(self) -> list[Sink]:
        sinks = [sink for _, sink in self._open.values()]
        self._open.clear()
        return sinks

    async def close(self) -> None:
        """After cancel_all: wait for the part that is being computed."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while self._open:
                request, sink = min(self._open.values(), key=lambda each: each[0].priority)
                await self._embed(request, sink)
        finally:
            self._task = None

    async def _embed(self, request: EmbedRequest, sink: Sink) -> None:
        """Returns early if it was cancelled meanwhile."""
        opened = self._open[request.request_id]
        parts = self._runner.embed(unpack(request.prompt_ids))
        vector: bytes | None = None
        try:
            while vector is None:
                vector = await self._executor.run(_next, parts)
                if self._open.get(request.request_id) is not opened:
                    return
        except Exception:
            logger.exception("the embedding of %s failed", request.request_id)
            if self._open.get(request.request_id) is opened:
                del self._open[request.request_id]
                end_sink(sink, StatorError(ErrorCode.INTERNAL, "the engine failed to make this embedding"))
            return
        del self._open[request.request_id]
        push_last(sink, Embedding(vector, num_tokens(request.prompt_ids)))


def _next(parts: Iterator[bytes | None]) -> bytes | None:
    return next(parts)
