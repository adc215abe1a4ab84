import asyncio
import time

import pytest

from stator.testing import clock
from stator.testing.clock import run_virtual


def test_time_jumps_to_the_next_timer_in_order() -> None:
    async def main() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        woken: list[tuple[str, float]] = []

        async def sleeper(name: str, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            woken.append((name, loop.time()))

        async with asyncio.TaskGroup() as group:
            group.create_task(sleeper("b", 7_200.0))
            group.create_task(sleeper("a", 3_600.0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(86_400.0):
                await asyncio.Event().wait()
        return woken

    started = time.monotonic()
    assert run_virtual(main()) == [("a", 3_600.0), ("b", 7_200.0)]
    assert time.monotonic() - started < 5.0


def test_a_program_that_waits_for_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "STUCK_AFTER_REAL_S", 0.01)

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="would never continue"):
        run_virtual(main())


def test_a_thread_wakes_the_loop() -> None:
    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(None, lambda: 7)

    assert run_virtual(main()) == 7
