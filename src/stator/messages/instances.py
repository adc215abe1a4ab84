"""What an instance tells discovery about itself, and whoever asks it to leave."""

from enum import StrEnum

import msgspec

from stator.ids import InstanceId
from stator.messages.engine import EngineInfo
from stator.messages.lora import LoraAdapter


class InstanceState(StrEnum):
    READY = "ready"
    DRAINING = "draining"


class InstanceInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value under `instances/{service}/{instance_id}`; lives as long as the instance's lease.

    service: the service's name in the graph, e.g. VllmWorker. role: what callers use it for ("decode", "prefill",
    "frontend", ...), so that a user's own class may take a role under another name.
    addresses: of its request plane, best first: `tcp://host:port`, `unix:///path`, `inproc://name`.
    model: served model name that callers ask for; None for services without one. adapters: LoRA adapters of it that the
    engine has now.
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
    adapters: tuple[LoraAdapter, ...] = ()

    def adapter(self, name: str) -> LoraAdapter | None:
        return next((adapter for adapter in self.adapters if adapter.name == name), None)


def instance_key(service: str, instance_id: InstanceId) -> str:
    return f"instances/{service}/{instance_id}"


INSTANCES_PREFIX = "instances/"

DRAIN_ENDPOINT = "instance.drain"
STATUS_ENDPOINT = "instance.status"
"""Every running service has both, whatever its class declares."""


class DrainRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Leave discovery, finish or hand on what is open, end the process. Items are DrainProgress; the last one has a
    phase that `is_last`, and the process ends after it.

    restart: the supervisor starts the process again. timeout_s: what is open then is ended, so that it goes on
    elsewhere. The first request of a process counts; a later one watches what that one began.
    """

    restart: bool = False
    timeout_s: float = 60.0


class DrainPhase(StrEnum):
    """SUCCESSOR: still ready, until the process that takes its place is ready too. CUT_OFF: the time was over, and
    what was open was ended; DRAINED: nothing was."""

    SUCCESSOR = "successor"
    DRAINING = "draining"
    DRAINED = "drained"
    CUT_OFF = "cut_off"

    @property
    def is_last(self) -> bool:
        return self in (DrainPhase.DRAINED, DrainPhase.CUT_OFF)


class DrainProgress(msgspec.Struct, frozen=True, omit_defaults=True):
    """num_open: requests, jobs or KV blocks being fetched that the process still has; with CUT_OFF, that it ended.

    elapsed_s: since the request. restart: as asked by the one that began it.
    """

    phase: DrainPhase
    num_open: int
    elapsed_s: float
    restart: bool = False


class StatusRequest(msgspec.Struct, frozen=True):
    """Answered with one InstanceStatus."""


class SettingState(msgspec.Struct, frozen=True):
    """A setting (`core.settings`) as a process uses it.

    value: in force. configured: what it is while the setting is not set, and origin: where that was written. version:
    of the newest document that was applied; 0 for none. refused: the store has something that cannot be used.
    """

    name: str
    value: bool | int | str
    configured: bool | int | str
    origin: str
    version: int
    refused: bool


class InstanceStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """num_open: as in DrainProgress, of the instance's whole process. stalls: how often the engine of this process's
    predecessors made no progress, since the node was started. settings: that the process uses."""

    uptime_s: float
    num_open: int
    stalls: int = 0
    drain: DrainProgress | None = None
    settings: tuple[SettingState, ...] = ()
