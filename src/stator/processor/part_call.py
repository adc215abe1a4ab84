"""A part of a request that is routed and computed by itself: a choice, or an input for an embedding."""

from collections.abc import Callable, Sequence
from typing import Any

from stator.errors import StatorError
from stator.ids import RequestId
from stator.runtime.context import CallContext
from stator.transport.base import Call

OnItems = Callable[[Any, Sequence[Any]], None]
OnEnd = Callable[[Any, StatorError | None], None]


class PartCall:
    """A part's end of the request's call; what `Generation` needs of a Call. index: among all parts.

    on_items, on_end: called with this, and what came of it; on_end once.
    """

    __slots__ = ("_on_cancel", "_on_end", "_on_items", "cancelled", "context", "ended", "index", "request")

    def __init__(self, call: Call, index: int, on_items: OnItems, on_end: OnEnd) -> None:
        outer = call.context
        request_id = RequestId(f"{outer.request_id}.{index}")
        self.context = CallContext(request_id, outer.deadline, outer.headers, watched=True)
        self.request: Any = call.request
        self.index = index
        self.cancelled = False
        self.ended = False
        self._on_items = on_items
        self._on_end = on_end
        self._on_cancel: Callable[[], None] | None = None

    def on_cancel(self, callback: Callable[[], None], /) -> None:
        if self.cancelled:
            callback()
        else:
            self._on_cancel = callback

    def items(self, items: Sequence[Any], /) -> None:
        self._on_items(self, items)

    def end(self, error: StatorError | None = None, /) -> None:
        if not self.ended:
            self.ended = True
            self._on_end(self, error)

    def cancel(self) -> None:
        if self.ended or self.cancelled:
            return
        self.cancelled = True
        callback, self._on_cancel = self._on_cancel, None
        if callback is not None:
            callback()

    async def writable(self) -> None:
        raise NotImplementedError("a part is pushed, never waited for")
