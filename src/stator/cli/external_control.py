"""Commands on a deployment that has etcd and NATS in place of a hub."""

import asyncio
from collections.abc import Collection

from stator.cli.control_plane import ControlFacts, LeaseTimes, ServiceFacts
from stator.config.external import ExternalPlanes
from stator.discovery.etcd import EtcdDiscovery
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph.planes import Planes
from stator.graph.token import TOKEN_KEY
from stator.hub.status import QueueStatus
from stator.ids import LeaseId

QUEUE_TIMEOUT_S = 5.0
"""For NATS to be reached and all queues to be read: one that is away must not keep people from the rest."""


async def read_token(external: ExternalPlanes, namespace: str, given: str | None) -> str:
    """The one that was given, else the namespace's. Raises ConfigError if there is none, or etcd cannot be asked."""
    discovery = EtcdDiscovery(external.etcd, namespace=namespace)
    try:
        found = await discovery.get(TOKEN_KEY)
    except StatorError as error:
        where = f"etcd at {', '.join(external.etcd.endpoints)}"
        if error.code is ErrorCode.INSTANCE_LOST:
            raise ConfigError(
                f"{where} (ETCD_ENDPOINTS) cannot be reached: {error.message}. The deployment goes on without it, but "
                f"cannot be looked at. Start it, correct ETCD_ENDPOINTS, or give a head with --join HOST[:PORT]"
            ) from None
        raise ConfigError(error.message) from None
    finally:
        await discovery.close()
    if given is not None:
        return given
    if found is None:
        raise ConfigError(
            f"etcd at {', '.join(external.etcd.endpoints)} has no token for the namespace {namespace}: no node of it "
            f"was started there, or its nodes were given a token. Check --namespace, or set STATOR_TOKEN or give "
            f"--token-file FILE"
        )
    return found.value.decode()


class ExternalControl:
    def __init__(self, planes: Planes, external: ExternalPlanes) -> None:
        self.name = external.shown
        self._planes = planes
        self._external = external

    async def facts(self, lease_ids: Collection[LeaseId]) -> ControlFacts:
        leases, (queues, error) = await asyncio.gather(self._leases(lease_ids), self._queues())
        services = ServiceFacts(self._external.etcd.endpoints, self._external.nats.servers, error)
        return ControlFacts(services=services, leases=leases, queues=queues)

    async def _leases(self, lease_ids: Collection[LeaseId]) -> dict[LeaseId, LeaseTimes]:
        discovery = self._planes.discovery
        assert isinstance(discovery, EtcdDiscovery)
        times = await asyncio.gather(*(discovery.lease_times(lease_id) for lease_id in lease_ids))
        return {
            lease_id: LeaseTimes(*found) for lease_id, found in zip(lease_ids, times, strict=True) if found is not None
        }

    async def _queues(self) -> tuple[list[QueueStatus], str]:
        try:
            async with asyncio.timeout(QUEUE_TIMEOUT_S):
                names = await self._planes.queue_names()
                return list(await asyncio.gather(*(self._queue(name) for name in names))), ""
        except TimeoutError:
            return [], f"NATS at {', '.join(self._external.nats.servers)} did not answer within {QUEUE_TIMEOUT_S:g} s"
        except StatorError as error:
            return [], error.message

    async def _queue(self, name: str) -> QueueStatus:
        queue = self._planes.queue(name)
        size = await queue.size()
        return QueueStatus(name, size.waiting, size.in_flight, len(await queue.dead_letters()))
