"""The group of an engine over several nodes: its table, and any number of processes on a store in any order."""

from collections import deque
from collections.abc import Mapping

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.core import engine_group as core
from stator.core.engine_group import Answer, EngineGroup, GroupView, Published, State, read_view
from stator.ids import InstanceId
from stator.messages.engine_groups import (
    GroupMember,
    GroupOffer,
    GroupStart,
    groups_prefix,
    offer_key,
    rank_key,
    start_key,
)

SERVICE = "VllmWorker"
SETTINGS = {"tensor-parallel-size": "16", "nnodes": "2"}


def group(name: str = "b", num_nodes: int = 2, given_settings: Mapping[str, str] = SETTINGS) -> EngineGroup:
    return EngineGroup(instance_id=InstanceId(name), host=f"host-{name}", num_nodes=num_nodes, settings=given_settings)


def member(rank: int, name: str) -> GroupMember:
    return GroupMember(rank, InstanceId(name), f"host-{name}")


OFFER = GroupOffer(member(0, "a"), 2, SETTINGS)
START = GroupStart((member(0, "a"), member(1, "b")), "host-a", 29501)


def joined() -> EngineGroup:
    one = group()
    assert one.handle(GroupView(OFFER)) == [core.TakeRank("a", member(1, "b"))]
    assert one.handle(Answer(True)) == []
    return one


def leading() -> EngineGroup:
    one = group("a")
    assert one.handle(GroupView()) == [core.MakeOffer(OFFER)]
    assert one.handle(Answer(True)) == [core.Waiting(1, 2, 0, "host-a")]
    return one


def test_the_first_waits_publishes_and_runs() -> None:
    one = leading()
    assert one.handle(GroupView(OFFER)) == []
    view = GroupView(OFFER, {"a": {1: member(1, "b")}})
    assert one.handle(view) == [core.PublishStart(START.members)]
    assert one.handle(Published(START)) == [core.Launch(START, 0)]
    running = GroupView(None, {"a": {1: member(1, "b")}}, {"a": START})
    assert one.handle(running) == []
    (broken,) = one.handle(GroupView(None, {}, {"a": START}))
    assert isinstance(broken, core.Broken) and "node 1 of them, host-b (b), has ended" in broken.reason
    assert one.handle(running) == [] and one.state is State.ENDED


def test_another_takes_the_lowest_free_rank_and_starts_with_the_first() -> None:
    one = joined()
    view = GroupView(OFFER, {"a": {1: member(1, "b")}})
    assert one.handle(view) == [core.Waiting(0, 2, 1, "host-a")]
    assert one.handle(GroupView(OFFER, view.ranks, {"a": START})) == [core.Launch(START, 1)]
    assert one.handle(GroupView(None, view.ranks, {"a": START})) == []
    (broken,) = one.handle(GroupView(None, view.ranks))
    assert isinstance(broken, core.Broken) and "node 0 of them, host-a (a)" in broken.reason


def test_who_comes_second_tries_again_with_what_it_sees_next() -> None:
    one = group("c", num_nodes=3)
    offer = GroupOffer(member(0, "a"), 3, SETTINGS)
    assert one.handle(GroupView()) == [core.MakeOffer(GroupOffer(member(0, "c"), 3, SETTINGS))]
    assert one.handle(Answer(False)) == []
    assert one.handle(GroupView(offer)) == [core.TakeRank("a", member(1, "c"))]
    assert one.handle(Answer(False)) == []
    assert one.handle(GroupView(offer, {"a": {1: member(1, "b")}})) == [core.TakeRank("a", member(2, "c"))]


def test_a_full_group_is_left_alone_until_its_offer_is_gone() -> None:
    one = group("c")
    assert one.handle(GroupView(OFFER, {"a": {1: member(1, "b")}})) == []
    assert one.handle(GroupView(None, {"a": {1: member(1, "b")}}, {"a": START})) == [
        core.MakeOffer(GroupOffer(member(0, "c"), 2, SETTINGS))
    ]


def test_the_death_of_the_first_before_the_start_costs_only_the_rank() -> None:
    one = joined()
    assert one.handle(GroupView(None, {"a": {1: member(1, "b")}})) == [core.Withdraw("a", 1)]
    assert one.handle(GroupView()) == [core.MakeOffer(GroupOffer(member(0, "b"), 2, SETTINGS))]


def test_a_rank_taken_after_the_start_is_given_back() -> None:
    """The holder of it died, the first had seen it, and the rank looked free."""
    one = joined()
    start = GroupStart((member(0, "a"), member(1, "x")), "host-a", 29501)
    assert one.handle(GroupView(OFFER, {"a": {1: member(1, "b")}}, {"a": start})) == [core.Withdraw("a", 1)]


def test_a_member_that_was_replaced_breaks_the_group() -> None:
    one = leading()
    assert one.handle(GroupView(OFFER, {"a": {1: member(1, "b")}})) == [core.PublishStart(START.members)]
    one.handle(Published(START))
    (broken,) = one.handle(GroupView(None, {"a": {1: member(1, "x")}}, {"a": START}))
    assert isinstance(broken, core.Broken)


def test_a_member_that_ends_before_the_start_is_waited_for_again() -> None:
    one = group("a", num_nodes=3)
    one.handle(GroupView())
    assert one.handle(Answer(True)) == [core.Waiting(2, 3, 0, "host-a")]
    offer = GroupOffer(member(0, "a"), 3, SETTINGS)
    assert one.handle(GroupView(offer, {"a": {1: member(1, "b")}})) == [core.Waiting(1, 3, 0, "host-a")]
    assert one.handle(GroupView(offer)) == [core.Waiting(2, 3, 0, "host-a")]


