"""Bounds and times of the request plane. Each has one meaning on all carriers."""

from dataclasses import dataclass, field

from stator.config.node_tls import NodeTls
from stator.ids import InstanceId
from stator.transport.base import Lane

KIB = 1024
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """window_items: items of one stream that may be on their way to, or held by, a caller that paused it.

    max_buffered_items: items of one stream that wait at the sender for credit; one more ends it with SLOW_READER.
    max_write_buffer_bytes: what may wait in one connection's socket buffer of this process; past it the streams that
    have more to send end with SLOW_READER. write_high_water_bytes: above it `Call.writable` waits.
    max_streams: open streams per connection (per name in process); one more is refused with OVERLOADED.
    max_connections: of a server, authenticated ones. max_unauthenticated: that are still shaking hands; one more, and
    the oldest of them is closed, so that who only holds connections open keeps nobody out.
    max_headers, max_header_bytes: of a call; max_name_bytes: of an endpoint, a request or an instance in a frame.
    ping_interval_s: of silence of our own before we say something. heartbeat_timeout_s: of the peer's silence, or of
    its not reading anything, after which the connection counts as lost.
    """

    window_items: int = 256
    bulk_window_items: int = 16
    max_buffered_items: int = 16_384
    max_write_buffer_bytes: int = 128 * MIB
    write_high_water_bytes: int = 1 * MIB
    max_frame_bytes: int = 32 * MIB
    max_bulk_frame_bytes: int = 64 * MIB
    max_handshake_frame_bytes: int = 16 * KIB
    max_streams: int = 4096
    max_connections: int = 4096
    max_unauthenticated: int = 512
    max_headers: int = 32
    max_header_bytes: int = 8 * KIB
    max_name_bytes: int = 1 * KIB
    ping_interval_s: float = 2.0
    heartbeat_timeout_s: float = 10.0
    connect_timeout_s: float = 5.0
    handshake_timeout_s: float = 5.0
    idle_close_s: float = 60.0
    close_timeout_s: float = 2.0

    def __post_init__(self) -> None:
        if self.window_items < 2 or self.bulk_window_items < 2:
            raise ValueError("window_items and bulk_window_items must be at least 2")
        if self.max_buffered_items < max(self.window_items, self.bulk_window_items):
            raise ValueError("max_buffered_items must be at least a window")
        if self.ping_interval_s >= self.heartbeat_timeout_s:
            raise ValueError("ping_interval_s must be less than heartbeat_timeout_s")

    def window(self, lane: Lane) -> int:
        return self.bulk_window_items if lane is Lane.BULK else self.window_items

    def frame_limit(self, lane: Lane) -> int:
        return self.max_bulk_frame_bytes if lane is Lane.BULK else self.max_frame_bytes


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is to its peers. token: the deployment's shared secret; only its proof travels.

    Without a token nothing crosses a socket; calls in process need none. role: for the peers' logs. tls: over TCP, with
    this certificate; None: in plain text. Unix sockets have none, since the system says who may connect.
    guests: other namespaces whose callers a server takes as well, if they prove the same token: a hub's.
    """

    namespace: str = "stator"
    instance_id: InstanceId = InstanceId("")
    role: str = ""
    token: str | None = field(default=None, repr=False)
    tls: NodeTls | None = None
    guests: frozenset[str] = frozenset()

    def takes(self, namespace: str) -> bool:
        """Whether a server of this identity lets callers of that namespace in."""
        return namespace == self.namespace or namespace in self.guests


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a server is reached. host None: no TCP. port 0: any free one, or the first free of port_range (inclusive).

    advertise: the host that peers are told, by default `host`; needed if that is a wildcard such as 0.0.0.0.
    unix_path: also on this Unix socket. inproc_name: also in process, under this name of the server's network.
    """

    host: str | None = "127.0.0.1"
    port: int = 0
    port_range: tuple[int, int] | None = None
    advertise: str | None = None
    unix_path: str | None = None
    inproc_name: str | None = None
