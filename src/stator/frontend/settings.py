"""The Frontend's bounds. Each has a default that suits a deployment of up to a few thousand streams per process."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FrontendSettings:
    """default_deadline_s: for requests that name none; max_deadline_s: the most a request may ask for.

    max_open_requests: chat and completion requests at once, from their head to their end; more are refused.
    max_arriving_bodies: of which a part is still to come; at the bound the one that began first is given up.
    max_bodies_bytes: of all bodies of open requests together, without the first 64 KiB of each.
    max_buffered_deltas: per stream, while its client reads slowly; then the Processor is asked to pause.
    slow_reader_timeout_s: a stream that is paused, and of which its client takes nothing for so long, is ended.
    max_stored_responses, max_stored_bytes, max_stored_age_s: of `/v1/responses`, kept so that they can be continued.
    """

    max_body_bytes: int = 8 * 1024 * 1024
    receive_timeout_s: float = 30.0
    max_arriving_bodies: int = 1024
    max_bodies_bytes: int = 256 * 1024 * 1024
    default_deadline_s: float = 3600.0
    max_deadline_s: float = 24 * 3600.0
    max_open_requests: int = 4096
    max_buffered_deltas: int = 256
    slow_reader_timeout_s: float = 30.0
    max_stored_responses: int = 4096
    max_stored_bytes: int = 64 * 1024 * 1024
    max_stored_age_s: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """head_timeout_s: for the request line and headers to arrive, and for a fresh connection to say anything.

    write_timeout_s: how long a client may accept no byte before its connection is dropped. rest_timeout_s: for it to
    accept what is unwritten when its answer has ended.
    max_connections: of one process, as far as its limit on open files allows; at the bound one that waits is closed.
    max_head_bytes, max_headers: of one request, the trailers of its body with them.
    kernel_receive_bytes: of one connection, what is kept unread outside the process; bounds how fast a body comes.
    max_pipelined: requests that wait on one connection behind the one that is being answered.
    """

    keep_alive_s: float = 75.0
    head_timeout_s: float = 30.0
    max_connections: int = 16_384
    max_head_bytes: int = 16 * 1024
    max_headers: int = 100
    max_pipelined: int = 32
    kernel_receive_bytes: int = 256 * 1024
    write_timeout_s: float = 120.0
    rest_timeout_s: float = 600.0
    backlog: int = 2048