def test_other_settings_are_refused_by_name() -> None:
    one = group("b", given_settings={"tensor-parallel-size": "8", "nnodes": "2", "block-size": "32"})
    (refused,) = one.handle(GroupView(OFFER))
    assert refused == core.Refuse(
        "this node and host-a (a) would run one engine over 2 nodes, but are configured differently: block-size is 32 "
        "here and not set there, tensor-parallel-size is 8 here and 16 there. Start every node with the same file and "
        "flags"
    )
    assert one.handle(GroupView()) == []


def test_a_view_leaves_out_what_it_does_not_understand() -> None:
    entries = {
        offer_key(SERVICE): b"\xc1",
        rank_key(SERVICE, "a", 1): msgspec.msgpack.encode(member(1, "b")),
        rank_key(SERVICE, "a", 2): b"",
        rank_key(SERVICE, "a", 3): msgspec.msgpack.encode(member(3, "c")).replace(b"host-c", b"host-\x80"),
        start_key(SERVICE, "a"): msgspec.msgpack.encode(START),
        f"{groups_prefix(SERVICE)}groups/a/later": b"x",
    }
    assert read_view(SERVICE, entries) == GroupView(None, {"a": {1: member(1, "b")}}, {"a": START})


class World:
    """Processes on one store. Each sees every state of the store in order, as late as it likes."""

    def __init__(self, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self.store: dict[str, tuple[bytes, str]] = {}
        self.running: dict[str, tuple[str, int]] = {}
        self.launches: dict[tuple[str, int], str] = {}
        self.processes: dict[str, tuple[EngineGroup, deque[dict[str, bytes]]]] = {}
        self.num_started = 0

    def start(self) -> None:
        name = f"p{self.num_started}"
        self.num_started += 1
        self.processes[name] = (group(name, self.num_nodes), deque([self.snapshot()]))

    def snapshot(self) -> dict[str, bytes]:
        return {key: value for key, (value, _) in self.store.items()}

    def changed(self) -> None:
        for _, views in self.processes.values():
            views.append(self.snapshot())

    def end(self, name: str) -> None:
        del self.processes[name]
        self.running.pop(name, None)
        kept = {key: entry for key, entry in self.store.items() if entry[1] != name}
        if kept != self.store:
            self.store = kept
            self.changed()

    def create(self, key: str, value: bytes, owner: str) -> Answer:
        if key in self.store:
            return Answer(False)
        self.put(key, value, owner)
        return Answer(True)

    def put(self, key: str, value: bytes, owner: str) -> None:
        self.store[key] = (value, owner)
        self.changed()

    def delete(self, key: str) -> None:
        if self.store.pop(key, None) is not None:
            self.changed()

    def step(self, name: str, *, dies_while_publishing: bool = False) -> None:
        one, views = self.processes[name]
        events: deque[core.Event] = deque([read_view(SERVICE, views.popleft())])
        while events:
            for effect in one.handle(events.popleft()):
                match effect:
                    case core.MakeOffer(offer):
                        events.append(self.create(offer_key(SERVICE), msgspec.msgpack.encode(offer), name))
                    case core.TakeRank(of, taken):
                        key = rank_key(SERVICE, of, taken.rank)
                        events.append(self.create(key, msgspec.msgpack.encode(taken), name))
                    case core.Withdraw(of, rank):
                        self.delete(rank_key(SERVICE, of, rank))
                    case core.PublishStart(members):
                        start = GroupStart(members, members[0].host, 1)
                        self.put(start_key(SERVICE, start.group), msgspec.msgpack.encode(start), name)
                        if dies_while_publishing:
                            self.end(name)
                            return
                        self.delete(offer_key(SERVICE))
                        events.append(Published(start))
                    case core.Launch(start, rank):
                        self.launched(name, start, rank)
                    case core.Broken():
                        self.end(name)
                        self.start()
                        return
                    case core.Waiting():
                        pass
                    case core.Refuse(reason):
                        raise AssertionError(reason)

    def launched(self, name: str, start: GroupStart, rank: int) -> None:
        assert name not in self.running
        assert start.members[rank].instance_id == name
        assert [m.rank for m in start.members] == list(range(self.num_nodes))
        assert len({m.instance_id for m in start.members}) == self.num_nodes
        assert (start.group, rank) not in self.launches, "two processes took one rank of one group"
        self.launches[start.group, rank] = name
        self.running[name] = (start.group, rank)

    def settle(self) -> None:
        for _ in range(10_000):
            busy = [name for name, (_, views) in self.processes.items() if views]
            if not busy:
                return
            self.step(busy[0])
        raise AssertionError("the processes never came to rest")


actions = st.lists(
    st.tuples(st.sampled_from(["start", "step", "step", "step", "step", "end", "publish and die"]), st.integers(0, 99)),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(num_nodes=st.integers(2, 4), script=actions)
def test_whatever_happens_all_that_can_run_do(num_nodes: int, script: list[tuple[str, int]]) -> None:
    world = World(num_nodes)
    for action, choice in script:
        names = list(world.processes)
        if action == "start" and len(names) < 10:
            world.start()
        elif action == "end" and names:
            world.end(names[choice % len(names)])
        elif names and (views := [name for name in names if world.processes[name][1]]):
            world.step(views[choice % len(views)], dies_while_publishing=action == "publish and die")
    world.settle()
    alive = len(world.processes)
    groups: dict[str, set[int]] = {}
    for of, rank in world.running.values():
        groups.setdefault(of, set()).add(rank)
    assert len(groups) == alive // num_nodes
    assert all(ranks == set(range(num_nodes)) for ranks in groups.values())
    # What is left waits behind one offer, and nothing lies about.
    left = alive % num_nodes
    assert (offer_key(SERVICE) in world.store) == (left > 0)
    assert len(world.store) == len(groups) * num_nodes + left
