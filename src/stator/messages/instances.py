"""What an instance tells discovery about itself."""

from enum import StrEnum

import msgspec

from stator.ids import InstanceId
from stator.messages.engine import EngineInfo


class InstanceState(StrEnum):
    READY = "ready"
    DRAINING = "draining"


class InstanceInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value under `instances/{service}/{instance_id}`; lives as long as the instance's lease.

    service: the service's name in the graph, e.g. VllmWorker. role: what callers use it for ("decode", "prefill",
    "frontend", ...), so that a user's own class may take a role under another name.
    addresses: of its request plane, best first: `tcp://host:port`, `unix:///path`, `inproc://name`.
    model: served model name that callers ask for; None for services without one.
    """

    instance_id: InstanceId
    service: str
    role: str
    addresses: tuple[str, ...]
    endpoints: tuple[str, ...]
    host: str
    pid: int
    state: InstanceState = InstanceState.READY
    model: str | None = None
    engine: EngineInfo | None = None


def instance_key(service: str, instance_id: InstanceId) -> str:
    return f"instances/{service}/{instance_id}"


INSTANCES_PREFIX = "instances/"
