"""Addresses, ports, paths, and what is said when they cannot be had."""

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from stator.errors import ConfigError, ErrorCode, StatorError
from stator.ids import RequestId
from stator.runtime.context import CallContext
from stator.transport import (
    Call,
    Endpoint,
    Identity,
    InProcessNetwork,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    Target,
    TransportSettings,
)
from stator.transport.addresses import InProcessAddress, TcpAddress, UnixAddress, parse_address
from stator.transport.calls import stream as stream_of
from stator.transport.listening import bind_tcp, bind_unix

IDENTITY = Identity(token="token")


def start_and_close(listen: Listen) -> tuple[str, ...]:
    async def run() -> tuple[str, ...]:
        server = RequestPlaneServer(IDENTITY, listen, network=InProcessNetwork())
        await server.start()
        addresses = server.addresses
        await server.close()
        assert server.addresses == ()
        return addresses

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://10.0.0.1:80", TcpAddress("10.0.0.1", 80)),
        ("tcp://[::1]:80", TcpAddress("::1", 80)),
        ("tcp://head.example:7441", TcpAddress("head.example", 7441)),
        ("unix:///run/stator/a.sock", UnixAddress("/run/stator/a.sock")),
        ("inproc://worker-1", InProcessAddress("worker-1")),
    ],
)
def test_addresses_are_read_and_written(text: str, address: object) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["", "tcp://", "tcp://host", "tcp://host:0", "tcp://host:99999", "tcp://host:x", "tcp://:80", "tcp://a:1/b",
     "tcp://user@a:1", "unix://relative", "inproc://", "http://host:80", "host:80", "tcp://[::1:80"],
)  # fmt: skip
def test_what_is_not_an_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address; expected tcp://host:port"):
        parse_address(text)


def test_addresses_come_best_first(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    found = start_and_close(Listen(unix_path=path, inproc_name="here", advertise="head"))
    assert found[:2] == ("inproc://here", f"unix://{path}")
    assert found[2].startswith("tcp://head:")
    assert not os.path.exists(path)


def test_a_wildcard_needs_a_host_to_advertise() -> None:
    with pytest.raises(ConfigError, match="set advertise"):
        start_and_close(Listen(host="0.0.0.0"))
    (address,) = start_and_close(Listen(host="0.0.0.0", advertise="10.1.2.3"))
    assert address.startswith("tcp://10.1.2.3:")


def test_a_port_that_is_taken_is_named_and_a_range_goes_on() -> None:
    async def run() -> None:
        first, taken = await bind_tcp(Listen(), "127.0.0.1")
        first.listen()
        try:
            with pytest.raises(ConfigError, match=f"port {taken.port} is in use"):
                await bind_tcp(Listen(port=taken.port), "127.0.0.1")
            second, address = await bind_tcp(Listen(port_range=(taken.port, taken.port + 50)), "127.0.0.1")
            second.close()
            assert taken.port < address.port <= taken.port + 50
            with pytest.raises(ConfigError, match="every port|port .* is in use"):
                await bind_tcp(Listen(port_range=(taken.port, taken.port)), "127.0.0.1")
        finally:
            first.close()

    asyncio.run(run())


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot listen on 192.0.2.1"):
        start_and_close(Listen(host="192.0.2.1"))


def test_nagles_algorithm_is_off() -> None:
    async def run() -> None:
        bound, _ = await bind_tcp(Listen(), "127.0.0.1")
        bound.listen()
        with socket.create_connection(bound.getsockname()), bound:
            accepted, _ = bound.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    asyncio.run(run())


def test_a_unix_socket_is_private_and_replaces_only_a_dead_one(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    dead = bind_unix(path)
    dead.close()
    assert os.path.exists(path)
    alive = bind_unix(path)
    alive.listen()
    try:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with pytest.raises(ConfigError, match="in use by another process"):
            bind_unix(path)
        other = tmp_path / "notes.txt"
        other.write_text("keep me")
        with pytest.raises(ConfigError, match="notes.txt"):
            bind_unix(str(other))
        assert other.read_text() == "keep me"
    finally:
        alive.close()


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        network = InProcessNetwork()
        path = str(tmp_path / "s.sock")
        listen = Listen(host="192.0.2.1", unix_path=path, inproc_name="here")
        with pytest.raises(ConfigError):
            await RequestPlaneServer(IDENTITY, listen, network=network).start()
        assert network.find("here") is None

    asyncio.run(run())
    assert not os.listdir(tmp_path)


def test_what_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="InProcessNetwork"):
        RequestPlaneServer(IDENTITY, Listen(inproc_name="a"))
    with pytest.raises(ConfigError, match="STATOR_TOKEN"):
        RequestPlaneServer(Identity(), Listen())
    with pytest.raises(ValueError, match="ping_interval_s"):
        TransportSettings(ping_interval_s=10)
    with pytest.raises(ValueError, match="at least a window"):
        TransportSettings(max_buffered_items=10)
    assert "secret" not in repr(Identity(token="secret"))


def test_a_muted_server_sends_nothing_more_and_tells_its_callers_only_that_it_is_gone() -> None:
    async def main() -> None:
        server = RequestPlaneServer(IDENTITY, Listen(host="127.0.0.1"))
        calls: list[Call] = []
        gone = asyncio.Event()

        def handle(call: Call) -> None:
            call.on_cancel(gone.set)
            calls.append(call)
            call.items(["first"])

        server.register(Endpoint("hold", Any, handle))
        await server.start()
        client = RequestPlaneClient(IDENTITY)
        got: list[Any] = []
        stream = stream_of(client, Target(server.addresses, "hold"), None, context=CallContext(RequestId("r")))
        with pytest.raises(StatorError) as caught:
            async for items in stream:
                got += items
                calls[0].items(["ready, but old"])
                server.mute()
                calls[0].items(["older"])
        assert got == ["first"]
        assert caught.value.code is ErrorCode.INSTANCE_LOST
        await asyncio.wait_for(gone.wait(), 5)
        await client.close()
        await server.close()

    asyncio.run(main())
