"""Which queues of a namespace NATS has, for people and their tools."""

import re

import msgspec

from stator.core.job_queue_events import QueueLimits
from stator.errors import ErrorCode, StatorError
from stator.queue.nats_connection import JetStreamError, NatsConnection
from stator.queue.nats_log import LogNames

_LOG = re.compile(r"STATOR-.+?-([A-Za-z0-9_-]+)-[0-9a-f]{8}-[0-9a-f]{8}-LOG")


class _Names(msgspec.Struct, frozen=True):
    total: int = 0
    streams: tuple[str, ...] | None = ()


async def queue_names(connection: NatsConnection, namespace: str, limits: QueueLimits | None = None) -> list[str]:
    """Sorted; of this version's rules alone, and only names that a stream's name keeps (letters, digits, `-`, `_`).

    Makes nothing. Raises StatorError if JetStream does not answer."""
    limits = limits or QueueLimits()
    found: set[str] = set()
    offset = 0
    while True:
        try:
            page = await connection.api("STREAM.NAMES", {"offset": offset}, _Names)
        except JetStreamError as error:
            raise StatorError(ErrorCode.UNAUTHORIZED, f"{connection.name}: JetStream refused: {error}") from None
        streams = page.streams or ()
        for stream in streams:
            # Either name may have dashes: the digest of both decides.
            for name in _candidates(stream):
                if LogNames(namespace, name, limits).log == stream:
                    found.add(name)
        offset += len(streams)
        if not streams or offset >= page.total:
            return sorted(found)


def _candidates(stream: str) -> list[str]:
    if _LOG.fullmatch(stream) is None:
        return []
    parts = stream.split("-")[1:-3]
    return ["-".join(parts[n:]) for n in range(1, len(parts))]
