"""The feed on a publisher in memory: what is missed, lost and begun again. tests/vllm has it on a real engine."""

import asyncio
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fake_publisher import FakePublisher, FakeSockets

from stator.core.hashing import block_hashes
from stator.engines.vllm.kv_feed import (
    ANSWER_S,
    MAX_ROUNDS,
    PROBE_S,
    REPLAYED_BATCHES,
    REST_S,
    KvEndpoint,
    KvEventFeed,
    kv_events_settings,
)
from stator.engines.vllm.kv_sockets import ZmqSockets
from stator.errors import ConfigError
from stator.messages.engine import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from stator.messages.tokens import pack
from stator.testing.clock import run_virtual

SIZE = 2


def chain(*token_ids: int) -> list[int]:
    return [*block_hashes(pack(token_ids), SIZE, model="m")]


def stored(names: list[int], token_ids: Sequence[int], parent: int | None = None) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": names,
        "parent_block_hash": parent,
        "token_ids": list(token_ids),
        "block_size": SIZE,
        "medium": "GPU",
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def removed(*names: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(names), "medium": "GPU", "group_idx": 0}


CLEARED = {"type": "AllBlocksCleared"}


class Listener:
    """The state as told, and the events since it was last asked for."""

    def __init__(self) -> None:
        self.hashes: set[int] = set()
        self._events: list[KvEvent] = []

    def __call__(self, events: Sequence[KvEvent], /) -> None:
        self._events += events
        for event in events:
            match event:
                case BlocksStored():
                    assert not self.hashes.intersection(event.block_hashes)
                    self.hashes.update(event.block_hashes)
                case BlocksRemoved():
                    assert self.hashes.issuperset(event.block_hashes)
                    self.hashes.difference_update(event.block_hashes)
                case BlocksCleared():
                    self.hashes.clear()

    def take(self) -> list[KvEvent]:
        events, self._events = self._events, []
        return events


class World:
    """Ranks' publishers, and a feed on them."""

    def __init__(self, num_ranks: int = 1, *, buffer_steps: int = 10_000) -> None:
        self.publishers = [FakePublisher(buffer_steps) for _ in range(num_ranks)]
        self.publisher = self.publishers[0]
        self.endpoints = [KvEndpoint(n, f"ipc:///no/such/{n}", f"ipc:///no/such/{n}r") for n in range(num_ranks)]
        addresses = {e.publish: p for e, p in zip(self.endpoints, self.publishers, strict=True)}
        addresses |= {e.replay: p for e, p in zip(self.endpoints, self.publishers, strict=True)}
        self.sockets = FakeSockets(addresses)
        self.feed = KvEventFeed("m", SIZE, self.endpoints, make_sockets=lambda: self.sockets)
        self.listener = Listener()
        self.feed.watch(self.listener)

    @property
    def held(self) -> set[int]:
        return self.listener.hashes

    async def settle(self) -> None:
        """Until the followers wait for what comes next; on a virtual clock nothing else takes time."""
        for _ in range(100 + 2 * max(s.received.qsize() for p in self.publishers for s in p.subscribers)):
            await asyncio.sleep(0)


def run(scenario: Callable[[World], Awaitable[None]], **settings: int) -> None:
    async def main() -> None:
        world = World(**settings)
        try:
            await scenario(world)
        finally:
            await world.feed.close()
        assert world.sockets.num_open == 0
        assert len(asyncio.all_tasks()) == 1, "a task is left"

    run_virtual(main())


def test_follows_in_order() -> None:
    async def scenario(world: World) -> None:
        a, b = chain(1, 2, 3, 4)
        world.publisher.publish(stored([1], [1, 2]))
        await world.feed.start()
        assert world.listener.take() == [BlocksCleared(), BlocksStored([a])], "what was published before is replayed"
        world.publisher.publish(stored([2], [3, 4], 1))
        world.publisher.publish(removed(2), removed(1))
        await world.settle()
        assert world.listener.take() == [BlocksStored([b], a), BlocksRemoved([b, a])]
        assert world.publisher.asked_from == [0]

    run(scenario)


def test_watch_begins_with_the_whole_state_and_ends() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1, 2], [1, 2, 3, 4]))
        await world.settle()
        late = Listener()
        unwatch = world.feed.watch(late)
        assert late.take() == [BlocksStored(chain(1, 2, 3, 4))]
        assert world.feed.longest_prefix(chain(1, 2, 3, 4, 5, 6)) == (2, 0)
        assert world.feed.num_blocks == 2
        unwatch()
        unwatch()
        world.publisher.publish(CLEARED)
        await world.settle()
        assert (late.take(), world.held) == ([], set())

    run(scenario)


