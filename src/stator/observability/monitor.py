"""Follows every worker's reports, so that one process can show the whole deployment's figures."""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import Any, Protocol

from stator.errors import StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.instances import InstanceInfo
from stator.messages.reports import ReportRequest, WorkerReport
from stator.runtime.context import CallContext
from stator.runtime.directory import DirectoryChange, InstanceDirectory
from stator.transport.base import StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)

REPORT_ENDPOINT = "report"
RESUBSCRIBE_AFTER_S = 1.0


class ReportSink(Protocol):
    """What the monitor fills: in the product, the metrics registry."""

    def update(self, instance: InstanceInfo, report: WorkerReport) -> None: ...

    def remove(self, instance_id: InstanceId) -> None: ...


class _Subscription:
    """One worker's stream; re-opened while the worker lives. Its own transport sink."""

    def __init__(self, monitor: "WorkerMonitor", instance: InstanceInfo) -> None:
        self.instance = instance
        self._monitor = monitor
        self._handle: StreamHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._closed = False
        self.open()

    def open(self) -> None:
        target = Target(self.instance.addresses, REPORT_ENDPOINT, self.instance.instance_id)
        context = CallContext(RequestId(f"report/{self.instance.instance_id}"))
        self._handle = self._monitor.client.open(target, ReportRequest(), self, context=context, item_type=WorkerReport)

    def items(self, items: Sequence[Any], /) -> None:
        if not self._closed:
            self._monitor.sink.update(self.instance, items[-1])

    def end(self, error: StatorError | None = None, /) -> None:
        if not self._closed:
            # Spread, so that a hundred workers' watchers do not come back in the same instant.
            delay_s = RESUBSCRIBE_AFTER_S * (0.5 + self._monitor.rng.random())
            self._retry = asyncio.get_running_loop().call_later(delay_s, self.open)

    def close(self) -> None:
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._handle is not None:
            self._handle.cancel()


class WorkerMonitor:
    """Subscribes to the reports of every instance that has that endpoint, from construction to `close`.

    roles: only instances of these.
    """

    def __init__(
        self,
        *,
        client: TransportClient,
        directory: InstanceDirectory,
        sink: ReportSink,
        rng: Random,
        roles: Collection[str] | None = None,
    ) -> None:
        self.client = client
        self.sink = sink
        self.rng = rng
        self._roles = roles
        self._directory = directory
        self._subscriptions: dict[InstanceId, _Subscription] = {}
        self._unsubscribe: Callable[[], None] = directory.subscribe(self._on_change)
        self._follow()

    def _on_change(self, _change: DirectoryChange) -> None:
        self._follow()

    def _follow(self) -> None:
        live = {i.instance_id: i for i in self._directory.instances(ready_only=False) if self._reports(i)}
        for instance_id in self._subscriptions.keys() - live.keys():
            self._subscriptions.pop(instance_id).close()
            self.sink.remove(instance_id)
        for instance_id, instance in live.items():
            known = self._subscriptions.get(instance_id)
            if known is None:
                self._subscriptions[instance_id] = _Subscription(self, instance)
            else:
                known.instance = instance

    def _reports(self, instance: InstanceInfo) -> bool:
        return REPORT_ENDPOINT in instance.endpoints and (self._roles is None or instance.role in self._roles)

    def close(self) -> None:
        self._unsubscribe()
        for subscription in self._subscriptions.values():
            subscription.close()
        self._subscriptions.clear()
