"""Calls to a hub: time limits, errors that name it, and streams that outlive it."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.hub import messages as m
from stator.ids import RequestId
from stator.runtime.context import CallContext, loop_time
from stator.transport import calls
from stator.transport.base import Sink, StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 3.0

_UNREACHABLE = (
    ErrorCode.INSTANCE_LOST,
    ErrorCode.STALE_INSTANCE,
    ErrorCode.DEADLINE,
    ErrorCode.DRAINING,
    ErrorCode.CANCELLED,
)
"""CANCELLED: the transport client was closed; a caller who is cancelled sees asyncio's CancelledError instead."""
_FINAL = (ErrorCode.UNAUTHORIZED, ErrorCode.INVALID_REQUEST, ErrorCode.PROTOCOL)
"""What a second try will not change, not even at a hub that was started again."""


class Backoff:
    """Waits of up to twice as long each time, between half and all of that, drawn from random_source."""

    def __init__(self, random_source: random.Random, max_s: float = MAX_BACKOFF_S) -> None:
        self._random = random_source
        self._max_s = max_s
        self.reset()

    def reset(self) -> None:
        self._next_s = min(FIRST_BACKOFF_S, self._max_s)

    def next_s(self) -> float:
        wait_s = self._next_s * self._random.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, self._max_s)
        return wait_s


class _TrackedHandle:
    """A stream that HubClient.close can end; `transport.calls` cancels each handle when it is through with it."""

    def __init__(self, client: "HubClient", handle: StreamHandle) -> None:
        self._client = client
        self._handle = handle

    def cancel(self) -> None:
        self._client.forget(self)
        self._handle.cancel()

    def pause(self) -> None:
        self._handle.pause()

    def resume(self) -> None:
        self._handle.resume()


class HubClient:
    """What the hub's clients share. The transport client is the caller's and stays open.

    addresses: of the hub's request plane, tried in order. random_source: for request ids and the jitter of retries.
    """

    def __init__(
        self,
        client: TransportClient,
        addresses: tuple[str, ...],
        *,
        namespace: str,
        timeout_s: float,
        random_source: random.Random,
    ) -> None:
        self._client = client
        self.addresses = addresses
        self.namespace = namespace
        self.timeout_s = timeout_s
        self.random_source = random_source
        self._handles: dict[_TrackedHandle, None] = {}
        self._closed = asyncio.Event()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    @property
    def name(self) -> str:
        """For messages to people."""
        return f"the hub at {', '.join(self.addresses)}"

    async def ask(self, endpoint: str, request: Any, *, timeout_s: float | None = None) -> int:
        """The value of the hub's Answer. Raises as `ask_for_answer`."""
        return (await self.ask_for_answer(endpoint, request, timeout_s=timeout_s)).value

    async def ask_for_answer(self, endpoint: str, request: Any, *, timeout_s: float | None = None) -> m.Answer:
        """Raises StatorError, INSTANCE_LOST if there was no answer within timeout_s."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            target = Target(self.addresses, endpoint)
            return await calls.call(self, target, request, context=self._context(timeout_s), item_type=m.Answer)
        except StatorError as error:
            raise self._explain(error, endpoint, timeout_s) from error

    async def collect(
        self, endpoint: str, request: Any, item_type: Any, *, timeout_s: float | None = None
    ) -> list[Any]:
        """All items of a stream that ends. Raises as `ask`."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        collected: list[Any] = []
        try:
            async with contextlib.aclosing(self._stream(endpoint, request, item_type, timeout_s)) as lists:
                async for items in lists:
                    collected += items
        except StatorError as error:
            raise self._explain(error, endpoint, timeout_s) from error
        return collected

    async def follow(self, endpoint: str, request: Any, item_type: Any) -> AsyncGenerator[tuple[bool, Any], None]:
        """Items of an endless stream, each with whether it is the first after a connection; until this is closed.

        A lost hub is tried again with growing pauses, for ever; the loss itself is told as the item None, once.
        Raises StatorError for what no retry can change.
        """
        backoff = Backoff(self.random_source)
        lost = False
        while not self.closed:
            first = True
            try:
                async with contextlib.aclosing(self._stream(endpoint, request, item_type, None)) as lists:
                    async for items in lists:
                        if lost:
                            lost = False
                            logger.info("%s is back; %s goes on", self.name, endpoint)
                        backoff.reset()
                        for item in items:
                            yield first, item
                            first = False
            except StatorError as error:
                if self.closed:
                    return
                if error.code in _FINAL:
                    raise self._explain(error, endpoint, None) from error
                if not lost:
                    lost = True
                    logger.warning("lost %s in %s, trying again: %s", self.name, endpoint, error.message)
                    yield False, None
            await self.pause(backoff.next_s())

    async def pause(self, wait_s: float) -> None:
        """Returns after wait_s, or when this is closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._closed.wait()

    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        handle = _TrackedHandle(self, self._client.open(target, request, sink, context=context, item_type=item_type))
        self._handles[handle] = None
        if self.closed:
            handle.cancel()
        return handle

    def forget(self, handle: _TrackedHandle) -> None:
        self._handles.pop(handle, None)

    async def close(self) -> None:
        """End every call and stream made here; callers see INSTANCE_LOST, followers their end. Idempotent."""
        self._closed.set()
        for handle in list(self._handles):
            handle.cancel()

    def _stream(
        self, endpoint: str, request: Any, item_type: Any, timeout_s: float | None
    ) -> AsyncGenerator[list[Any], None]:
        target = Target(self.addresses, endpoint)
        return calls.stream(self, target, request, context=self._context(timeout_s), item_type=item_type)

    def _context(self, timeout_s: float | None) -> CallContext:
        request_id = RequestId(f"hub-{self.random_source.getrandbits(64):016x}")
        return CallContext(request_id, None if timeout_s is None else loop_time() + timeout_s)

    def _explain(self, error: StatorError, endpoint: str, timeout_s: float | None) -> StatorError:
        if self.closed:
            return StatorError(ErrorCode.INSTANCE_LOST, f"this client of {self.name} is closed")
        if error.code is ErrorCode.DEADLINE and timeout_s is not None:
            why = f"did not answer {endpoint} within {timeout_s:g} s"
        elif error.code in _UNREACHABLE:
            why = f"could not be reached for {endpoint} ({error.message})"
        else:
            return StatorError(
                error.code,
                f"{self.name}: {error.message}",
                param=error.param,
                retry_after_s=error.retry_after_s,
            )
        return StatorError(
            ErrorCode.INSTANCE_LOST, f"{self.name} {why}; check that the head runs and that its port can be reached"
        )
