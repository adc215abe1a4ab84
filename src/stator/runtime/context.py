"""What accompanies a call on its way: identity, deadline, trace. Not its payload."""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from stator.ids import RequestId


def loop_time() -> float:
    """Seconds on the running loop's monotonic clock: the only clock that shells read, so that tests can own it."""
    return asyncio.get_running_loop().time()


class Clocks(Protocol):
    """Unix seconds for people, and seconds of a fine clock for how long something took. The module `time` is one."""

    def time(self) -> float: ...

    def perf_counter(self) -> float: ...


@dataclass(frozen=True, slots=True)
class CallContext:
    """deadline: on the loop's clock, None for none. On the wire it travels as milliseconds left.

    headers: small string pairs carried along unread (trace context).
    watched: whoever opens calls with this context cancels them at the deadline, so that none needs a timer of its own.
    """

    request_id: RequestId
    deadline: float | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])
    watched: bool = False

    def seconds_left(self, now: float) -> float | None:
        return None if self.deadline is None else self.deadline - now
