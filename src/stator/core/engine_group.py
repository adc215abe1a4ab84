"""How the processes of an engine that spreads over several nodes find each other, as one of them sees it. Pure.

The first to make the service's offer becomes rank 0 and waits; each of the others takes the lowest free rank. When all
ranks are taken, rank 0 publishes who is who, and everybody starts the engine. The shell carries effects out in order
and hands in what came of them (`Answer`, `Published`); after each it waits for the next `GroupView`, which cannot fail
to come: a creation that succeeded, and one that found the key taken, are both changes that this process has not seen.

    LOOKING --no offer-----------------------> (make it) ---> LEADING
    LOOKING --an offer with a free rank------> (take it) ---> JOINED
    LOOKING --an offer of other settings-----> ENDED          refused: the configurations differ
    LEADING --all ranks taken----------------> (publish) ---> RUNNING
    JOINED  --a start that names it----------> RUNNING
    JOINED  --offer gone, or a start without-> LOOKING        nothing was started yet: look again
    RUNNING --any other member gone----------> ENDED          vLLM cannot go on with fewer: all start again

What ends before the start costs nothing; what ends after it ends the whole group, and a new one has another name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import msgspec

from stator.errors import DECODE_ERRORS
from stator.ids import InstanceId
from stator.messages import engine_groups as messages
from stator.messages.engine_groups import GroupMember, GroupOffer, GroupStart

T = TypeVar("T")


class State(StrEnum):
    LOOKING = "looking"
    ASKING = "asking"
    LEADING = "leading"
    JOINED = "joined"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class GroupView:
    """What discovery has of a service's groups. ranks, starts: by group."""

    offer: GroupOffer | None = None
    ranks: Mapping[str, Mapping[int, GroupMember]] = field(default_factory=dict[str, dict[int, GroupMember]])
    starts: Mapping[str, GroupStart] = field(default_factory=dict[str, GroupStart])


@dataclass(frozen=True, slots=True)
class Answer:
    """Of the last MakeOffer or TakeRank: whether the key was free."""

    created: bool


@dataclass(frozen=True, slots=True)
class Published:
    """What PublishStart wrote."""

    start: GroupStart


@dataclass(frozen=True, slots=True)
class MakeOffer:
    offer: GroupOffer


@dataclass(frozen=True, slots=True)
class TakeRank:
    group: str
    member: GroupMember


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Give the rank back."""

    group: str
    rank: int


@dataclass(frozen=True, slots=True)
class PublishStart:
    """Choose a port, write the start, then delete the offer: in this order, or the group would seem gone."""

    members: tuple[GroupMember, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    start: GroupStart
    rank: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """num_missing: nodes; 0 while all are there and the first has not started yet. first: the host of rank 0."""

    num_missing: int
    num_nodes: int
    rank: int
    first: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The user must change something."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The group is gone after its start: stop, and come back as a new instance."""

    reason: str


Event = GroupView | Answer | Published
Effect = MakeOffer | TakeRank | Withdraw | PublishStart | Launch | Waiting | Refuse | Broken


