"""How a watch of an etcd prefix goes on over lost connections, other members and compaction, without a gap.

Rules:

- A watch begins with the whole state of its prefix at some revision and then asks for everything after it. Whatever
  connection or member it is moved to, it asks for what comes after the last revision that it has told.
- What etcd sends again, at or before that revision, is dropped. Several changes of one revision (a lease's end) are one
  batch; etcd never splits a revision over two responses.
- A revision that was compacted away, or that the store has not reached (it was wiped, or restored from an older copy),
  cannot be resumed: the watch begins again with the whole state.
- A response that creates the watch says nothing of progress: older changes may still follow it. One without events that
  neither creates nor cancels does: everything up to its revision was sent.
"""

from collections.abc import Sequence
from enum import StrEnum, auto

import msgspec

from stator.core.key_store import KeyValue, WatchBatch
from stator.ids import LeaseId


class EventType(StrEnum):
    PUT = "PUT"
    DELETE = "DELETE"


class Header(msgspec.Struct, frozen=True):
    """Of every answer. revision: of the whole store, when the answer was made."""

    revision: int = 0
    cluster_id: int = 0
    member_id: int = 0


class Entry(msgspec.Struct, frozen=True):
    """A key as etcd's gateway shows it. lease: 0 for none."""

    key: bytes
    value: bytes = b""
    mod_revision: int = 0
    create_revision: int = 0
    lease: int = 0


class Event(msgspec.Struct, frozen=True):
    kv: Entry
    type: EventType = EventType.PUT


class WatchResponse(msgspec.Struct, frozen=True):
    """compact_revision: the oldest one that can still be watched, if the watch was cancelled for asking for less."""

    header: Header = Header()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: tuple[Event, ...] = ()


class Next(StrEnum):
    """What a watch does after a response."""

    GO_ON = auto()
    READ_STATE = auto()
    TRY_AGAIN = auto()


def entry_of(entry: Entry, prefix_bytes: int) -> KeyValue:
    """prefix_bytes: of the namespace, which callers do not see."""
    key = entry.key[prefix_bytes:].decode(errors="replace")
    return KeyValue(key, entry.value, entry.mod_revision, LeaseId(entry.lease) if entry.lease else None)


class WatchCursor:
    """Where one watch is. prefix_bytes: how much of each key is the namespace's prefix."""

    def __init__(self, prefix_bytes: int) -> None:
        self._prefix_bytes = prefix_bytes
        self._revision: int | None = None

    @property
    def start_revision(self) -> int | None:
        """What to ask for next; None: read the whole state first."""
        return None if self._revision is None else self._revision + 1

    def state_read(self, revision: int) -> None:
        """The whole state as of that revision has been told."""
        self._revision = revision

    def reached(self, revision: int) -> bool:
        """Whether a store at that revision, read from its majority, can be one that the watch has seen so far."""
        return self._revision is None or revision >= self._revision

    def forget(self) -> None:
        """The whole state must be read again."""
        self._revision = None

    def receive(self, response: WatchResponse) -> tuple[list[WatchBatch], Next]:
        """Changes to tell, one batch for each revision, and what to do then."""
        assert self._revision is not None
        if response.compact_revision:
            self.forget()
            return [], Next.READ_STATE
        batches = self._batches(response.events)
        if response.canceled:
            return batches, Next.TRY_AGAIN
        if not response.events and not response.created:
            self._revision = max(self._revision, response.header.revision)
        return batches, Next.GO_ON

    def _batches(self, events: Sequence[Event]) -> list[WatchBatch]:
        assert self._revision is not None
        told = self._revision
        batches: dict[int, WatchBatch] = {}
        for event in events:
            revision = event.kv.mod_revision
            if revision <= told:
                continue
            batch = batches.setdefault(revision, WatchBatch(puts=[], deletes=[]))
            if event.type is EventType.DELETE:
                batch.deletes.append(event.kv.key[self._prefix_bytes :].decode(errors="replace"))
            else:
                batch.puts.append(entry_of(event.kv, self._prefix_bytes))
            self._revision = max(self._revision, revision)
        return [batches[revision] for revision in sorted(batches)]
