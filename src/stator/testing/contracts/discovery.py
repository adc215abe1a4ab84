"""What every implementation of the discovery seam does. Subclass, and give a world to run the scenarios in.

class TestMemoryDiscovery(DiscoveryContract):
    def run(self, scenario): ...  # make a World, await scenario(world), close it
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Generic, TypeVar

from stator.discovery.base import Lease, WatchBatch
from stator.errors import ErrorCode, StatorError
from stator.runtime.context import loop_time
from stator.testing.hub_world import LosableWorld, World

PATIENCE_S = 5.0

T = TypeVar("T")


async def expect_error(code: ErrorCode, awaitable: Awaitable[object]) -> StatorError:
    """The error that awaitable raises; AssertionError if it has another code or does not raise."""
    try:
        result = await awaitable
    except StatorError as error:
        assert error.code is code, error
        return error
    raise AssertionError(f"expected {code}, got {result!r}")


class Reading(Generic[T]):
    """Reads a watch in a task, so that giving up to wait for an item does not end the watch."""

    def __init__(self, watch: AsyncGenerator[T, None]) -> None:
        self._watch = watch
        self._items: asyncio.Queue[T] = asyncio.Queue()

    async def __aenter__(self) -> "Reading[T]":
        self._task = asyncio.get_running_loop().create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._watch.aclose()

    async def next(self, timeout_s: float = PATIENCE_S) -> T:
        async with asyncio.timeout(timeout_s):
            return await self._items.get()

    async def expect_silence(self, for_s: float) -> None:
        try:
            item = await self.next(for_s)
        except TimeoutError:
            return
        raise AssertionError(f"expected nothing, got {item}")

    async def _read(self) -> None:
        async for item in self._watch:
            self._items.put_nowait(item)


async def wait_lost(lease: Lease, timeout_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(timeout_s):
        await lease.lost.wait()


def fold(view: dict[str, bytes], batch: WatchBatch) -> dict[str, bytes]:
    """The view after the batch."""
    after = {} if batch.reset else dict(view)
    for key in batch.deletes:
        after.pop(key, None)
    return after | {entry.key: entry.value for entry in batch.puts}


class DiscoveryContract:
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        raise NotImplementedError

    def test_keys_are_put_read_and_deleted(self) -> None:
        async def scenario(world: World) -> None:
            discovery = (await world.connect()).discovery
            assert await discovery.get("a/1") is None
            first = await discovery.put("a/2", b"two")
            second = await discovery.put("a/1", b"one")
            third = await discovery.put("a/1", b"uno")
            await discovery.put("b/1", b"other")
            assert 0 < first < second < third
            found = await discovery.get("a/1")
            assert found is not None
            assert (found.value, found.revision, found.lease_id) == (b"uno", third, None)
            assert [(entry.key, entry.value) for entry in await discovery.get_prefix("a/")] == [
                ("a/1", b"uno"),
                ("a/2", b"two"),
            ]
            assert await discovery.delete("a/1")
            assert not await discovery.delete("a/1")
            assert [entry.key for entry in await discovery.get_prefix("")] == ["a/2", "b/1"]

        self.run(scenario)

    def test_one_of_many_creators_wins(self) -> None:
        async def scenario(world: World) -> None:
            one, two = (await world.connect()).discovery, (await world.connect()).discovery
            attempts = [(discovery, f"{who}".encode()) for who, discovery in enumerate([one, two] * 5)]
            won = await asyncio.gather(*(discovery.create("leader", value) for discovery, value in attempts))
            assert sum(won) == 1
            leader = await two.get("leader")
            assert leader is not None
            assert leader.value == attempts[won.index(True)][1]
            await one.delete("leader")
            assert await two.create("leader", b"next")

        self.run(scenario)

    def test_revoking_a_lease_deletes_its_keys_in_one_change(self) -> None:
        async def scenario(world: World) -> None:
            holder, other = (await world.connect()).discovery, (await world.connect()).discovery
            lease = await holder.grant_lease(world.limits.lease_ttl_s)
            for key in ("b", "a", "c"):
                await holder.put(f"mine/{key}", b"x", lease)
            await holder.put("mine/kept", b"x")
            async with Reading(other.watch("mine/")) as watch:
                assert len((await watch.next()).puts) == 4
                assert not lease.lost.is_set()
                await lease.revoke()
                assert lease.lost.is_set()
                change = await watch.next()
                assert sorted(change.deletes) == ["mine/a", "mine/b", "mine/c"]
                assert not change.puts
                await lease.revoke()
                assert [entry.key for entry in await holder.get_prefix("")] == ["mine/kept"]

        self.run(scenario)

    def test_the_lease_of_a_dead_holder_can_be_ended_by_another(self) -> None:
        async def scenario(world: World) -> None:
            holder, other = await world.connect(), await world.connect()
            lease = await holder.discovery.grant_lease(world.limits.lease_ttl_s)
            await holder.discovery.put("instances/worker", b"1", lease)
            await holder.close()
            found = await other.discovery.get("instances/worker")
            assert found is not None and found.lease_id == lease.lease_id
            assert await other.discovery.end_lease(lease.lease_id)
            assert await other.discovery.get("instances/worker") is None
            assert not await other.discovery.end_lease(lease.lease_id)

        self.run(scenario)

    def test_a_dead_holders_lease_expires(self) -> None:
        async def scenario(world: World) -> None:
            ttl_s = world.limits.lease_ttl_s
            holder, other = await world.connect(), (await world.connect()).discovery
            lease = await holder.discovery.grant_lease(ttl_s)
            await holder.discovery.put("i/1", b"x", lease)
            await holder.discovery.put("i/2", b"x", lease)
            async with Reading(other.watch("i/")) as watch:
                assert len((await watch.next()).puts) == 2
                died_at = loop_time()
                await holder.close()
                change = await watch.next(ttl_s + PATIENCE_S)
                # The last renewal was sent within a third of the TTL before the death.
                assert loop_time() - died_at >= ttl_s / 2
                assert sorted(change.deletes) == ["i/1", "i/2"]
            assert await other.get_prefix("i/") == []

        self.run(scenario)

    def test_a_living_holders_lease_does_not_expire(self) -> None:
        async def scenario(world: World) -> None:
            ttl_s = world.limits.lease_ttl_s
            discovery = (await world.connect()).discovery
            lease = await discovery.grant_lease(ttl_s)
            await discovery.put("i/1", b"x", lease)
            async with Reading(discovery.watch("i/")) as watch:
                await watch.next()
                await watch.expect_silence(3 * ttl_s)
            assert not lease.lost.is_set()
            assert await discovery.get("i/1") is not None

        self.run(scenario)

    def test_nothing_is_put_under_an_ended_lease(self) -> None:
        async def scenario(world: World) -> None:
            discovery = (await world.connect()).discovery
            lease = await discovery.grant_lease(world.limits.lease_ttl_s)
            await lease.revoke()
            await expect_error(ErrorCode.NOT_FOUND, discovery.put("i/1", b"x", lease))
            await expect_error(ErrorCode.NOT_FOUND, discovery.create("i/1", b"x", lease))
            assert await discovery.get("i/1") is None

        self.run(scenario)

    def test_a_put_moves_a_key_to_its_lease(self) -> None:
        async def scenario(world: World) -> None:
            discovery = (await world.connect()).discovery
            old = await discovery.grant_lease(world.limits.lease_ttl_s)
            new = await discovery.grant_lease(world.limits.lease_ttl_s)
            assert old.lease_id != new.lease_id
            await discovery.put("moved", b"1", old)
            await discovery.put("moved", b"2", new)
            await discovery.put("freed", b"1", old)
            await discovery.put("freed", b"2")
            await old.revoke()
            assert [entry.lease_id for entry in await discovery.get_prefix("")] == [None, new.lease_id]
            await new.revoke()
            assert [entry.key for entry in await discovery.get_prefix("")] == ["freed"]

        self.run(scenario)

    def test_a_watch_tells_the_whole_state_and_then_every_change_in_order(self) -> None:
        async def scenario(world: World) -> None:
            one, two = (await world.connect()).discovery, (await world.connect()).discovery
            await one.put("k/old", b"0")
            await one.put("other", b"0")
            async with Reading(two.watch("k/")) as watch:
                first = await watch.next()
                assert first.reset
                assert [entry.key for entry in first.puts] == ["k/old"]

                async def write(name: str) -> None:
                    for number in range(20):
                        await one.put(f"k/{name}", str(number).encode())
                    await one.delete(f"k/{name}")
                    await one.put(f"k/{name}", b"end")

                await asyncio.gather(write("x"), write("y"), one.put("unseen", b"0"))
                view, revisions, seen = fold({}, first), [first.puts[0].revision], list[bytes]()
                while view.get("k/x") != b"end" or view.get("k/y") != b"end":
                    batch = await watch.next()
                    assert not batch.reset
                    revisions += [entry.revision for entry in batch.puts]
                    seen += [entry.value for entry in batch.puts if entry.key == "k/x"]
                    view = fold(view, batch)
                assert revisions == sorted(set(revisions))
                assert seen == [str(number).encode() for number in range(20)] + [b"end"]
                assert view == {entry.key: entry.value for entry in await one.get_prefix("k/")}

        self.run(scenario)

    def test_a_watch_of_nothing_starts_empty(self) -> None:
        async def scenario(world: World) -> None:
            discovery = (await world.connect()).discovery
            async with Reading(discovery.watch("k/")) as watch:
                assert await watch.next() == WatchBatch(reset=True)
                await discovery.put("k/1", b"x")
                assert [entry.key for entry in (await watch.next()).puts] == ["k/1"]

        self.run(scenario)

    def test_a_large_state_comes_as_one_batch(self) -> None:
        async def scenario(world: World) -> None:
            discovery = (await world.connect()).discovery
            lease = await discovery.grant_lease(world.limits.lease_ttl_s)
            value = b"v" * (200 * 1024)
            for number in range(6):
                await discovery.put(f"k/{number}", value, lease)
            async with Reading(discovery.watch("k/")) as watch:
                batch = await watch.next()
                assert batch.reset
                assert fold({}, batch) == {f"k/{number}": value for number in range(6)}
                await lease.revoke()
                assert len((await watch.next()).deletes) == 6

        self.run(scenario)

    def test_bounds_are_refused(self) -> None:
        async def scenario(world: World) -> None:
            discovery = (await world.connect()).discovery
            too_large = b"v" * (world.limits.keys.max_value_bytes + 1)
            await expect_error(ErrorCode.INVALID_REQUEST, discovery.put("k", too_large))
            await expect_error(ErrorCode.INVALID_REQUEST, discovery.put("", b"x"))
            await expect_error(ErrorCode.INVALID_REQUEST, discovery.put("k" * 2_000, b"x"))
            await expect_error(ErrorCode.INVALID_REQUEST, discovery.grant_lease(0.0))
            assert await discovery.get_prefix("") == []

        self.run(scenario)

    def test_namespaces_share_nothing(self) -> None:
        async def scenario(world: World) -> None:
            mine = (await world.connect("mine")).discovery
            theirs = (await world.connect("theirs")).discovery
            lease = await mine.grant_lease(world.limits.lease_ttl_s)
            async with Reading(theirs.watch("")) as watch:
                assert await watch.next() == WatchBatch(reset=True)
                await mine.put("k", b"mine", lease)
                assert await theirs.get("k") is None
                assert not await theirs.delete("k")
                await expect_error(ErrorCode.NOT_FOUND, theirs.put("k", b"theirs", lease))
                assert await theirs.create("k", b"theirs")
                assert fold({}, await watch.next()) == {"k": b"theirs"}
            await lease.revoke()
            assert await theirs.get("k") is not None

        self.run(scenario)

    def test_closing_ends_watches_and_refuses_calls(self) -> None:
        async def scenario(world: World) -> None:
            discovery = (await world.connect()).discovery
            watch = discovery.watch("")
            assert (await anext(watch)).reset

            async def drain() -> None:
                async for _ in watch:
                    pass

            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
                group.create_task(drain())
                await asyncio.sleep(0)
                await discovery.close()
            await discovery.close()
            await expect_error(ErrorCode.INSTANCE_LOST, discovery.get("k"))
            await expect_error(ErrorCode.INSTANCE_LOST, discovery.grant_lease())

        self.run(scenario)


class DiscoveryLossContract:
    """For implementations whose server is elsewhere and may be lost."""

    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        raise NotImplementedError

    def test_calls_without_a_server_name_its_address(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            discovery = (await world.connect()).discovery
            await discovery.put("k", b"x")
            address = world.address
            await world.cut()
            started = loop_time()
            for call in (discovery.get("k"), discovery.put("k", b"y"), discovery.grant_lease()):
                assert address in (await expect_error(ErrorCode.INSTANCE_LOST, call)).message
            assert loop_time() - started <= 3 * world.limits.timeout_s + PATIENCE_S
            await world.heal()
            found = await discovery.get("k")
            assert found is not None
            assert found.value == b"x"

        self.run_losable(scenario)

    def test_an_unreachable_server_ends_no_lease(self) -> None:
        """The holder goes on; it learns what became of its lease when the server can be asked again."""

        async def scenario(world: LosableWorld) -> None:
            ttl_s = world.limits.lease_ttl_s
            holder, watcher = (await world.connect()).discovery, (await world.connect()).discovery
            lease = await holder.grant_lease(ttl_s)
            await holder.put("i/1", b"x", lease)
            async with Reading(watcher.watch("i/")) as watch:
                await watch.next()
                await world.cut()
                await watch.expect_silence(2 * ttl_s)
                assert not lease.lost.is_set()
                # The server counted on: for it the lease ended, and it says so to everybody.
                await world.heal()
                await wait_lost(lease, ttl_s + PATIENCE_S)
                assert fold({"i/1": b"x"}, await watch.next()) == {}
            await expect_error(ErrorCode.NOT_FOUND, holder.put("k", b"x", lease))
            await lease.revoke()
            assert not (await holder.grant_lease(ttl_s)).lost.is_set()

        self.run_losable(scenario)

    def test_a_lease_outlives_a_short_cut(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            ttl_s = world.limits.lease_ttl_s
            discovery = (await world.connect()).discovery
            lease = await discovery.grant_lease(ttl_s)
            await discovery.put("k", b"x", lease)
            async with Reading(discovery.watch("k")) as watch:
                view = fold({}, await watch.next())
                await world.cut()
                # Nothing comes from a lost server: the old view stays.
                await watch.expect_silence(ttl_s / 2)
                await world.heal()
                await discovery.put("k2", b"y")
                # A whole state, or what happened since; nothing is missed or told twice.
                batch = await watch.next()
                while not batch.reset and view != {"k": b"x", "k2": b"y"}:
                    assert [entry.key for entry in batch.puts] == ["k2"]
                    view = fold(view, batch)
                if batch.reset:
                    while (view := fold(view, batch)) != {"k": b"x", "k2": b"y"}:
                        batch = await watch.next()
                await watch.expect_silence(2 * ttl_s)
            assert not lease.lost.is_set()

        self.run_losable(scenario)

    def test_a_server_that_lost_its_state_is_told_it_again(self) -> None:
        """Also when it was away for longer than the TTL, and with the latest value."""

        async def scenario(world: LosableWorld) -> None:
            ttl_s = world.limits.lease_ttl_s
            discovery = (await world.connect()).discovery
            lease = await discovery.grant_lease(ttl_s)
            old_id = lease.lease_id
            await discovery.put("i/1", b"old", lease)
            await discovery.put("i/1", b"new", lease)
            await discovery.put("i/2", b"x", lease)
            await discovery.put("i/3", b"x", lease)
            await discovery.delete("i/3")
            assert await discovery.create("leader", b"me", lease)
            await world.lose()
            await asyncio.sleep(2 * ttl_s)
            await world.heal()
            other = (await world.connect()).discovery
            async with Reading(other.watch("")) as watch:
                view: dict[str, bytes] = {}
                while view != {"i/1": b"new", "i/2": b"x", "leader": b"me"}:
                    view = fold(view, await watch.next(ttl_s + PATIENCE_S))
                # It is a lease as before: renewed, and it ends with its holder.
                await watch.expect_silence(2 * ttl_s)
                assert not lease.lost.is_set()
                assert lease.lease_id != old_id
                await lease.revoke()
                assert sorted((await watch.next()).deletes) == ["i/1", "i/2", "leader"]

        self.run_losable(scenario)

    def test_a_put_under_a_lease_finds_the_way_to_a_server_without_its_state(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            discovery = (await world.connect()).discovery
            lease = await discovery.grant_lease(world.limits.lease_ttl_s)
            await discovery.put("i/1", b"ready", lease)
            await world.lose()
            await expect_error(ErrorCode.INSTANCE_LOST, discovery.put("i/1", b"draining", lease))
            await world.heal()
            await discovery.put("i/2", b"x", lease)
            found = [(entry.key, entry.value, entry.lease_id) for entry in await discovery.get_prefix("")]
            assert found == [("i/1", b"draining", lease.lease_id), ("i/2", b"x", lease.lease_id)]
            await expect_error(ErrorCode.INVALID_REQUEST, discovery.put("i/1", b"v" * (2 << 20), lease))
            await world.lose()
            await world.heal()
            await discovery.put("i/3", b"x", lease)
            assert [entry.value for entry in await discovery.get_prefix("")] == [b"draining", b"x", b"x"]

        self.run_losable(scenario)

    def test_what_one_alone_may_have_is_lost_to_who_was_faster(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            ttl_s = world.limits.lease_ttl_s
            one, two = (await world.connect()).discovery, (await world.connect()).discovery
            lease = await one.grant_lease(ttl_s)
            assert await one.create("leader", b"one", lease)
            await world.lose()
            await world.heal()
            assert await two.create("leader", b"two")
            await wait_lost(lease, ttl_s + PATIENCE_S)
            found = await two.get("leader")
            assert found is not None
            assert found.value == b"two"

        self.run_losable(scenario)

    def test_a_watch_keeps_what_may_come_back_to_a_server_without_its_state(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            ttl_s, window_s = world.limits.lease_ttl_s, world.limits.return_window_s
            alive, dying = await world.connect(), await world.connect()
            watcher = (await world.connect()).discovery
            await alive.discovery.put("i/alive", b"a", await alive.discovery.grant_lease(ttl_s))
            await dying.discovery.put("i/dying", b"d", await dying.discovery.grant_lease(ttl_s))
            await watcher.put("i/unleased", b"u")
            async with Reading(watcher.watch("i/")) as watch:
                view = fold({}, await watch.next())
                assert set(view) == {"i/alive", "i/dying", "i/unleased"}
                await dying.close()
                await world.lose()
                await world.heal()
                back_at = loop_time()
                # Whoever looks at values sees that the living one was never gone, and the dead one go once, late.
                seen: list[set[str]] = []
                while (view := fold(view, await watch.next(ttl_s + window_s + PATIENCE_S))) != {"i/alive": b"a"}:
                    seen.append(set(view))
                assert all(keys == {"i/alive", "i/dying"} for keys in seen), seen
                assert ttl_s + window_s <= loop_time() - back_at <= ttl_s + window_s + PATIENCE_S
                await watch.expect_silence(ttl_s)

        self.run_losable(scenario)

    def test_a_watch_outlives_the_servers_state(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            one, two = (await world.connect()).discovery, (await world.connect()).discovery
            await one.put("k/old", b"x")
            before = await one.put("k/older", b"x")
            async with Reading(two.watch("k/")) as watch:
                assert len((await watch.next()).puts) == 2
                await world.lose()
                await watch.expect_silence(0.2)
                await world.heal()
                after = await one.put("k/new", b"y")
                assert after >= before or not world.limits.revisions_outlive_the_state
                view: dict[str, bytes] = {"k/old": b"x"}
                batch = await watch.next()
                assert batch.reset
                while (view := fold(view, batch)) != {"k/new": b"y"}:
                    batch = await watch.next()
                await one.delete("k/new")
                assert (await watch.next()).deletes == ["k/new"]

        self.run_losable(scenario)

    def test_a_watch_may_begin_before_its_server(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            discovery = (await world.connect()).discovery
            await world.cut()
            async with Reading(discovery.watch("")) as watch, asyncio.TaskGroup() as group:
                first = group.create_task(watch.next())
                await asyncio.sleep(0)
                await world.heal()
                assert (await first).reset

        self.run_losable(scenario)
