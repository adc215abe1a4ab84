"""The hub's clock on a loop whose time is ours."""

import asyncio

import pytest

from stator.discovery.memory import MemoryKeyStore
from stator.runtime.clock import RunningClock
from stator.testing.sim.loop import SimLoop, run_sim


def test_a_process_that_stood_still_has_missed_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(loop: SimLoop) -> None:
        node = loop.node("hub", "head")
        ended: list[float] = []

        async def live() -> None:
            clock = RunningClock("the hub")
            store = MemoryKeyStore(clock=clock)
            store.on_lease_end(lambda _: ended.append(loop.time()))
            renewed, silent = store.grant(10.0), store.grant(10.0)
            assert clock.now() == loop.time() == 0.0
            await asyncio.sleep(4.0)
            # Here it stands still. What is heard first comes in before any timer.
            await heard.wait()
            assert store.renew(renewed) and store.has_lease(silent)
            await asyncio.sleep(100.0)
            clock.close()

        heard = asyncio.Event()
        life = node.spawn(live())
        await asyncio.sleep(5.0)
        node.pause()
        await asyncio.sleep(60.0)
        heard.set()
        node.resume()
        await life
        silent_ended, renewed_ended = ended
        # Up to a second of the pause counts.
        assert silent_ended == pytest.approx(70.0, abs=1.3)
        assert renewed_ended == pytest.approx(75.0, abs=0.01)

    run_sim(scene)
    [said] = [record.getMessage() for record in caplog.records if "stood still" in record.getMessage()]
    assert said.startswith("the hub stood still for 5")
