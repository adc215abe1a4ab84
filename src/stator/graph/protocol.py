"""What a supervisor and its child processes tell each other.

Down, on the child's standard input: one ChildSpec as a line of JSON. The pipe then stays open; its end means that the
supervisor is gone. Up, on a pipe of its own: one report as a line of JSON whenever there is something to say.
"""

from enum import IntEnum

import msgspec

from stator.config.tree import Node


class ExitCode(IntEnum):
    """FENCED: the instance lost its lease, or the others of its group, and stopped by itself; it may come back at once
    under a new identity."""

    OK = 0
    FAILURE = 1
    CONFIG = 2
    FENCED = 75


class ChildSpec(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One process: which services of the target to run, and how to reach the rest of the deployment.

    services: consumers before the services they call. index: of this copy, from 1. hub: host and port. sections: the
    merged configuration. advertise: the host that peers are told. copies: processes like this one on this node.
    listen_fd: the socket for clients that the copies share. socket_dir: for Unix sockets among the node's processes.
    allow_untested_engine: an engine of a version that this one of Stator was not tested with may be used.
    """

    target: str
    directory: str
    services: tuple[str, ...]
    index: int
    namespace: str
    hub: tuple[str, int]
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

    @property
    def label(self) -> str:
        return f"{self.services[0]}:{self.index}"


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Every service of the process is announced."""


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """Requests for `model` can be finished at `url`. May be reported again."""

    url: str
    model: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why the process is about to exit. config: the user must change something; a restart would not help."""

    message: str
    config: bool = False


Report = Ready | Serving | Failed
