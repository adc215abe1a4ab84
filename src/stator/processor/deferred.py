"""Calls whose next step waits for work that is not done on the event loop."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from stator.errors import ErrorCode, StatorError
from stator.transport.base import Call

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0

_T = TypeVar("_T")


class DeferredWork:
    """Has a thread of its own, and follows work that is done elsewhere.

    max_waiting: calls that may wait at once; more are refused. what: "long prompts", which then wait. A call that was
    cancelled meanwhile is left alone; one whose work or next step fails ends with the error. Owns its calls until
    `close`, which ends them with DRAINING.
    """

    def __init__(self, thread_name: str, *, max_waiting: int, what: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=thread_name)
        self._max_waiting = max_waiting
        self._what = what
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self.num_open = 0

    def on_thread(self, call: Call, work: Callable[[], _T], then: Callable[[_T], None]) -> None:
        """then: with what work returned. Raises StatorError if too many wait."""
        self.check_room()
        # A caller that left while its work waited costs nothing more; nothing is then done with what it returns.
        waiting = asyncio.get_running_loop().run_in_executor(self._thread, lambda: None if call.cancelled else work())
        self.follow(call, waiting, cast(Callable[[_T | None], None], then))

    def follow(
        self,
        call: Call,
        waiting: "asyncio.Future[_T]",
        then: Callable[[_T], None],
        failure: Callable[[BaseException], BaseException] = lambda error: error,
    ) -> None:
        """After `check_room`. failure: what is told of an error that is not one of a request."""

        def done(future: "asyncio.Future[_T]") -> None:
            # Retrieved in any case, so that nobody complains that it was not.
            error = None if future.cancelled() else future.exception()
            if not call.cancelled:
                if self._closed or future.cancelled():
                    call.end(stopping())
                elif error is not None:
                    fail(call, failure(error))
                else:
                    guarded(call, lambda: then(future.result()))
            self.num_open -= 1
            if not self.num_open:
                self._idle.set()

        self.num_open += 1
        self._idle.clear()
        waiting.add_done_callback(done)

    def check_room(self) -> None:
        if self._closed:
            raise stopping()
        if self.num_open >= self._max_waiting:
            message = f"{self.num_open} {self._what} wait to be tokenized, as many as may; try again later"
            raise StatorError(ErrorCode.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)

    async def drain(self) -> None:
        """Wait until no call waits here."""
        await self._idle.wait()

    async def close(self) -> None:
        """Idempotent. Work that is done elsewhere is ended by its owner, before."""
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        await self._idle.wait()


def guarded(call: Call, step: Callable[[], None]) -> None:
    """The edge of a request: whatever goes wrong in a step ends the call."""
    try:
        step()
    except Exception as error:
        fail(call, error)


def fail(call: Call, error: BaseException) -> None:
    if isinstance(error, StatorError):
        call.end(error)
        return
    logger.error("request %s failed in the processor", call.context.request_id, exc_info=error)
    call.end(StatorError(ErrorCode.INTERNAL, "the processor failed; its log has the reason"))


def stopping() -> StatorError:
    return StatorError(ErrorCode.DRAINING, "this processor is stopping; send the request again")
