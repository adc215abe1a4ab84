"""One frontend that runs as several processes: a scrape that reaches one of them shows all."""

import asyncio
import logging
from collections.abc import Sequence
from uuid import uuid4

from stator.errors import StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.instances import InstanceInfo
from stator.messages.metrics import MetricsSnapshot, SnapshotRequest
from stator.observability.copies import render_together, snapshot_of
from stator.observability.metrics import Metrics
from stator.runtime.context import CallContext
from stator.runtime.directory import InstanceDirectory
from stator.transport import calls
from stator.transport.base import Call, Target, TransportClient, TransportServer

logger = logging.getLogger(__name__)

ENDPOINT = "metrics"
ANSWER_TIMEOUT_S = 2.0
_UNIX = "unix://"


class FrontendCopies:
    """server: of this instance. process: which of `copies`, from 1.

    A process that drains and the one that takes its place have one number; the latter's figures are shown.
    The other processes are those whose Unix sockets are in the directory of ours: the supervisor made it for them.
    """

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        client: TransportClient,
        server: TransportServer,
        directory: InstanceDirectory,
        metrics: Metrics,
        process: int,
        copies: int,
    ) -> None:
        self._instance_id = instance_id
        self._client = client
        self._server = server
        self._directory = directory
        self._metrics = metrics
        self._process = process
        self._copies = copies

    def snapshot(self, call: Call) -> None:
        """Endpoint `metrics`: this process's own."""
        call.items([snapshot_of(self._metrics, self._process)])
        call.end()

    async def scrape(self) -> bytes:
        """The exposition text of the whole frontend. Takes ANSWER_TIMEOUT_S at most; who is late is shown as down."""
        if self._copies == 1:
            return self._metrics.render()
        snapshots: dict[int, MetricsSnapshot | None] = dict.fromkeys(range(1, self._copies + 1))
        for snapshot in await asyncio.gather(*(self._ask(other) for other in self._others())):
            if snapshot is not None:
                snapshots[snapshot.process] = snapshot
        snapshots[self._process] = snapshot_of(self._metrics, self._process)
        return render_together(self._metrics, snapshots)

    def _others(self) -> list[InstanceInfo]:
        own = _directories(self._server.addresses)
        return [
            info
            for info in sorted(self._directory.instances(ready_only=False), key=lambda info: info.state)
            if info.instance_id != self._instance_id
            and ENDPOINT in info.endpoints
            and own & _directories(info.addresses)
        ]

    async def _ask(self, info: InstanceInfo) -> MetricsSnapshot | None:
        target = Target(info.addresses, ENDPOINT, info.instance_id)
        context = CallContext(RequestId(f"metrics/{uuid4().hex}"))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await calls.call(
                    self._client, target, SnapshotRequest(), context=context, item_type=MetricsSnapshot
                )
        except (StatorError, TimeoutError) as error:
            logger.warning("%s did not tell its metrics: %s", info.instance_id, error or "it did not answer in time")
            return None


def _directories(addresses: Sequence[str]) -> set[str]:
    return {address.rpartition("/")[0] for address in addresses if address.startswith(_UNIX)}
