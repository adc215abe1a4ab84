"""Keys, leases and watches of one namespace: the state behind discovery.

Rules:

- A lease is granted for `ttl_s` and ends when it is revoked or was not renewed for `ttl_s` on the clock that the
  caller passes in. Whatever is due ends before the event that `handle` was called with, so that nothing succeeds
  under a lease whose time has passed, however late the caller's timer is.
- A key has one value and at most one lease; a put binds it to the put's lease, or to none. When a lease ends, all its
  keys go in one change.
- Every change (a put, a delete, a lease's end with at least one key) has a revision of its own; revisions only grow.
- A watch gets the whole state of its prefix first (`reset`), then each change that touches the prefix, in revision
  order, with nothing in between left out. Watching again under the same id starts over with the whole state.
- Keys, values, leases and watches are bounded; what would pass a bound is refused and changes nothing.

Lease ids are drawn by the caller and unique over the lives of a server: one that lost its state must not take a
lease of its predecessor for one of its own.
"""

import math
from dataclasses import dataclass

import msgspec

from stator.errors import ErrorCode
from stator.ids import LeaseId


class KeyValue(msgspec.Struct, frozen=True, array_like=True):
    key: str
    value: bytes
    revision: int
    lease_id: LeaseId | None = None


class WatchBatch(msgspec.Struct, frozen=True, omit_defaults=True):
    """reset: `puts` is the whole state of the prefix and replaces what the watcher knew. Otherwise a change."""

    puts: list[KeyValue] = []
    deletes: list[str] = []
    reset: bool = False


@dataclass(frozen=True, slots=True)
class KeyStoreLimits:
    """Values are `InstanceInfo`s and model cards, some kilobytes each; the bounds leave room for a large cluster."""

    max_keys: int = 65_536
    max_key_bytes: int = 1_024
    max_value_bytes: int = 1 << 20
    max_leases: int = 16_384
    max_watches: int = 8_192
    min_ttl_s: float = 0.05
    max_ttl_s: float = 3_600.0


# Events.


@dataclass(frozen=True, slots=True)
class GrantLease:
    lease_id: LeaseId
    ttl_s: float


@dataclass(frozen=True, slots=True)
class RenewLease:
    """Answered True if the lease lives, and then for another ttl_s."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class RevokeLease:
    """Answered True if it was alive."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class Put:
    """Answered with the revision; refused with NOT_FOUND if the lease has ended. only_if_absent: False if present."""

    key: str
    value: bytes
    lease_id: LeaseId | None = None
    only_if_absent: bool = False


@dataclass(frozen=True, slots=True)
class Delete:
    """Answered True if the key was there."""

    key: str


@dataclass(frozen=True, slots=True)
class Get:
    key: str


@dataclass(frozen=True, slots=True)
class GetPrefix:
    prefix: str


@dataclass(frozen=True, slots=True)
class Watch:
    watch_id: int
    prefix: str


@dataclass(frozen=True, slots=True)
class Unwatch:
    watch_id: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; nothing else."""


Event = GrantLease | RenewLease | RevokeLease | Put | Delete | Get | GetPrefix | Watch | Unwatch | Tick


# Effects. An event other than Tick has exactly one of Answer, Found and Refused.


@dataclass(frozen=True, slots=True)
class Answer:
    """value: what the event's docstring says; True where it says nothing. A put answers its revision, 0 for none."""

    value: int


@dataclass(frozen=True, slots=True)
class Found:
    """Sorted by key."""

    entries: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class Notify:
    watch_id: int
    batch: WatchBatch


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """expired False: it was revoked."""

    lease_id: LeaseId
    expired: bool


Effect = Answer | Found | Refused | Notify | LeaseEnded


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    expires_at: float
    keys: set[str]
    granted_at: float


