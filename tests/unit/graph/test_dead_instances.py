"""What a supervisor tells discovery of a process that died without a word."""

import asyncio

from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.graph.dead_instances import DeadInstances


def test_the_keys_of_a_dead_process_go_at_once_and_others_stay() -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        dead, living, here = MemoryDiscovery(store), MemoryDiscovery(store), MemoryDiscovery(store)
        await dead.put("instances/A/a1", b"", await dead.grant_lease(10.0))
        await living.put("instances/A/a2", b"", await living.grant_lease(10.0))
        ended = asyncio.Event()
        store.on_lease_end(lambda _: ended.set())
        undertaker = DeadInstances(here)
        undertaker.bury(["instances/A/a1", "instances/B/never-announced"])
        async with asyncio.timeout(5):
            await ended.wait()
        assert [found.key for found in await here.get_prefix("instances/")] == ["instances/A/a2"]
        await undertaker.close()
        for discovery in (dead, living, here):
            await discovery.close()

    asyncio.run(main())
