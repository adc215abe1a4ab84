"""What a supervisor and its child processes tell each other.

Down, on the child's standard input: one ChildSpec as a line of JSON. The pipe then stays open; its end means that the
supervisor is gone. Up, on a pipe of its own: one report as a line of JSON whenever there is something to say.
"""

from enum import IntEnum

import msgspec

from stator.config.external import ExternalPlanes
from stator.config.tree import Node

SUCCESSOR_TIMEOUT_S = 120.0
"""For a process that takes another's place to be ready, before that one goes; it may have to download a tokenizer."""


class ExitCode(IntEnum):
    """FENCED: the instance lost its lease, or the others of its group, and stopped by itself; it may come back at once
    under a new identity. DRAINED: it was asked to drain, and is not to be started again; RESTART: it was, and is.
    STALLED: its engine made no progress; it comes back as one that was fenced does."""

    OK = 0
    FAILURE = 1
    CONFIG = 2
    FENCED = 75
    DRAINED = 76
    RESTART = 77
    STALLED = 78


class ChildSpec(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One process: which services of the target to run, and how to reach the rest of the deployment.

    services: consumers before the services they call. index: of this copy, from 1. hub: host and port; without it,
    external: etcd and NATS. sections: the
    merged configuration. advertise: the host that peers are told. copies: processes like this one on this node.
    listen_fd: the socket for clients that the copies share. socket_dir: for Unix sockets among the node's processes.
    allow_untested_engine: an engine of a version that this one of Stator was not tested with may be used.
    grace_s: after a stop was asked for, until what is left is killed. overlaps: a process that takes this one's place
    may run beside it, so that it is started first. stalls: of this process's predecessors.
    """

    target: str
    directory: str
    services: tuple[str, ...]
    index: int
    namespace: str
    hub: tuple[str, int] | None = None
    external: ExternalPlanes | None = None
    token: str
    host: str
    advertise: str
    port_range: tuple[int, int] | None = None
    sections: dict[str, Node]
    source: str
    supervisor_pid: int
    status_fd: int
    copies: int = 1
    listen_fd: int | None = None
    socket_dir: str | None = None
    allow_untested_engine: bool = False
    grace_s: float = 30.0
    overlaps: bool = False
    stalls: int = 0

    @property
    def label(self) -> str:
        return f"{self.services[0]}:{self.index}"


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Every service of the process is announced."""


class Announcing(msgspec.Struct, frozen=True, tag="announcing"):
    """keys: in discovery, of the instances of this process from now on. When it has died, they mean nothing more."""

    keys: tuple[str, ...]


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """Requests for `model` can be finished at `url`. May be reported again."""

    url: str
    model: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why the process is about to exit. config: the user must change something; a restart would not help."""

    message: str
    config: bool = False


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """Asked to drain and to be started again: start the successor, and send SIGTERM when it is ready."""


class Hung(msgspec.Struct, frozen=True, tag="hung"):
    """The engine makes no progress, and the process is about to exit. What it computes on may never return, so that
    the process may have to be killed."""

    message: str


Report = Ready | Announcing | Serving | Failed | Leaving | Hung
