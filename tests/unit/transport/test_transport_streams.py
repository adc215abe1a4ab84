"""Both ends of a stream against a simple model: what was pushed, what may have arrived, and one end."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.errors import ErrorCode, StatorError
from stator.testing.contracts.transport_world import Carrier, Held, open_on, turns, world
from stator.transport.client_connection import ClientConnection
from stator.transport.pool import ConnectionPool

WINDOW = 4
MAX_BUFFERED = 16

step = st.one_of(
    st.tuples(st.just("push"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["turn", "turn", "pause", "resume"]), st.just(0)),
)
last = st.sampled_from(["end", "cancel", "close", "nothing"])


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(step, max_size=40), ending=last, resume=st.booleans())
def test_a_stream_keeps_its_promises(steps: list[tuple[str, int]], ending: str, resume: bool) -> None:
    async def run() -> None:
        held = Held()
        async with world(Carrier.INPROCESS, window_items=WINDOW, max_buffered_items=MAX_BUFFERED) as made:
            server = await made.serve({"run": held})
            sink, handle = open_on(made.client(), server)
            call = await held.called()
            pushed: list[int] = []
            paused, num_at_pause = False, 0
            for name, number in steps:
                if name == "push" and not call.cancelled:
                    items = list(range(len(pushed), len(pushed) + number))
                    pushed += items
                    call.items(items)
                elif name == "turn":
                    await turns(1)
                elif name == "pause":
                    handle.pause()
                    if not paused:
                        paused, num_at_pause = True, len(sink.received)
                elif name == "resume":
                    handle.resume()
                    paused = False
                assert sink.received == pushed[: len(sink.received)]
                assert not paused or len(sink.received) == num_at_pause
                assert len(sink.ends) <= 1
            overrun = call.cancelled
            if ending == "end":
                call.end()
            elif ending == "cancel":
                handle.cancel()
            elif ending == "close":
                await server.close()
            if resume or ending in ("end", "nothing"):
                handle.resume()
            if ending == "nothing" and not overrun:
                await turns(20)
                assert not sink.ends and sink.received == pushed
                handle.cancel()
            error = await sink.ended()
            code = "" if error is None else error.code
            if error is None:
                assert ending == "end" and sink.received == pushed
                assert held.num_cancelled == 0
            else:
                assert held.num_cancelled == 1
            expected = {"end": "", "cancel": "cancelled", "close": "instance_lost", "nothing": "cancelled"}[ending]
            assert code in ({expected, ErrorCode.SLOW_READER} if overrun else {expected})
            assert sink.received == pushed[: len(sink.received)]

    asyncio.run(run())


@pytest.mark.parametrize("how", ["abort", "close"])
def test_a_connection_lost_between_its_handshake_and_its_first_stream(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that stops in that moment; the stream must not wait for what nobody will send."""
    reach = ConnectionPool._reach

    async def reach_and_lose(self: ConnectionPool, *where: Any) -> Any:
        reached = await reach(self, *where)
        assert isinstance(reached, ClientConnection)
        if how == "abort":
            reached.abort()
        else:
            reached.close(StatorError(ErrorCode.INSTANCE_LOST, "the server stopped"))
        return reached

    async def run() -> None:
        async with world(Carrier.TCP) as made:
            server = await made.serve({"run": Held()})
            monkeypatch.setattr(ConnectionPool, "_reach", reach_and_lose)
            sink, _ = open_on(made.client(), server)
            async with asyncio.timeout(5):
                while not sink.ends:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            (error,) = sink.ends
            assert error is not None and error.code is ErrorCode.INSTANCE_LOST

    asyncio.run(run())
