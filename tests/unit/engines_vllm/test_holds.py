"""When a drain of a vLLM prefill engine may end: by what the engine says with its steps."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from stator.engines.vllm.holds import Holds
from stator.engines.vllm.load import LoadCounter
from stator.ids import TransferId
from stator.testing.clock import run_virtual

HOLD_S = 30.0
A, B = TransferId("a"), TransferId("b")


class Engine:
    """What vLLM says: a step at a time."""

    def __init__(self) -> None:
        self.counter = LoadCounter(100)
        self.holds = Holds(HOLD_S, self.counter, lambda: self.counter.load(0).num_blocks_held)

    def step(self, num_held: int | None) -> None:
        """num_held None: nothing about holds has changed since the step before."""
        stats = {} if num_held is None else {"num_blocks_held": num_held}
        scheduler = SimpleNamespace(
            kv_connector_stats=stats, num_running_reqs=0, num_skipped_waiting_reqs=0, kv_cache_usage=0.1
        )
        self.counter.record(scheduler, None, 0)

    def keep(self, transfer_id: TransferId) -> None:
        self.holds.keep(transfer_id, {"of": transfer_id}, asyncio.get_running_loop().time())


async def ends_after_s(engine: Engine, *happens: tuple[float, Callable[[], object]]) -> float:
    """How long `ended` takes when that happens, in seconds from now."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for after_s, what in happens:
        loop.call_at(began + after_s, what)
    await engine.holds.ended()
    return loop.time() - began


async def without_holds() -> None:
    engine = Engine()
    assert await ends_after_s(engine) == 0
    engine.step(0)
    assert await ends_after_s(engine) == 0


async def fetched() -> None:
    engine = Engine()
    engine.keep(A)
    engine.step(4)
    assert await ends_after_s(engine, (1.0, lambda: engine.step(None)), (2.0, lambda: engine.step(0))) == 2.0


async def kept_in_the_step_whose_figures_are_to_come() -> None:
    engine = Engine()
    engine.step(0)
    engine.keep(A)
    happens = ((1.0, lambda: engine.step(4)), (3.0, lambda: engine.step(0)))
    assert await ends_after_s(engine, *happens) == 3.0, "the count before the hold says nothing about it"


async def released() -> None:
    engine = Engine()
    engine.keep(A)
    engine.keep(B)
    engine.step(8)
    happens = ((1.0, lambda: engine.holds.take(A)), (2.0, lambda: engine.holds.take(B)))
    assert await ends_after_s(engine, *happens) == 2.0, "what nobody will fetch need not be waited for"
    assert engine.holds.take(B) is None


async def nobody_comes() -> None:
    engine = Engine()
    engine.keep(A)
    engine.step(4)
    await asyncio.sleep(10.0)
    engine.keep(B)
    engine.step(8)
    assert await ends_after_s(engine) == HOLD_S
    assert engine.holds.take(B) == {"of": B}


async def the_engine_dies() -> None:
    engine = Engine()
    engine.keep(A)
    engine.step(4)
    assert await ends_after_s(engine, (1.0, engine.holds.clear)) == 1.0


@pytest.mark.parametrize(
    "scene",
    [without_holds, fetched, kept_in_the_step_whose_figures_are_to_come, released, nobody_comes, the_engine_dies],
)
def test_holds_end(scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scene()

    run_virtual(main())
