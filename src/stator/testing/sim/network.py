"""Connections between nodes, in memory: what TCP and the kernels at both ends do, as far as a process can tell.

A connection is two ends. Bytes that a protocol writes wait at its end, travel with a drawn delay, in order, and wait at
the other end while that one does not read or its node is paused. Travelling and waiting there are bounded together, as
socket buffers are; past that they wait in the writer's transport, which then pauses its protocol, as asyncio's does.

Faults: hosts cut off from each other (what is under way is held, and goes on when the cut heals); a connection that is
reset at both ends, or that goes silent; a node that dies (its kernel resets what it had open), or a host that does
(nothing is heard of it).
"""

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from random import Random
from typing import Any

from stator.errors import ConfigError
from stator.testing.sim.loop import Node, SimLoop, current_node
from stator.testing.sim.trace import Trace
from stator.transport.addresses import TcpAddress
from stator.transport.settings import Listen

logger = logging.getLogger(__name__)

DEFAULT_HIGH_WATER = 64 * 1024
FIRST_PORT = 20_000
SYN_RETRY_S = 1.0
_WILDCARDS = frozenset({None, "", "0.0.0.0", "::"})


@dataclass(slots=True)
class Weather:
    """delay_s: between hosts, one way; each piece takes half to once and a half of it. local_delay_s: within a host.

    spike: probability that a piece takes spike_s longer. window_bytes: what one direction of a connection holds beside
    the writer's own buffer.
    """

    delay_s: float = 0.000_3
    local_delay_s: float = 0.000_03
    spike: float = 0.002
    spike_s: float = 0.05
    window_bytes: int = 256 * 1024


@dataclass(frozen=True, slots=True)
class BoundSocket:
    """What `SimNetwork.bind` gives in place of a bound socket."""

    host: str
    port: int
    family: int = 2

    def getsockname(self) -> tuple[str, int]:
        return self.host, self.port

    def fileno(self) -> int:
        """None of the kernel's."""
        return -1

    def close(self) -> None:
        pass


_EOF = object()
_RESET = object()