def test_a_gap_is_replayed_from_the_last_batch_had() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1], [1, 2]))
        await world.settle()
        world.publisher.publish(stored([2], [3, 4], 1), lost=True)
        world.publisher.publish(stored([3], [5, 6], 2), lost=True)
        world.publisher.publish(stored([4], [7, 8], 3))
        world.publisher.publish(stored([5], [9, 9], 4))
        await world.settle()
        assert world.held == set(chain(1, 2, 3, 4, 5, 6, 7, 8, 9, 9))
        assert world.publisher.asked_from == [0, 0], "from number 0, which was had, to be compared"
        assert BlocksCleared() not in world.listener.take()[1:]

    run(scenario)


def test_a_long_replay_that_is_cut_off_is_asked_for_in_parts() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([0], [0, 0]))
        await world.settle()
        for n in range(1, 30):
            world.publisher.publish(stored([n], [n, n], n - 1), lost=True)
        world.publisher.max_answers = 12
        world.publisher.publish(stored([30], [30, 30], 29))
        await asyncio.sleep(2 * REST_S + 0.1)
        assert len(world.held) == 31
        assert world.publisher.asked_from == [0, 0, 11, 22]

    run(scenario)


def test_what_a_replay_cannot_give_clears_the_rank() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1, 2], [1, 2, 3, 4]))
        world.publisher.publish(stored([7], [7, 7]))
        await world.settle()
        world.listener.take()
        for n in range(5):
            world.publisher.publish(stored([10 + n], [10, n]), lost=True)
        world.publisher.publish(stored([3], [5, 6], 2), stored([20], [2, 0]))
        await world.settle()
        events = world.listener.take()
        assert events[0] == BlocksCleared()
        assert world.held == {chain(10, 3)[0], chain(10, 4)[0], chain(2, 0)[0]}, "what the buffer still tells"
        world.publisher.publish(stored([21], [2, 1], 20))
        await world.settle()
        assert set(chain(2, 0, 2, 1)) <= world.held
        assert world.publisher.asked_from == [0, 1, 0], "unknown parents do not lead to more replays"

    run(scenario, buffer_steps=3)


def test_a_gap_that_nobody_replays_clears_the_rank(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1], [1, 2]))
        await world.settle()
        world.publisher.silent = True
        world.publisher.publish(stored([2], [3, 4], 1), lost=True)
        world.publisher.publish(stored([3], [5, 6], 2), stored([4], [7, 8]))
        await asyncio.sleep(ANSWER_S + 0.1)
        assert world.held == set(chain(7, 8))
        world.publisher.publish(stored([5], [9, 9], 4))
        await world.settle()
        assert world.held == set(chain(7, 8, 9, 9))

    with caplog.at_level(logging.WARNING):
        run(scenario)
    assert "rank 0 before number 2 are lost" in caplog.text


def test_a_hole_that_stays_ends_in_a_known_state() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1], [1, 2]))
        await world.settle()
        world.publisher.not_replayed = {1}
        world.publisher.publish(removed(1), lost=True)
        world.publisher.publish(stored([3], [5, 6]))
        for _ in range(20):
            await world.settle()
        assert world.held == set(chain(5, 6))
        # At start, to catch up, and the rounds of a rebuild.
        assert world.publisher.asked_from == [0, 0, *[0] * MAX_ROUNDS]
        late = KvEventFeed("m", SIZE, world.endpoints, make_sockets=lambda: world.sockets)
        await late.start()
        assert late.num_blocks == 0, "block 1 would be claimed, but the engine has it no more"
        await late.close()

    run(scenario)


def test_a_rebuild_that_the_publisher_outruns_begins_again() -> None:
    async def scenario(world: World) -> None:
        for n in range(3):
            world.publisher.publish(stored([n], [n, n]))
        world.publisher.max_answers = 2
        starting = asyncio.ensure_future(world.feed.start())
        await asyncio.sleep(REST_S / 2)
        world.publisher.max_answers = 100
        for n in range(3, 6):
            world.publisher.publish(stored([n], [n, n]), lost=True)
        await starting
        assert world.publisher.asked_from == [0, 1, 0]
        assert world.held == {chain(n, n)[0] for n in (3, 4, 5)}

    run(scenario, buffer_steps=3)


def test_half_a_rebuild_is_none() -> None:
    async def scenario(world: World) -> None:
        world.publisher.publish(stored([1], [1, 2]))
        world.publisher.publish(removed(1))
        world.publisher.max_answers = 1
        starting = asyncio.ensure_future(world.feed.start())
        await asyncio.sleep(REST_S / 2)
        world.publisher.silent = True
        await starting
        assert world.held == set(), "what was stored may be gone"

    run(scenario)