class KeyStore:
    """first_revision: larger than any that an earlier life of the server gave out, if the caller can tell."""

    def __init__(self, limits: KeyStoreLimits | None = None, *, first_revision: int = 1) -> None:
        self._limits = limits or KeyStoreLimits()
        self._next_revision = max(1, first_revision)
        self._entries: dict[str, KeyValue] = {}
        self._leases: dict[LeaseId, _Lease] = {}
        self._watches: dict[int, str] = {}
        # No lease ends before this: a renewal leaves it where it was, the next look at all leases moves it.
        self._no_end_before = math.inf

    @property
    def next_deadline(self) -> float | None:
        """When to send a Tick: no later than the end of the first lease, if nobody renews it."""
        return self._no_end_before if self._leases else None

    @property
    def empty(self) -> bool:
        return not (self._entries or self._leases or self._watches)

    def has_lease(self, lease_id: LeaseId, now: float) -> bool:
        lease = self._leases.get(lease_id)
        return lease is not None and now < lease.expires_at

    def leases(self, now: float) -> list[tuple[LeaseId, float, float, float]]:
        """Living ones: id, ttl_s, seconds left and age in seconds."""
        return [
            (lease_id, lease.ttl_s, lease.expires_at - now, now - lease.granted_at)
            for lease_id, lease in sorted(self._leases.items())
            if now < lease.expires_at
        ]

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects = self._expire(now)
        match event:
            case GrantLease():
                effects.append(self._grant(event, now))
            case RenewLease():
                effects.append(self._renew(event.lease_id, now))
            case RevokeLease():
                alive = event.lease_id in self._leases
                effects.append(Answer(alive))
                if alive:
                    effects += self._end_lease(event.lease_id, expired=False)
            case Put():
                effects += self._put(event)
            case Delete():
                effects += self._delete(event.key)
            case Get():
                found = self._entries.get(event.key)
                effects.append(Found(() if found is None else (found,)))
            case GetPrefix():
                effects.append(Found(tuple(self._under(event.prefix))))
            case Watch():
                effects += self._watch(event)
            case Unwatch():
                effects.append(Answer(self._watches.pop(event.watch_id, None) is not None))
            case Tick():
                pass
        return effects

    def _expire(self, now: float) -> list[Effect]:
        if now < self._no_end_before:
            return []
        due = [(lease.expires_at, lease_id) for lease_id, lease in self._leases.items() if lease.expires_at <= now]
        effects: list[Effect] = []
        for _, lease_id in sorted(due):
            effects += self._end_lease(lease_id, expired=True)
        self._no_end_before = min((lease.expires_at for lease in self._leases.values()), default=math.inf)
        return effects

    def _grant(self, event: GrantLease, now: float) -> Effect:
        limits = self._limits
        if not limits.min_ttl_s <= event.ttl_s <= limits.max_ttl_s:
            return Refused(
                ErrorCode.INVALID_REQUEST,
                f"a lease of {event.ttl_s:g} s is not possible; ask for {limits.min_ttl_s:g} to {limits.max_ttl_s:g} s",
            )
        if event.lease_id in self._leases:
            return Refused(ErrorCode.INVALID_REQUEST, f"lease id {event.lease_id} is in use; draw another")
        if len(self._leases) >= limits.max_leases:
            return Refused(ErrorCode.OVERLOADED, f"discovery holds {limits.max_leases} leases, which is its bound")
        self._leases[event.lease_id] = _Lease(event.ttl_s, now + event.ttl_s, set(), now)
        self._no_end_before = min(self._no_end_before, now + event.ttl_s)
        return Answer(True)

    def _renew(self, lease_id: LeaseId, now: float) -> Effect:
        lease = self._leases.get(lease_id)
        if lease is None:
            return Answer(False)
        lease.expires_at = now + lease.ttl_s
        return Answer(True)

    def _put(self, event: Put) -> list[Effect]:
        refusal = self._refuse_put(event)
        if refusal is not None:
            return [refusal]
        known = self._entries.get(event.key)
        if known is not None and event.only_if_absent:
            return [Answer(0)]
        if known is not None:
            self._unbind(known)
        entry = KeyValue(event.key, event.value, self._take_revision(), event.lease_id)
        self._entries[event.key] = entry
        if event.lease_id is not None:
            self._leases[event.lease_id].keys.add(event.key)
        return [Answer(entry.revision), *self._notify(puts=[entry], deletes=[])]

    def _refuse_put(self, event: Put) -> Refused | None:
        limits = self._limits
        num_key_bytes = len(event.key.encode("utf-8", "surrogatepass"))
        if not 0 < num_key_bytes <= limits.max_key_bytes:
            return Refused(
                ErrorCode.INVALID_REQUEST, f"a key has 1 to {limits.max_key_bytes} bytes; this one has {num_key_bytes}"
            )
        if len(event.value) > limits.max_value_bytes:
            return Refused(
                ErrorCode.INVALID_REQUEST,
                f"the value of {event.key!r} has {len(event.value)} bytes; at most {limits.max_value_bytes} are kept",
            )
        if event.lease_id is not None and event.lease_id not in self._leases:
            return Refused(
                ErrorCode.NOT_FOUND, f"lease {event.lease_id} of key {event.key!r} has ended; take a new lease"
            )
        if event.key not in self._entries and len(self._entries) >= limits.max_keys:
            return Refused(ErrorCode.OVERLOADED, f"discovery holds {limits.max_keys} keys, which is its bound")
        return None

    def _delete(self, key: str) -> list[Effect]:
        entry = self._entries.pop(key, None)
        if entry is None:
            return [Answer(False)]
        self._unbind(entry)
        self._take_revision()
        return [Answer(True), *self._notify(puts=[], deletes=[key])]

    def _end_lease(self, lease_id: LeaseId, *, expired: bool) -> list[Effect]:
        keys = sorted(self._leases.pop(lease_id).keys)
        effects: list[Effect] = [LeaseEnded(lease_id, expired)]
        if keys:
            for key in keys:
                del self._entries[key]
            self._take_revision()
            effects += self._notify(puts=[], deletes=keys)
        return effects

    def _watch(self, event: Watch) -> list[Effect]:
        if event.watch_id not in self._watches and len(self._watches) >= self._limits.max_watches:
            return [
                Refused(ErrorCode.OVERLOADED, f"discovery has {self._limits.max_watches} watches, which is its bound")
            ]
        self._watches[event.watch_id] = event.prefix
        return [Answer(True), Notify(event.watch_id, WatchBatch(puts=self._under(event.prefix), reset=True))]

    def _notify(self, *, puts: list[KeyValue], deletes: list[str]) -> list[Effect]:
        effects: list[Effect] = []
        for watch_id, prefix in self._watches.items():
            seen_puts = [entry for entry in puts if entry.key.startswith(prefix)]
            seen_deletes = [key for key in deletes if key.startswith(prefix)]
            if seen_puts or seen_deletes:
                effects.append(Notify(watch_id, WatchBatch(puts=seen_puts, deletes=seen_deletes)))
        return effects

    def _under(self, prefix: str) -> list[KeyValue]:
        return [self._entries[key] for key in sorted(self._entries) if key.startswith(prefix)]

    def _unbind(self, entry: KeyValue) -> None:
        if entry.lease_id is not None:
            self._leases[entry.lease_id].keys.discard(entry.key)

    def _take_revision(self) -> int:
        revision = self._next_revision
        self._next_revision += 1
        return revision
