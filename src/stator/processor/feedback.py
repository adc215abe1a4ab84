"""Tells routers what became of their decisions, many in one call."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stator.errors import StatorError
from stator.ids import RequestId
from stator.messages.routing import RouteObservation, RouteObservations
from stator.runtime.context import CallContext, loop_time
from stator.transport.base import Target, TransportClient

logger = logging.getLogger(__name__)

OBSERVE_ENDPOINT = "observe"
FLUSH_EVERY_S = 0.01
"""A router sees a first token that much later; a request with a short answer is reported in one piece."""

MAX_PENDING = 10_000
TIMEOUT_S = 5.0


class RouteFeedback:
    """Best effort: a router that cannot be reached learns from the end of the booking, and from time."""

    def __init__(self, client: TransportClient) -> None:
        self._client = client
        self._pending: dict[Target, list[RouteObservation]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._num_pending = 0

    def add(self, route: Target, observation: RouteObservation, *, at_once: bool = False) -> None:
        """route: where the decision came from. at_once: before what is sent there next."""
        if self._num_pending >= MAX_PENDING:
            return
        self._pending.setdefault(route, []).append(observation)
        self._num_pending += 1
        if at_once:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_EVERY_S, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending, self._pending, self._num_pending = self._pending, {}, 0
        for route, observations in pending.items():
            context = CallContext(RequestId("route-feedback"), loop_time() + TIMEOUT_S)
            target = replace(route, endpoint=OBSERVE_ENDPOINT)
            self._client.open(target, RouteObservations(observations), _IgnoreAnswer(), context=context)

    def close(self) -> None:
        """What waits is not sent any more."""
        self._pending, self._num_pending = {}, 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _IgnoreAnswer:
    def items(self, items: Sequence[Any], /) -> None:
        return

    def end(self, error: StatorError | None = None, /) -> None:
        if error is not None:
            logger.debug("a router did not take observations: %r", error)