class Network:
    """Implements loop.SimNetwork. All nodes reach each other at their hosts' names."""

    def __init__(self, loop: SimLoop, rng: Random, trace: Trace, weather: Weather | None = None) -> None:
        self.weather = weather or Weather()
        self.connections: dict[int, tuple[End, End]] = {}
        self.num_connections = 0
        self._loop = loop
        self._rng = rng
        self._trace = trace
        self._listeners: dict[tuple[str, int], _Server] = {}
        self._cut: set[tuple[str, str]] = set()
        self._slow: dict[str, float] = {}
        self._gone: set[str] = set()
        self._next_port: dict[str, int] = {}
        loop.network = self

    # For the product.

    async def bind(self, listen: Listen, host: str) -> tuple[BoundSocket, TcpAddress]:
        """In place of `transport.listening.bind_tcp`."""
        node = _here()
        if listen.port:
            if (node.host, listen.port) in self._listeners:
                raise ConfigError(f"cannot listen on {host}: port {listen.port} is in use")
            port = listen.port
        else:
            port = self._free_port(node.host)
        return BoundSocket(host, port), TcpAddress(listen.advertise or node.host, port)

    def serve(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str | None, port: int, sock: Any
    ) -> asyncio.AbstractServer:
        node = _here()
        bound = sock if isinstance(sock, BoundSocket) else BoundSocket(host or node.host, port or 0)
        if not bound.port:
            bound = BoundSocket(bound.host, self._free_port(node.host))
        key = (node.host, bound.port)
        if key in self._listeners:
            raise OSError(errno.EADDRINUSE, "address already in use")
        server = _Server(self, node, factory, bound, key)
        self._listeners[key] = server
        node.on_death.append(server.close)
        return server

    async def connect(self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int) -> tuple[Any, Any]:
        node = _here()
        await asyncio.sleep(self.delay(node.host, host))
        # As a kernel does, which nobody tells that the cut has healed.
        while self.is_cut(node.host, host) or self.is_cut(host, node.host):  # noqa: ASYNC110
            await asyncio.sleep(SYN_RETRY_S)
        server = self._listeners.get((host, port))
        if server is None:
            await asyncio.sleep(self.delay(host, node.host))
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"Connect call failed ({host!r}, {port})")
        self.num_connections += 1
        number = self.num_connections
        local = (node.host, self._free_port(node.host))
        ours = End(self, number, node, node.context, local, (host, port))
        theirs = End(self, number, server.node, server.node.context, (host, port), local)
        ours.peer, theirs.peer = theirs, ours
        self.connections[number] = (ours, theirs)
        self._trace.mix("connect", node.name, server.node.name)
        self._loop.call_soon(theirs.begin, server.factory, context=server.node.context)
        await asyncio.sleep(self.delay(host, node.host))
        protocol = factory()
        ours.begin(lambda: protocol)
        return ours, protocol

    # For faults.

    def cut(self, a: str, b: str, *, one_way: bool = False) -> None:
        """Nothing gets from host a to host b, nor back."""
        self._cut.add((a, b))
        if not one_way:
            self._cut.add((b, a))

    def heal(self, a: str, b: str) -> None:
        self._cut -= {(a, b), (b, a)}
        for ends in list(self.connections.values()):
            for end in ends:
                if not self.is_cut(end.peer.node.host, end.node.host):
                    end.release_held()

    def heal_all(self) -> None:
        for a, b in sorted(self._cut):
            self.heal(a, b)

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cut or source in self._gone or target in self._gone

    def lose_host(self, host: str) -> None:
        """Nothing is heard of it any more, not even resets."""
        self._gone.add(host)

    def is_gone(self, host: str) -> bool:
        return host in self._gone

    def find_host(self, host: str) -> None:
        """It is back, empty."""
        self._gone.discard(host)
        for ends in list(self.connections.values()):
            for end in ends:
                if end.peer.node.host == host:
                    end.release_held()

    def slow_down(self, host: str, factor: float) -> None:
        """Everything from and to the host takes so many times as long."""
        self._slow[host] = factor

    def reset(self, number: int) -> None:
        for end in self.connections.get(number, ()):
            end.send_reset()

    def silence(self, number: int) -> None:
        """Nothing of this connection arrives any more, and nobody is told."""
        for end in self.connections.get(number, ()):
            end.silent = True

    def between(self, *, hosts: tuple[str, ...] = ()) -> list[int]:
        """Connections that are open, of all hosts or with an end at one of these."""
        return [
            number
            for number, (a, b) in sorted(self.connections.items())
            if not hosts or a.node.host in hosts or b.node.host in hosts
        ]

    # Inside.

    def delay(self, source: str, target: str) -> float:
        weather, rng = self.weather, self._rng
        base = weather.local_delay_s if source == target else weather.delay_s
        delay = base * (0.5 + rng.random())
        if source != target and rng.random() < weather.spike:
            delay += weather.spike_s * rng.random()
        if self._slow:
            delay *= max(self._slow.get(source, 1.0), self._slow.get(target, 1.0))
        return delay

    def moved(self, end: "End", size: int) -> None:
        self._trace.mix(end.number, size, self._loop.time())

    def flip(self) -> bool:
        return self._rng.random() < 0.5

    def forget(self, end: "End") -> None:
        if end.peer.over:
            self.connections.pop(end.number, None)

    def unserve(self, server: "_Server") -> None:
        if self._listeners.get(server.key) is server:
            del self._listeners[server.key]

    def _free_port(self, host: str) -> int:
        self._next_port[host] = self._next_port.get(host, FIRST_PORT) + 1
        return self._next_port[host]