class EngineGroup:
    """One process's part; `handle` is the only entry."""

    def __init__(self, *, instance_id: InstanceId, host: str, num_nodes: int, settings: Mapping[str, str]) -> None:
        """num_nodes: 2 or more. settings: see GroupOffer."""
        self.state = State.LOOKING
        self._id = instance_id
        self._host = host
        self._num_nodes = num_nodes
        self._settings = dict(settings)
        self._asked: MakeOffer | TakeRank | None = None
        self._start: GroupStart | None = None
        self._told: Waiting | None = None

    def handle(self, event: Event) -> list[Effect]:
        match event:
            case Answer(created):
                return self._answered(created)
            case Published(start):
                self._start = start
                self.state = State.RUNNING
                return [Launch(start, 0)]
            case GroupView():
                return self._looked(event)

    def _answered(self, created: bool) -> list[Effect]:
        if not created:
            self.state = State.LOOKING
        elif isinstance(self._asked, MakeOffer):
            self.state = State.LEADING
            return self._waiting(self._num_nodes - 1, 0, self._host)
        else:
            self.state = State.JOINED
        return []

    def _looked(self, view: GroupView) -> list[Effect]:
        match self.state:
            case State.LOOKING:
                return self._look(view)
            case State.LEADING:
                return self._lead(view)
            case State.JOINED:
                return self._wait_for_start(view)
            case State.RUNNING:
                return self._check(view)
            case State.ASKING | State.ENDED:
                return []

    def _look(self, view: GroupView) -> list[Effect]:
        offer = view.offer
        if offer is None:
            return self._ask(MakeOffer(GroupOffer(self._member(0), self._num_nodes, self._settings)))
        if (reason := self._refusal(offer)) is not None:
            self.state = State.ENDED
            return [Refuse(reason)]
        taken = view.ranks.get(offer.group, {})
        free = [rank for rank in range(1, offer.num_nodes) if rank not in taken]
        # Without a free rank the group is about to start, and the next offer will be another's or ours.
        return self._ask(TakeRank(offer.group, self._member(free[0]))) if free else []

    def _ask(self, question: MakeOffer | TakeRank) -> list[Effect]:
        self.state = State.ASKING
        self._asked = question
        return [question]

    def _lead(self, view: GroupView) -> list[Effect]:
        taken = view.ranks.get(str(self._id), {})
        missing = self._num_nodes - 1 - len(taken)
        if missing:
            return self._waiting(missing, 0, self._host)
        return [PublishStart((self._member(0), *(taken[rank] for rank in sorted(taken))))]

    def _wait_for_start(self, view: GroupView) -> list[Effect]:
        assert isinstance(self._asked, TakeRank)
        group, rank = self._asked.group, self._asked.member.rank
        start = view.starts.get(group)
        if start is not None and self._asked.member in start.members:
            self._start = start
            self.state = State.RUNNING
            return [Launch(start, rank)]
        if start is not None or view.offer is None or view.offer.group != group:
            # The first process has ended, or it started with another one, which has ended since.
            self.state = State.LOOKING
            self._told = None
            return [Withdraw(group, rank)]
        missing = self._num_nodes - 1 - len(view.ranks.get(group, {}))
        return self._waiting(missing, rank, view.offer.first.host)

    def _check(self, view: GroupView) -> list[Effect]:
        start = self._start
        assert start is not None
        first, *others = start.members
        gone: GroupMember | None = None
        if first.instance_id != self._id and start.group not in view.starts:
            gone = first
        else:
            ranks = view.ranks.get(start.group, {})
            gone = next((m for m in others if m.instance_id != self._id and ranks.get(m.rank) != m), None)
        if gone is None:
            return []
        self.state = State.ENDED
        return [
            Broken(
                f"the engine runs on {len(start.members)} nodes, and node {gone.rank} of them, {gone.host} "
                f"({gone.instance_id}), has ended; the others start again and form a new group with it"
            )
        ]

    def _waiting(self, missing: int, rank: int, first: str) -> list[Effect]:
        waiting = Waiting(missing, self._num_nodes, rank, first)
        if waiting == self._told:
            return []
        self._told = waiting
        return [waiting]

    def _member(self, rank: int) -> GroupMember:
        return GroupMember(rank, self._id, self._host)

    def _refusal(self, offer: GroupOffer) -> str | None:
        ours, theirs = self._settings, offer.settings
        keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        if not keys:
            return None
        differences = ", ".join(
            f"{k} is {ours.get(k, 'not set')} here and {theirs.get(k, 'not set')} there" for k in keys
        )
        return (
            f"this node and {offer.first.host} ({offer.first.instance_id}) would run one engine over {offer.num_nodes} "
            f"nodes, but are configured differently: {differences}. Start every node with the same file and flags"
        )


def read_view(service: str, entries: Mapping[str, bytes]) -> GroupView:
    """entries: by key, below `groups_prefix(service)`. What is not understood is left out."""
    offer = _decode(entries.get(messages.offer_key(service)), GroupOffer)
    prefix = f"{messages.groups_prefix(service)}groups/"
    ranks: dict[str, dict[int, GroupMember]] = {}
    starts: dict[str, GroupStart] = {}
    for key, value in entries.items():
        group, _, rest = key.removeprefix(prefix).partition("/")
        if not key.startswith(prefix):
            continue
        if rest == "start" and (start := _decode(value, GroupStart)) is not None:
            starts[group] = start
        elif rest.startswith("ranks/") and (member := _decode(value, GroupMember)) is not None:
            ranks.setdefault(group, {})[member.rank] = member
    return GroupView(offer, ranks, starts)


def _decode(value: bytes | None, kind: type[T]) -> T | None:
    if value is None:
        return None
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except DECODE_ERRORS:
        return None
