"""What a GrammarGate makes of what its pool says. Real processes: the engine contract's bombs."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from stator.engines import grammar_gate
from stator.engines.grammar_gate import GrammarGate
from stator.errors import ErrorCode, StatorError
from stator.messages.grammar import Regex
from stator.runtime.killable import JobFailed, JobKilled, JobTooLong, KillablePool, PoolUnavailable


class FakePool:
    closed = False

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, float]] = []
        self.answers: list[asyncio.Future[bytes]] = []

    def submit(self, payload: bytes, timeout_s: float) -> "asyncio.Future[bytes]":
        self.asked.append((payload, timeout_s))
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    async def close(self) -> None:
        self.closed = True


def run(scene: Callable[[GrammarGate, FakePool], Awaitable[None]]) -> None:
    async def main() -> None:
        pool = FakePool()
        gate = GrammarGate(Path("tokenizer.json"), timeout_s=3.0, pool=cast(KillablePool, pool))
        async with asyncio.timeout(10):
            await scene(gate, pool)
        await gate.close()
        assert pool.closed

    asyncio.run(main())


async def asked(pool: FakePool, count: int) -> None:
    while len(pool.asked) < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


def test_one_that_ends_is_known_from_then_on() -> None:
    async def scene(gate: GrammarGate, pool: FakePool) -> None:
        checks = [asyncio.create_task(gate.check(Regex("a"))) for _ in range(5)]
        await asked(pool, 1)
        checks[0].cancel()
        pool.answers[0].set_result(b"")
        done = await asyncio.gather(*checks, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError) and done[1:] == [None] * 4
        await gate.check(Regex("a"))
        assert pool.asked == [(msgspec.msgpack.encode(Regex("a")), 3.0)]

    run(scene)


def test_one_that_the_library_refuses_is_the_engine_s_to_refuse() -> None:
    async def scene(gate: GrammarGate, pool: FakePool) -> None:
        check = asyncio.create_task(gate.check(Regex("(")))
        await asked(pool, 1)
        pool.answers[0].set_exception(JobFailed("StatorError"))
        await check
        await gate.check(Regex("("))
        assert len(pool.asked) == 1

    run(scene)


@pytest.mark.parametrize(
    ("failure", "words"), [(JobTooLong(), "longer than 3 seconds"), (JobKilled(), "memory")], ids=["late", "killed"]
)
def test_one_that_does_not_end_is_refused_each_time(failure: JobFailed, words: str) -> None:
    async def scene(gate: GrammarGate, pool: FakePool) -> None:
        for number in range(2):
            check = asyncio.create_task(gate.check(Regex("a{9}")))
            await asked(pool, number + 1)
            pool.answers[number].set_exception(failure)
            with pytest.raises(StatorError, match=words) as refused:
                await check
            assert (refused.value.code, refused.value.param) == (ErrorCode.INVALID_REQUEST, "grammar")

    run(scene)


def test_without_processes_the_engine_is_asked_alone_and_that_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(gate: GrammarGate, pool: FakePool) -> None:
        for number in range(2):
            check = asyncio.create_task(gate.check(Regex("a")))
            await asked(pool, number + 1)
            pool.answers[number].set_exception(PoolUnavailable("no memory"))
            await check

    run(scene)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_gate, "MAX_KNOWN", 2)

    async def scene(gate: GrammarGate, pool: FakePool) -> None:
        async def check(text: str) -> bool:
            """Whether it was known."""
            before = len(pool.asked)
            checked: Any = asyncio.create_task(gate.check(Regex(text)))
            await asyncio.sleep(0)
            if len(pool.asked) > before:
                pool.answers[-1].set_result(b"")
            await checked
            return len(pool.asked) == before

        assert [await check(text) for text in "abacabb"] == [False, False, True, False, True, False, True]

    run(scene)
