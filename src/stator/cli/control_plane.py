"""What a control plane tells commands about a deployment, beside what discovery does: its leases and its queues."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4

from stator.errors import ErrorCode, StatorError
from stator.hub.status import HUB_STATUS, HubStatus, NamespaceRequest, QueueStatus
from stator.ids import LeaseId, RequestId
from stator.runtime.context import CallContext, loop_time
from stator.transport import calls
from stator.transport.base import Target, TransportClient

ANSWER_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """age_s: None where that is not known."""

    ttl_s: float
    left_s: float
    age_s: float | None = None


@dataclass(frozen=True, slots=True)
class HubFacts:
    address: str
    epoch: int
    uptime_s: float


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """Addresses, without what is secret. queue_error: why nothing is known of the queues; empty if it is."""

    etcd: tuple[str, ...]
    nats: tuple[str, ...]
    queue_error: str = ""


@dataclass(frozen=True, slots=True)
class ControlFacts:
    """hub, services: whichever there is; neither for a hub that does not tell."""

    hub: HubFacts | None = None
    services: ServiceFacts | None = None
    leases: dict[LeaseId, LeaseTimes] = field(default_factory=dict[LeaseId, LeaseTimes])
    queues: list[QueueStatus] = field(default_factory=list[QueueStatus])


class ControlPlane(Protocol):
    @property
    def name(self) -> str:
        """For messages to people."""
        ...

    async def facts(self, lease_ids: Collection[LeaseId]) -> ControlFacts:
        """lease_ids: of which leases to tell. Raises StatorError."""
        ...


class HubControl:
    """addresses: of the hub, for the request plane. shown: for people."""

    def __init__(self, client: TransportClient, addresses: tuple[str, ...], shown: str, namespace: str) -> None:
        self.name = f"the hub at {shown}"
        self._client = client
        self._target = Target(addresses, HUB_STATUS)
        self._shown = shown
        self._namespace = namespace

    async def facts(self, lease_ids: Collection[LeaseId]) -> ControlFacts:
        context = CallContext(RequestId(f"cli-{uuid4().hex}"), loop_time() + ANSWER_TIMEOUT_S)
        request = NamespaceRequest(self._namespace)
        try:
            status: HubStatus = await calls.call(
                self._client, self._target, request, context=context, item_type=HubStatus
            )
        except StatorError as error:
            if error.code is ErrorCode.NOT_FOUND:
                return ControlFacts()
            raise
        leases = {
            lease.lease_id: LeaseTimes(lease.ttl_s, lease.left_s, lease.age_s)
            for lease in status.leases
            if lease.lease_id in lease_ids
        }
        return ControlFacts(
            HubFacts(self._shown, status.epoch, status.uptime_s), leases=leases, queues=list(status.queues)
        )