def test_an_engine_that_started_again_is_noticed_by_its_numbers() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1], [1, 2]))
        world.publisher.publish(stored([2], [3, 4]))
        await world.settle()
        world.publisher.restart()
        world.publisher.publish(stored([3], [5, 6]))
        await world.settle()
        assert world.held == set(chain(5, 6))

    run(scenario)


def test_an_engine_that_started_again_unheard_is_noticed_by_what_it_replays() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1], [1, 2]))
        await world.settle()
        world.publisher.restart()
        for n in range(3):
            world.publisher.publish(stored([n], [n, n]), lost=True)
        world.publisher.publish(stored([9], [9, 9]))
        await world.settle()
        assert world.held == {chain(n, n)[0] for n in (0, 1, 2, 9)}

    run(scenario)


def test_a_lost_last_batch_is_found_by_the_probe() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1], [1, 2]), lost=True)
        await asyncio.sleep(PROBE_S - 0.1)
        assert world.held == set()
        await asyncio.sleep(0.2)
        assert world.held == set(chain(1, 2))
        world.publisher.restart()
        await asyncio.sleep(PROBE_S)
        assert world.held == set(), "another engine, that has published nothing"

    run(scenario)


def test_an_engine_that_comes_after_the_feed() -> None:
    async def scenario(world: World) -> None:
        world.publisher.silent = True
        await world.feed.start()
        assert asyncio.get_running_loop().time() == ANSWER_S
        world.publisher.silent = False
        world.publisher.publish(stored([1], [1, 2]), lost=True)
        world.publisher.publish(stored([2], [3, 4], 1))
        await world.settle()
        assert world.held == set(chain(1, 2, 3, 4))

    run(scenario)


def test_an_unknown_parent_asks_for_a_replay_once() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1], [1, 2]))
        await world.settle()
        # The reset came between: the wiped parent is what the replay brings back.
        world.publisher.publish(CLEARED, stored([2], [3, 4]))
        await world.settle()
        world.feed.clear()
        assert world.held == set()
        world.publisher.publish(stored([3], [5, 6], 2))
        await world.settle()
        assert world.held == set(chain(3, 4, 5, 6))
        assert world.publisher.asked_from == [0, 0]
        for n in range(REPLAYED_BATCHES - 1):
            world.publisher.publish(stored([100 + n], [1, 1], 99 - n))
        await world.settle()
        assert world.publisher.asked_from == [0, 0], "it would bring nothing else"
        world.publisher.publish(stored([7], [1, 1], 98))
        await world.settle()
        assert world.publisher.asked_from == [0, 0, 0]

    run(scenario)


def test_clear_with_a_mark_is_exact() -> None:
    async def scenario(world: World) -> None:
        first, second = world.publishers
        await world.feed.start()
        mark = world.feed.clear_mark()
        first.publish(stored([1], [1, 2]), CLEARED, stored([2], [3, 4]))
        second.publish(stored([3], [5, 6]))
        await world.settle()
        world.feed.clear(since=mark)
        assert world.held == set(chain(3, 4)), "rank 0 had said so, rank 1 not yet"
        second.publish(stored([4], [7, 8], 3))
        await world.settle()
        assert world.held == set(chain(3, 4)), "published before the reset"
        second.publish(CLEARED, stored([5], [9, 9]))
        await world.settle()
        assert world.held == {*chain(3, 4), *chain(9, 9)}
        assert [p.asked_from for p in world.publishers] == [[0], [0]]

    run(scenario, num_ranks=2)


def test_a_clear_during_a_rebuild_is_not_undone_by_it() -> None:
    async def scenario(world: World) -> None:
        await world.feed.start()
        world.publisher.publish(stored([1], [1, 2]))
        await world.settle()
        world.publisher.restart()
        world.publisher.publish(stored([2], [3, 4]), lost=True)
        world.publisher.publish(stored([3], [7, 8]), lost=True)
        world.publisher.max_answers = 1
        rebuilding = asyncio.ensure_future(world.feed.sync())
        await asyncio.sleep(REST_S / 2)
        world.feed.clear()
        world.publisher.max_answers = 100
        await rebuilding
        assert world.publisher.asked_from == [0, 0, 0, 0, 1], "the rebuild's two parts, and a look for more"
        assert world.held == set()
        world.publisher.publish(CLEARED, stored([3], [5, 6]))
        await world.settle()
        assert world.held == set(chain(5, 6))

    run(scenario)


