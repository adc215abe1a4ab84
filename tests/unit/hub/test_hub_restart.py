"""A hub that is away for a while, or comes back empty, with many clients."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest

from stator.discovery.base import RETURN_WINDOW_S
from stator.hub import server as hub_server
from stator.ids import InstanceId, JobId
from stator.runtime.context import CallContext, loop_time
from stator.testing.clock import run_virtual
from stator.testing.contracts.discovery import Reading, fold, wait_lost
from stator.testing.hub_world import HubWorld, Party, WorldLimits
from stator.transport.base import Sink, StreamHandle, Target
from stator.transport.client import RequestPlaneClient

NUM_WORKERS = 200


async def follow(watch: AsyncGenerator[Any, None]) -> None:
    async with contextlib.aclosing(watch):
        async for _ in watch:
            pass


async def ended(tasks: Sequence["asyncio.Future[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def registered(world: HubWorld, count: int) -> list[Party]:
    parties: list[Party] = []
    for number in range(count):
        party = await world.connect()
        lease = await party.discovery.grant_lease()
        await party.discovery.put(f"instances/w/{number}", b"info", lease)
        parties.append(party)
    return parties


@pytest.mark.parametrize("away_s", [0.0, 60.0])
def test_two_hundred_workers_come_back_without_a_herd(away_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a hub that is back at once learn of it in the same moment, from their watches."""

    async def main() -> None:
        world = HubWorld()
        await world.start()
        parties = await registered(world, NUM_WORKERS)
        # Of what each other does they need not hear: 40,000 notices say nothing here.
        followers = [asyncio.ensure_future(follow(p.discovery.watch("others/"))) for p in parties]
        granted_at: list[float] = []
        grant = hub_server.MemoryKeyStore.grant

        def noted(store: hub_server.MemoryKeyStore, ttl_s: float) -> Any:
            granted_at.append(loop_time())
            return grant(store, ttl_s)

        await asyncio.sleep(30.0)  # Their renewals are spread by now as they ever will be.
        monkeypatch.setattr(hub_server.MemoryKeyStore, "grant", noted)
        await world.lose()
        await asyncio.sleep(away_s)
        await world.heal()
        back_at = loop_time()
        # The queue has work for each, and each takes its own while they all come back.
        queue = parties[0].queue
        for number in range(8):
            await queue.put(JobId(f"j{number}"), b"x")
        watcher = (await world.connect()).discovery
        view: dict[str, bytes] = {}
        async with asyncio.timeout(10.0), Reading(watcher.watch("instances/")) as watch:
            while len(view) < NUM_WORKERS:
                view = fold(view, await watch.next())
        assert len(granted_at) == NUM_WORKERS
        # All were told within the longest pause between two tries, and came spread over the window.
        assert max(granted_at) - back_at <= 2.0 + RETURN_WINDOW_S
        busiest = max(Counter(int(at * 10) for at in granted_at).values())
        assert busiest <= NUM_WORKERS / 8, "the most in a tenth of a second"
        lease = await parties[1].discovery.grant_lease()
        jobs = await parties[1].queue.pull(InstanceId("w"), lease.lease_id, max_jobs=8, wait_s=1.0)
        assert [job.job_id for job in jobs] == [f"j{number}" for number in range(8)]
        await ended(followers)
        await world.close()

    run_virtual(main())


def test_a_hub_that_is_away_is_not_hammered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process follows instances and a queue, keeps a lease and pulls: about one try a second each, spread."""
    opened: list[tuple[float, str]] = []
    really_open = RequestPlaneClient.open

    def counted(
        self: RequestPlaneClient,
        target: Target,
        request: Any,
        sink: Sink,
        *,
        context: CallContext,
        item_type: Any = Any,
    ) -> StreamHandle:
        opened.append((loop_time(), target.endpoint))
        return really_open(self, target, request, sink, context=context, item_type=item_type)

    async def main() -> None:
        world = HubWorld()
        await world.start()
        (party,) = await registered(world, 1)

        followers = [
            asyncio.ensure_future(follow(party.discovery.watch("instances/"))),
            asyncio.ensure_future(follow(party.queue.watch_size())),
        ]
        await asyncio.sleep(1.0)
        await world.lose()
        await asyncio.sleep(10.0)
        monkeypatch.setattr(RequestPlaneClient, "open", counted)
        await asyncio.sleep(60.0)
        counts = Counter(endpoint for _, endpoint in opened)
        assert set(counts) == {"hub.lease.renew", "hub.key.watch", "hub.queue.watch_size"}
        # Pauses of 1 to 2 s for the lease, 1.5 to 3 s for the others.
        assert 30 <= counts["hub.lease.renew"] <= 60
        assert 20 <= counts["hub.key.watch"] <= 41
        assert 20 <= counts["hub.queue.watch_size"] <= 41
        await ended(followers)
        await world.close()

    run_virtual(main())


@pytest.mark.parametrize("cut_hub_as_well", [False, True])
def test_a_holder_that_stood_still_learns_from_the_hub_what_became_of_it(cut_hub_as_well: bool) -> None:
    async def main() -> None:
        world = HubWorld(WorldLimits())
        await world.start()
        holder, watcher = await world.connect(), (await world.connect()).discovery
        lease = await holder.discovery.grant_lease(10.0)
        await holder.discovery.put("i/1", b"x", lease)
        resume = stop_renewals(lease)
        if cut_hub_as_well:
            await world.lose()
        await asyncio.sleep(25.0)
        if cut_hub_as_well:
            await world.heal()
        assert await watcher.get("i/1") is None
        resumed_at = loop_time()
        resume()
        if cut_hub_as_well:
            # Nobody was told that it is gone: it goes on.
            await asyncio.sleep(RETURN_WINDOW_S + 0.1)
            assert await watcher.get("i/1") is not None
            assert not lease.lost.is_set()
        else:
            await wait_lost(lease)
            assert loop_time() - resumed_at < 0.01, "the first thing it does is to ask"
        await world.close()

    run_virtual(main())


def stop_renewals(lease: Any) -> Callable[[], None]:
    """As SIGSTOP does it, as far as the lease can tell; returns SIGCONT."""
    renew, overdue = lease._renew, asyncio.Event()

    async def wait_then_renew(timeout_s: float) -> None:
        await overdue.wait()
        await renew(timeout_s)

    lease._renew = wait_then_renew
    return overdue.set
