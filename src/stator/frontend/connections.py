"""Which connections are open, and which goes when there are too many. Pure but for `allowed_by_open_files`."""

import logging
import resource
from collections.abc import Iterator
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

RESERVED_FILES = 512
"""Of the process's open files, for everything that is no client's connection."""

Connection = TypeVar("Connection")


class OpenConnections(Generic[Connection]):
    """As much of a set as uvicorn needs, in the order of arrival: ending what is open is done in that order too.

    A connection waits from its arrival to the end of its first request's head, and between an answer and the next
    request. Those that wait go first when there are more than max_open, and of them those that were never answered:
    so whoever only opens connections cannot keep out, or throw out, those who use them. num_discarding: on which a
    body is dropped that was refused.
    """

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self.num_discarding = 0
        self._all: dict[Connection, None] = {}
        self._new: dict[Connection, None] = {}
        self._kept: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._all)

    def add(self, connection: Connection) -> None:
        self._all[connection] = None
        self._new[connection] = None

    def discard(self, connection: Connection) -> None:
        self._all.pop(connection, None)
        self.busy(connection)

    def busy(self, connection: Connection) -> None:
        """A request is being answered on it."""
        if self._new.pop(connection, self) is self:
            self._kept.pop(connection, None)

    def waits(self, connection: Connection) -> None:
        """A request was answered on it, and none follows yet."""
        if connection in self._all:
            self._kept[connection] = None

    def take_surplus(self) -> Connection | None:
        """A connection to close, no longer counted; None within the bound. If none waits it is the newest."""
        if len(self._all) <= self._max_open:
            return None
        victim = next(iter(self._new or self._kept or reversed(self._all)))
        self.discard(victim)
        return victim


def allowed_by_open_files(wanted: int) -> int:
    """How many of the wanted connections the limit on open files lets a process have, after raising it if possible."""
    needed = wanted + RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError) as error:
            logger.warning("the limit of %d open files cannot be raised: %s", soft, error)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = max(soft - RESERVED_FILES, soft // 2)
    logger.warning("at most %d connections instead of %d: the limit on open files is %d", allowed, wanted, soft)
    return allowed
