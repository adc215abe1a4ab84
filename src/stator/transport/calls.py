"""Conveniences on top of sinks: one answer, `async for`, and endpoints written as async functions.

The built-in token path does not use them; everything that is not per token may.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from inspect import isasyncgenfunction
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.runtime.context import CallContext
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Call, Endpoint, StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)

READ_AHEAD_ITEMS = 256
"""How far `stream` lets items pile up at its reader before it pauses the sender."""

Function = Callable[[Any, CallContext], Awaitable[Any]] | Callable[[Any, CallContext], AsyncIterator[Any]]
"""An endpoint's body: an async function that returns its one item, or an async generator that yields items."""


class _OneItem:
    """A sink for exactly one item. A stream may stay open after it; `wait` does not return before the end."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._items: list[Any] = []
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def items(self, items: Sequence[Any], /) -> None:
        self._items.extend(items[:2])

    def end(self, error: StatorError | None = None, /) -> None:
        if self.done.done():
            return
        if error is not None:
            self.done.set_exception(error)
        elif len(self._items) == 1:
            self.done.set_result(self._items[0])
        else:
            found = "none" if not self._items else "several"
            self.done.set_exception(
                StatorError(ErrorCode.PROTOCOL, f"{self._endpoint} was to answer with one item; it sent {found}")
            )


async def call(
    client: TransportClient, target: Target, request: Any, *, context: CallContext, item_type: Any = Any
) -> Any:
    """The endpoint's one item. Raises the StatorError that the call ended with; PROTOCOL for none or several items.

    Cancelling the caller cancels the call.
    """
    sink = _OneItem(target.endpoint)
    handle = client.open(target, request, sink, context=context, item_type=item_type)
    try:
        return await sink.done
    finally:
        handle.cancel()


class _Reader:
    """A sink that a single reader takes lists from; pauses the stream when the reader falls behind."""

    def __init__(self) -> None:
        self.handle: StreamHandle | None = None
        self._items: list[Any] = []
        self._ended = False
        self._error: StatorError | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None

    def items(self, items: Sequence[Any], /) -> None:
        self._items.extend(items)
        if len(self._items) >= READ_AHEAD_ITEMS and self.handle is not None and not self._paused:
            self._paused = True
            self.handle.pause()
        self._wake()

    def end(self, error: StatorError | None = None, /) -> None:
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[Any] | None:
        """All that came since the last call; None at the end. Raises the stream's error after its items."""
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        if self._paused and self.handle is not None:
            self._paused = False
            self.handle.resume()
        return items


async def stream(
    client: TransportClient, target: Target, request: Any, *, context: CallContext, item_type: Any = Any
) -> AsyncGenerator[list[Any], None]:
    """Lists of items as they come; raises the StatorError that the stream ended with.

    A reader that is slow pauses the sender. Leaving the loop early cancels the call: at once under
    `contextlib.aclosing`, otherwise when the iterator is collected.
    """
    reader = _Reader()
    handle = reader.handle = client.open(target, request, reader, context=context, item_type=item_type)
    try:
        while (items := await reader.next()) is not None:
            yield items
    finally:
        handle.cancel()


class CallTasks:
    """Owns the tasks of endpoints that are written as async functions, one per call; `close` ends them all."""

    def __init__(self, name: str) -> None:
        self._tasks = TaskOwner(name)

    def endpoint(self, name: str, request_type: Any, function: Function) -> Endpoint:
        """Serve `function(request, context)`.

        A coroutine function's result is the call's one item; each value that an async generator yields is one item,
        and the generator goes on when it was sent. When the call is cancelled, so is the function. A StatorError
        ends the call as it is; any other exception as INTERNAL, with a log entry here.
        """
        run = _run_generator if isasyncgenfunction(function) else _run_coroutine

        def handler(call: Call) -> None:
            try:
                task = self._tasks.spawn(self._run(name, run, function, call), f"{name} {call.context.request_id}")
            except RuntimeError:
                call.end(StatorError(ErrorCode.DRAINING, f"{name} is stopping"))
                return

            def cancel() -> None:
                task.cancel()

            call.on_cancel(cancel)

        return Endpoint(name, request_type, handler)

    async def close(self) -> None:
        await self._tasks.close()

    async def _run(
        self, name: str, run: Callable[[Any, Call], Awaitable[None]], function: Function, call: Call
    ) -> None:
        try:
            await run(function, call)
        except asyncio.CancelledError:
            call.end(StatorError(ErrorCode.INSTANCE_LOST, f"{name} stopped before it had answered"))
            raise
        except StatorError as error:
            call.end(error)
        except Exception:
            logger.exception("%s failed in request %s", name, call.context.request_id)
            call.end(StatorError(ErrorCode.INTERNAL, f"{name} failed; the server's log has the reason"))
        else:
            call.end()


async def _run_coroutine(function: Any, call: Call) -> None:
    call.items([await function(call.request, call.context)])


async def _run_generator(function: Any, call: Call) -> None:
    async with contextlib.aclosing(function(call.request, call.context)) as items:
        async for item in items:
            call.items([item])
            await call.writable()
