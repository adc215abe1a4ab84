"""What is kept of responses, how long, and by which process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.frontend import response_store
from stator.frontend.response_store import OVERHEAD_BYTES, ResponseStore, SharedResponseKeeper
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo
from stator.messages.responses import ResponseLookup, StoredResponse
from stator.transport import (
    Call,
    Endpoint,
    Identity,
    InProcessNetwork,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
)


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def store(
    max_responses: int = 100, max_bytes: int = 1 << 20, max_age_s: float = 60.0, clock: Time | None = None
) -> ResponseStore:
    return ResponseStore(max_responses=max_responses, max_bytes=max_bytes, max_age_s=max_age_s, clock=clock or Time())


def response(name: str, *turns: bytes) -> StoredResponse:
    return StoredResponse(name, b"body", turns)


def test_the_oldest_leaves_when_there_are_too_many() -> None:
    kept = store(max_responses=2)
    for name in "abc":
        kept.keep(response(name))
    assert [kept.get(name) is not None for name in "abc"] == [False, True, True]


def test_it_leaves_with_its_age() -> None:
    clock = Time()
    kept = store(clock=clock)
    kept.keep(response("a"))
    clock.now = 59.0
    assert kept.get("a") is not None
    kept.keep(response("b"))
    clock.now = 60.0
    assert kept.get("a") is None and kept.get("b") is not None and len(kept) == 1


def test_what_a_conversation_shares_is_counted_once() -> None:
    kept = store()
    first, second = bytes(1000), bytes(1001)
    kept.keep(response("a", first))
    kept.keep(response("b", first, second))
    assert kept.num_bytes == 2001 + 2 * (4 + OVERHEAD_BYTES) + 3 * 8
    kept.remove("a")
    assert kept.num_bytes == 2001 + 4 + OVERHEAD_BYTES + 2 * 8
    kept.remove("b")
    assert kept.num_bytes == 0


def test_one_that_is_larger_than_the_bound_is_not_kept() -> None:
    kept = store(max_bytes=5000)
    kept.keep(response("a"))
    kept.keep(response("b", bytes(5000)))
    assert len(kept) == 0 and kept.num_bytes == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 3), st.floats(0, 30))))
def test_the_bounds_hold_whatever_is_done(steps: list[tuple[str, bool, int, float]]) -> None:
    clock = Time()
    kept = store(max_responses=3, max_bytes=4000, clock=clock)
    turns = [bytes(500 * (n + 1)) for n in range(4)]
    for name, keep, number, wait in steps:
        clock.now += wait
        if keep:
            kept.keep(response(name, *turns[:number]))
        else:
            kept.remove(name)
            assert kept.get(name) is None
        assert len(kept) <= 3 and 0 <= kept.num_bytes <= 4000
    for name in "abcdef":
        kept.remove(name)
    assert kept.num_bytes == 0


class Directory:
    def __init__(self) -> None:
        self.infos: list[InstanceInfo] = []

    def instances(self, *, ready_only: bool = True) -> list[InstanceInfo]:
        return self.infos


@asynccontextmanager
async def processes(count: int) -> AsyncIterator[list[SharedResponseKeeper]]:
    network, directory = InProcessNetwork(), Directory()
    keepers: list[SharedResponseKeeper] = []
    async with asyncio.timeout(20):
        try:
            opened: list[RequestPlaneServer | RequestPlaneClient] = []
            for number in range(count):
                name = InstanceId(f"Frontend-{number}")
                client = RequestPlaneClient(Identity(instance_id=name), network=network)
                server = RequestPlaneServer(
                    Identity(instance_id=name), Listen(host=None, inproc_name=name), network=network
                )
                keeper = SharedResponseKeeper(instance_id=name, client=client, directory=directory)  # type: ignore[arg-type]
                server.register(Endpoint("responses", ResponseLookup, keeper.answer))
                await server.start()
                opened += [client, server]
                directory.infos.append(
                    InstanceInfo(name, "Frontend", "frontend", server.addresses, ("responses",), "h", number)
                )
                keepers.append(keeper)
            directory.infos.append(InstanceInfo(InstanceId("W-1"), "W", "decode", (), ("generate",), "h", 9))
            yield keepers
        finally:
            for each in opened:
                await each.close()


def test_a_process_finds_what_another_one_keeps() -> None:
    async def main() -> None:
        async with processes(3) as (one, two, three):
            one.keep(response("a", b"[1]", b"[2]"))
            for keeper in (one, two, three):
                assert await keeper.find("a") == response("a", b"[1]", b"[2]")
                assert await keeper.find("b") is None
            assert len(two.store) == len(three.store) == 0
            assert await three.remove("a") and not await two.remove("a")
            assert await one.find("a") is None

    asyncio.run(main())


def test_a_process_that_does_not_answer_costs_a_bounded_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "ANSWER_TIMEOUT_S", 0.05)

    def silent(self: SharedResponseKeeper, call: Call) -> None:
        pass

    async def main() -> None:
        async with processes(2) as (one, _):
            assert await one.find("a") is None

    monkeypatch.setattr(SharedResponseKeeper, "answer", silent)
    asyncio.run(main())
