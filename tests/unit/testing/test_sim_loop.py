"""Nodes on the simulated loop: what a paused or dead process does, and does not do."""

import asyncio

import pytest

from stator.testing.sim.loop import SimLoop, current_node, run_sim, until


def test_time_jumps_and_timers_come_in_order() -> None:
    async def main(loop: SimLoop) -> list[tuple[str, float]]:
        said: list[tuple[str, float]] = []
        for name, delay in (("late", 7200.0), ("early", 1.0), ("also early", 1.0)):
            loop.call_later(delay, lambda name=name: said.append((name, loop.time())))
        await asyncio.sleep(10_000.0)
        return said

    assert run_sim(main) == [("early", 1.0), ("also early", 1.0), ("late", 7200.0)]


def test_a_paused_node_does_what_it_missed_when_it_goes_on() -> None:
    async def main(loop: SimLoop) -> list[float]:
        node = loop.node("a", "host")
        ticks: list[float] = []

        async def tick() -> None:
            while True:
                await asyncio.sleep(1.0)
                ticks.append(loop.time())

        node.spawn(tick())
        await asyncio.sleep(2.5)
        node.pause()
        await asyncio.sleep(10.0)
        assert ticks == [1.0, 2.0]
        node.resume()
        await asyncio.sleep(2.2)
        return ticks

    assert run_sim(main) == [1.0, 2.0, 12.5, 13.5, 14.5]


def test_nothing_of_a_dead_node_runs_not_even_finally() -> None:
    ran: list[str] = []

    async def main(loop: SimLoop) -> None:
        node = loop.node("a", "host")

        async def work() -> None:
            try:
                ran.append("started")
                await asyncio.sleep(1.0)
                ran.append("went on")
            finally:
                ran.append("finally")

        told: list[str] = []
        node.on_death.append(lambda: told.append("dead"))
        node.spawn(work())
        await asyncio.sleep(0.5)
        node.kill()
        node.kill()
        node.resume()
        await asyncio.sleep(5.0)
        assert told == ["dead"]
        assert ran == ["started"]

    run_sim(main)


def test_tasks_and_callbacks_belong_to_the_node_that_made_them() -> None:
    async def main(loop: SimLoop) -> None:
        a, b = loop.node("a", "x"), loop.node("b", "y")
        seen: list[str | None] = []

        def look() -> None:
            node = current_node()
            seen.append(None if node is None else node.name)

        async def work() -> None:
            look()
            loop.call_soon(look)
            await asyncio.create_task(asyncio.sleep(1.0))
            loop.call_later(1.0, look)

        a.spawn(work())
        b.spawn(work())
        look()
        await asyncio.sleep(3.0)
        assert seen == [None, "a", "b", "a", "b", "a", "b"]

    run_sim(main)


def test_work_for_a_thread_is_done_on_the_loop() -> None:
    async def main(loop: SimLoop) -> None:
        assert await asyncio.to_thread(lambda: 7) == 7
        with pytest.raises(ValueError, match="no"):
            await asyncio.to_thread(_fail)

    run_sim(main)


def _fail() -> None:
    raise ValueError("no")


def test_a_program_that_cannot_go_on_or_never_rests_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    async def waits(loop: SimLoop) -> None:
        await asyncio.Event().wait()

    async def spins(loop: SimLoop) -> None:
        while loop.time() == 0.0:
            await asyncio.gather(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="would never continue"):
        run_sim(waits)
    monkeypatch.setattr("stator.testing.sim.loop.MAX_TURNS_AT_ONCE", 100)
    with pytest.raises(RuntimeError, match="spins at 0 s"):
        run_sim(spins)


def test_until_looks_again_and_gives_up() -> None:
    async def main(loop: SimLoop) -> None:
        assert await until(lambda: loop.time() > 3.0)
        assert not await until(lambda: False, 2.0)
        assert loop.time() < 6.0

    run_sim(main)