def test_malformed_batches_cost_the_state_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        world.publisher.publish_payload(b"not msgpack")
        world.publisher.publish(stored([8], [8, 8]))
        await world.feed.start()
        assert world.held == set(chain(8, 8))
        world.publisher.publish_payload(b"")
        world.publisher.publish(stored([2], [3, 4]))
        for socket in world.publisher.subscribers:
            socket.received.put_nowait([b"one frame"])
        world.publisher.publish(stored([3], [5, 6], 2))
        await world.settle()
        assert world.held == set(chain(3, 4, 5, 6))

    run(scenario)
    assert caplog.text.count("cannot be read") == 2
    assert "frames of [9] bytes" in caplog.text


def test_ranks_are_one_stream() -> None:
    async def scenario(world: World) -> None:
        first, second = world.publishers
        await world.feed.start()
        first.publish(stored([1], [1, 2]))
        second.publish(stored([7, 8], [1, 2, 3, 4]))
        await world.settle()
        assert world.feed.longest_prefix(chain(1, 2, 3, 4)) == (2, 1)
        assert world.feed.longest_prefix(chain(1, 2)) == (1, 0)
        first.publish(removed(1))
        await world.settle()
        assert world.held == set(chain(1, 2, 3, 4))
        second.publish(CLEARED)
        await world.settle()
        assert world.held == set()

    run(scenario, num_ranks=2)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_the_state_is_the_engines_in_the_end(seed: int) -> None:
    rng = Random(seed)

    async def scenario(world: World) -> None:
        await world.feed.start()
        held: dict[int, tuple[int, ...]] = {}
        for number in range(200):
            if held and rng.random() < 0.4:
                name = rng.choice([n for n in held if not any(o[:-2] == held[n] for o in held.values())])
                del held[name]
                event = removed(name)
            else:
                parent = rng.choice([None, *held])
                prefix = () if parent is None else held[parent]
                held[number] = (*prefix, number, number)
                event = stored([number], [number, number], parent)
            world.publisher.publish(event, lost=rng.random() < 0.3)
            if rng.random() < 0.5:
                await world.settle()
            assert len(world.held) <= 200
        await world.feed.sync()
        assert world.held == {chain(*tokens)[-1] for tokens in held.values()}

    # Nothing that the buffer lost: 200 batches are in it.
    run(scenario)


def test_settings_are_what_vllm_makes_of_them(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    config, endpoints = kv_events_settings(directory, 3)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert config["enable_kv_cache_events"] and config["publisher"] == "zmq"
    assert config["endpoint"] == endpoints[0].publish == f"ipc://{directory}/inproc-kv"
    assert config["replay_endpoint"] == endpoints[0].replay
    assert [endpoint.publish.removeprefix(config["endpoint"]) for endpoint in endpoints] == ["", "_dp1", "_dp2"]
    assert [endpoint.replay.removeprefix(config["replay_endpoint"]) for endpoint in endpoints] == ["", "_dp1", "_dp2"]
    assert [endpoint.rank for endpoint in endpoints] == [0, 1, 2]
    assert kv_events_settings(directory, 3)[1] == endpoints, "a directory of ours may be there"


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="mode drwxr-xr-x"):
        kv_events_settings(tmp_path, 1)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made|must be a directory"):
        kv_events_settings(tmp_path / "file", 1)
    link = tmp_path / "link"
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    os.symlink(target, link)
    with pytest.raises(ConfigError, match="must be a directory"):
        kv_events_settings(link, 1)
    with pytest.raises(ConfigError, match="cannot be made"):
        kv_events_settings(tmp_path / "no" / "parent", 1)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    name = "d" * (107 - len(f"{tmp_path}//inproc-kv-replay"))
    kv_events_settings(tmp_path / name, 1)
    with pytest.raises(ConfigError, match="has 111 bytes"):
        kv_events_settings(tmp_path / name, 2)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:5557", "ipc://@abstract", "ipc://relative", "inproc://x"])
def test_only_ipc_paths_are_taken(address: str) -> None:
    for endpoint in (KvEndpoint(0, address, "ipc:///a"), KvEndpoint(0, "ipc:///a", address)):
        with pytest.raises(ConfigError, match="only Unix sockets"):
            KvEventFeed("m", SIZE, [endpoint])


def test_close_removes_socket_files_and_can_be_repeated(tmp_path: Path) -> None:
    _, endpoints = kv_events_settings(tmp_path / "kv", 2)
    left = [Path(address.removeprefix("ipc://")) for e in endpoints for address in (e.publish, e.replay)]
    for path in left[:3]:
        path.touch()
    feed = KvEventFeed("m", SIZE, endpoints)

    async def main() -> None:
        await feed.close()
        await feed.close()

    run_virtual(main())
    assert [path for path in left if path.exists()] == []


def test_without_pyzmq_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"stator\[vllm\]"):
        ZmqSockets()
