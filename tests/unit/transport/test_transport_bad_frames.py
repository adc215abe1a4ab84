"""No bytes of a peer get an exception out of a connection, or harm another one."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_raw_peer import MemoryTransport, frame, greeting, raw_server, ready_client, ready_server

from stator.errors import ErrorCode
from stator.testing.contracts.transport_world import Carrier, Held, Recorder, context, open_on, world
from stator.transport.base import Target
from stator.transport.client_stream import ClientStream
from stator.transport.connection import Connection

FEW = settings(max_examples=60, deadline=None)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
caller_frames: list[Any] = [
    (1, 1, "echo", 5, 10, "request", 1000.0, None, {"a": "b"}),
    (1, 2, "never", {"x": [1, 2]}, 10, "request"),
    (4, 2, 5),
    (5, 7),
    (3, 2),
]
server_frames: list[Any] = [
    (5, 7),
    (2, [(1, [1, 2]), (2, [3], True)]),
    (2, [(3, [], True, {"code": "overloaded", "message": "full"})]),
    (7,),
]


@st.composite
def mutated(draw: st.DrawFn, frames: list[Any]) -> bytes:
    """Good frames with bytes changed, inserted, removed, or fields replaced by anything."""
    chosen = draw(st.lists(st.sampled_from(frames), min_size=1, max_size=4))
    parts: list[bytes] = []
    for message in chosen:
        if draw(st.booleans()):
            fields = list(message)
            fields[draw(st.integers(0, len(fields) - 1))] = draw(plain)
            parts.append(frame(fields))
        else:
            parts.append(frame(message))
    data = bytearray(b"".join(parts))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


async def check_fate(connection: Connection, transport: MemoryTransport, data: bytes, refused: bool) -> None:
    """Either all was understood and the connection lives, or it is closed; nothing is raised.

    refused: a closed connection has said PROTOCOL, not that something failed in here.
    """
    logging.disable(logging.CRITICAL)
    try:
        half = len(data) // 2
        connection.data_received(data[:half])
        if not transport.is_closed:
            connection.data_received(data[half:])
        connection.flush()
        assert connection.is_closed == transport.is_closed
        assert not (connection.is_closed and refused and transport.frames()[-1][1]["code"] != ErrorCode.PROTOCOL)
        if connection.is_closed:
            await connection.closed
        else:
            connection.abort()
    finally:
        logging.disable(logging.NOTSET)


def corpus(who: str) -> list[Any]:
    """What was found to be worth keeping: add a file for whatever a connection ever stumbled over."""
    files = sorted((Path(__file__).parent / "corpus").glob(f"{who}-*.bin"))
    assert len(files) > 10
    return [pytest.param(file.read_bytes(), id=file.stem) for file in files]


@pytest.mark.parametrize("data", corpus("server"))
def test_a_server_survives_the_corpus(data: bytes) -> None:
    async def run() -> None:
        await check_fate(*ready_server(), data, True)

    asyncio.run(run())


@pytest.mark.parametrize("data", corpus("client"))
def test_a_client_survives_the_corpus(data: bytes) -> None:
    asyncio.run(_client_survives(data))


@FEW
@given(data=mutated(caller_frames))
def test_a_server_survives_mutated_frames(data: bytes) -> None:
    async def run() -> None:
        await check_fate(*ready_server(), data, True)

    asyncio.run(run())


@FEW
@given(data=st.binary(max_size=80))
def test_a_server_survives_garbage_for_a_hello(data: bytes) -> None:
    async def run() -> None:
        await check_fate(*raw_server(), greeting()[0][:4] + data, False)

    asyncio.run(run())


@FEW
@given(data=mutated(server_frames))
def test_a_client_survives_mutated_frames_and_ends_each_stream_once(data: bytes) -> None:
    asyncio.run(_client_survives(data))


async def _client_survives(data: bytes) -> None:
    connection, transport = ready_client()
    sinks = [Recorder() for _ in range(3)]
    for sink in sinks:
        stream = ClientStream("echo", sink, context(), int, 256, {}, asyncio.get_running_loop())
        connection.open(stream, Target(("memory",), "echo"), 1)
    await check_fate(connection, transport, data, False)
    for sink in sinks:
        await sink.ended()


def test_what_a_call_names_is_bounded() -> None:
    """Names and headers are kept, and told again: no longer, and no more of them, than anybody needs."""

    async def run(message: Any) -> str:
        connection, transport = ready_server()
        connection.data_received(frame(message))
        connection.flush()
        told = str(transport.frames())
        if not connection.is_closed:
            connection.abort()
        await connection.closed
        return told

    headers = {f"h{number}": "v" for number in range(64)}
    assert "headers of a call are 64" in asyncio.run(run((1, 1, "echo", 5, 10, "r", None, None, headers)))
    assert "a name in a call is longer" in asyncio.run(run((1, 1, "e" * 5000, 5, 10, "r")))
    assert "a name in a call is longer" in asyncio.run(run((1, 1, "echo", 5, 10, "r" * 5000)))


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xff\xff\xff",
        frame(["what", "is", "this"]),
        frame((99, 1, 2)),
        frame((1, "not a number", "echo", 5, 10, "request")),
        frame((1, 0, "echo", 5, 0, "request")),
        frame((2, [(1, [1])])),
        frame((1, 0, "never", 5, 10, "a")) + frame((1, 0, "never", 5, 10, "b")),
        b"\0\0\0\x02\xc1\xc1",
        b"\0\0\0\0",
        b"\0\0\x40\0" + b"\x91" * 16384,
    ],
)
def test_a_bad_frame_closes_with_protocol(bad: bytes) -> None:
    async def run() -> None:
        connection, transport = ready_server()
        connection.data_received(bad)
        assert connection.is_closed and transport.is_closed
        kind, error = transport.frames()[-1]
        assert kind == 7 and error["code"] == ErrorCode.PROTOCOL
        await connection.closed

    asyncio.run(run())


def test_a_bad_peer_harms_no_other_connection() -> None:
    async def run() -> None:
        held = Held()
        async with world(Carrier.TCP) as made:
            server = await made.serve({"run": held})
            sink, _ = open_on(made.client(), server)
            call = await held.called()
            host, _, port = server.addresses[0].removeprefix("tcp://").rpartition(":")
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, frame({"kind": "hello"})):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(garbage)
                async with asyncio.timeout(5):
                    await reader.read()
                writer.close()
                await writer.wait_closed()
            call.items([1])
            call.end()
            assert await sink.ended() is None and sink.received == [1]

    asyncio.run(run())


def test_a_deadline_on_the_wire_may_be_any_number() -> None:
    async def run() -> None:
        connection, transport = ready_server()
        for number, ms_left in enumerate((float("nan"), float("-inf"), -1.0, 0.0, float("inf"), 1e300)):
            connection.data_received(frame((1, number, "never", 5, 10, "r", ms_left)))
        connection.flush()
        entries = [entry for message in transport.frames() for entry in message[1]]
        assert [(entry[0], entry[3]["code"]) for entry in entries] == [(n, ErrorCode.DEADLINE) for n in range(4)]
        connection.abort()

    asyncio.run(run())