class End(asyncio.Transport):
    """One end of a connection: the transport of the protocol there."""

    peer: "End"

    def __init__(
        self,
        network: Network,
        number: int,
        node: Node,
        context: Context,
        local: tuple[str, int],
        remote: tuple[str, int],
    ) -> None:
        super().__init__({"peername": remote, "sockname": local})
        self.number = number
        self.node = node
        self.over = False
        self.silent = False
        self._network = network
        self._loop: SimLoop = network._loop  # pyright: ignore[reportPrivateUsage]
        self._context = context
        self._protocol: Any = None
        self._buffer = bytearray()
        self._num_travelling = 0
        self._inbox: deque[Any] = deque()
        self._held: deque[Any] = deque()
        self._last_arrival = 0.0
        self._reading = True
        self._closing = False
        self._writing_paused = False
        self._high, self._low = DEFAULT_HIGH_WATER, DEFAULT_HIGH_WATER // 4
        node.on_death.append(self._died)

    def begin(self, factory: Callable[[], Any]) -> None:
        if self.over:
            return
        self._protocol = factory()
        self._protocol.connection_made(self)
        self._drain_inbox()

    # asyncio.Transport.

    def write(self, data: Any) -> None:
        if self._closing or self.over or not data:
            return
        self._buffer += data
        self._pump()
        if len(self._buffer) > self._high and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = DEFAULT_HIGH_WATER if low is None else 4 * low
        self._high, self._low = high, high // 4 if low is None else low

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.call_soon(self._drain_inbox, context=self._context)

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def is_closing(self) -> bool:
        return self._closing or self.over

    def close(self) -> None:
        if not self._closing and not self.over:
            self._closing = True
            self._inbox.clear()
            if not self._buffer:
                self._loop.call_soon(self._end, None, context=self._context)

    def abort(self) -> None:
        if not self.over:
            self._closing = True
            self._buffer.clear()
            self.send_reset_to_peer()
            self._loop.call_soon(self._end, None, context=self._context)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def can_write_eof(self) -> bool:
        return False

    # The network's side.

    def _pump(self) -> None:
        room = self._network.weather.window_bytes - self._num_travelling
        if self._buffer and room > 0:
            piece = bytes(self._buffer[:room])
            del self._buffer[:room]
            self._num_travelling += len(piece)
            self._send(piece)

    def _send(self, what: Any) -> None:
        peer = self.peer
        if self.silent or peer.over and what is not _RESET:
            if peer.over and not self.silent and isinstance(what, bytes):
                self._answered_with_reset()
            return
        arrival = self._loop.time() + self._network.delay(self.node.host, peer.node.host)
        peer._last_arrival = arrival = max(arrival, peer._last_arrival)
        self._loop.call_at(arrival, peer._arrive, what, context=peer._context)

    def _answered_with_reset(self) -> None:
        """The peer's kernel knows no such connection."""
        there_and_back = 2 * self._network.delay(self.node.host, self.peer.node.host)
        arrival = self._last_arrival = max(self._loop.time() + there_and_back, self._last_arrival)
        self._loop.call_at(arrival, self._arrive, _RESET, context=self._context)

    def _arrive(self, what: Any) -> None:
        if self.silent or self.over:
            if self.over and not self.silent and isinstance(what, bytes):
                self.send_reset_to_peer()
            return
        if self._held or self._network.is_cut(self.peer.node.host, self.node.host):
            self._held.append(what)
        else:
            self._take(what)

    def release_held(self) -> None:
        """The cut has healed: what it held up arrives."""
        if self._held:
            arrival = self._loop.time() + self._network.delay(self.peer.node.host, self.node.host)
            self._loop.call_at(arrival, self._take_held, context=self._context)

    def _take_held(self) -> None:
        while self._held and not self._network.is_cut(self.peer.node.host, self.node.host):
            self._take(self._held.popleft())

    def _take(self, what: Any) -> None:
        if what is _RESET:
            self._inbox.clear()
            self._closing = True
            self._buffer.clear()
            self._loop.call_soon(
                self._end, ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), context=self._context
            )
        elif self._protocol is None or not self._reading or self._inbox:
            self._inbox.append(what)
        else:
            self._deliver(what)

    def _drain_inbox(self) -> None:
        while self._inbox and self._reading and not self._closing and not self.over:
            self._deliver(self._inbox.popleft())

    def _deliver(self, what: Any) -> None:
        if self._closing or self.over:
            return
        if what is _EOF:
            if not self._protocol.eof_received():
                self.close()
            return
        self._network.moved(self, len(what))
        self.peer._was_read(len(what))
        try:
            self._protocol.data_received(what)
        except Exception:
            logger.exception("a protocol failed on what it received")
            self.abort()

    def _was_read(self, num_bytes: int) -> None:
        self._num_travelling -= num_bytes
        if self._buffer and not self.over:
            self._loop.call_soon(self._go_on, context=self._context)

    def _go_on(self) -> None:
        if self.over:
            return
        self._pump()
        if self._writing_paused and len(self._buffer) <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()
        if self._closing and not self._buffer:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self.over:
            return
        self.over = True
        self._closing = True
        self._send(_EOF)
        self._network.forget(self)
        self._let_go()
        if self._protocol is not None:
            self._protocol.connection_lost(error)

    def send_reset(self) -> None:
        """As if the peer's kernel had sent one."""
        self._loop.call_soon(self._arrive, _RESET, context=self._context)

    def send_reset_to_peer(self) -> None:
        self._send(_RESET)

    def _died(self) -> None:
        """Its kernel closes what the process had open; with something unread that is a reset."""
        if not self.over:
            self.over = True
            self._send(_EOF if self._network.flip() else _RESET)
            self._network.forget(self)

    def _let_go(self) -> None:
        if self._died in self.node.on_death:
            self.node.on_death.remove(self._died)


class _Server(asyncio.AbstractServer):
    def __init__(
        self, network: Network, node: Node, factory: Callable[[], Any], bound: BoundSocket, key: tuple[str, int]
    ) -> None:
        self.node = node
        self.factory = factory
        self.key = key
        self.sockets = (bound,)
        self._network = network

    def close(self) -> None:
        self._network.unserve(self)

    async def wait_closed(self) -> None:
        pass

    def is_serving(self) -> bool:
        return True

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._network._loop  # pyright: ignore[reportPrivateUsage]


def _here() -> Node:
    node = current_node()
    assert node is not None, "only nodes have sockets"
    return node
