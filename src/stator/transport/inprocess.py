"""The in-process carrier: the same streams, with a loop iteration in place of a socket.

Requests are encoded once, to hold them to the same size bound, and then passed as they are; items are passed as they
are and unmeasured. Requests of another type than the endpoint's are converted as a socket would.
"""

import asyncio
from typing import Any

import msgspec

from stator.errors import StatorError
from stator.ids import InstanceId
from stator.transport.base import Endpoint, Target
from stator.transport.client_stream import ClientStream
from stator.transport.dispatch import Dispatcher
from stator.transport.encoding import encode_request
from stator.transport.refusals import instance_stopped, too_many_streams
from stator.transport.server_call import ServerCall
from stator.transport.settings import Identity, TransportSettings


class InProcessNetwork:
    """The servers that are reached by name in one process (and on one event loop)."""

    def __init__(self) -> None:
        self._servers: dict[str, InProcessCarrier] = {}

    def add(self, name: str, server: "InProcessCarrier") -> None:
        """Raises ValueError if the name is taken."""
        if name in self._servers:
            raise ValueError(f"inproc://{name} is already served")
        self._servers[name] = server

    def remove(self, name: str) -> None:
        self._servers.pop(name, None)

    def find(self, name: str) -> "InProcessCarrier | None":
        return self._servers.get(name)


class InProcessCarrier:
    """One server's in-process side: opens streams on its endpoints and moves what their calls produce."""

    def __init__(self, dispatcher: Dispatcher, settings: TransportSettings) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._pairs: dict[_Pair, None] = {}
        self._queued: list[_Pair] = []
        self._next_id = 0
        self._loop = asyncio.get_running_loop()

    @property
    def identity(self) -> Identity:
        return self._dispatcher.identity

    @property
    def instance_id(self) -> InstanceId:
        return self._dispatcher.instance_id

    def open(self, stream: ClientStream, target: Target, request: Any) -> None:
        pair = _Pair(self, stream, target, request)
        self._next_id += 1
        stream.attach(pair, self._next_id)
        if len(self._pairs) >= self._settings.max_streams:
            stream.break_soon(too_many_streams(self._settings.max_streams))
            return
        self._pairs[pair] = None
        self._loop.call_soon(pair.start)

    def make_call(self, pair: "_Pair", target: Target, request: Any) -> tuple[Endpoint, ServerCall]:
        """Raises StatorError for a call that is refused."""
        limit = self._settings.frame_limit(target.lane)
        encoded = encode_request(target.endpoint, request, limit)
        endpoint = self._dispatcher.find(target.endpoint, target.instance_id)
        if type(request) is not endpoint.request_type:
            request = self._converted(endpoint, request, encoded)
        call = ServerCall(
            pair,
            pair.stream.stream_id,
            target.endpoint,
            request,
            pair.stream.context,
            window=pair.stream.window,
            max_buffered=self._settings.max_buffered_items,
            loop=self._loop,
            watch_deadline=False,
        )
        return endpoint, call

    def _converted(self, endpoint: Endpoint, request: Any, encoded: bytes) -> Any:
        try:
            return msgspec.convert(request, endpoint.request_type)
        except msgspec.ValidationError:
            return self._dispatcher.decode_request(endpoint, encoded)

    def run(self, endpoint: Endpoint, call: ServerCall) -> None:
        self._dispatcher.run(endpoint, call)

    def queue(self, pair: "_Pair") -> None:
        if not self._queued:
            self._loop.call_soon(self._flush)
        self._queued.append(pair)

    def discard(self, pair: "_Pair") -> None:
        self._pairs.pop(pair, None)

    def close(self) -> None:
        """Cancel every call; their callers see a lost instance, after what had ended was delivered."""
        self._flush()
        for pair in list(self._pairs):
            pair.lose(instance_stopped(self._dispatcher.instance_id))
        self._pairs.clear()

    def _flush(self) -> None:
        queued, self._queued = self._queued, []
        for pair in queued:
            pair.move()


class _Pair:
    """Both ends of one stream. Implements CallLink and StreamLink."""

    __slots__ = ("_call", "_carrier", "_loop", "_request", "_target", "stream")

    congested = False

    def __init__(self, carrier: InProcessCarrier, stream: ClientStream, target: Target, request: Any) -> None:
        self._carrier = carrier
        self._target = target
        self._request = request
        self._loop = stream.loop
        self._call: ServerCall | None = None
        self.stream = stream

    def start(self) -> None:
        request, self._request = self._request, None
        if self.stream.closed:
            return
        try:
            endpoint, self._call = self._carrier.make_call(self, self._target, request)
        except StatorError as error:
            self.stream.lose(error)
            return
        self._carrier.run(endpoint, self._call)

    def move(self) -> None:
        """Hand what the call has to the sink."""
        entry = None if self._call is None else self._call.take()
        if entry is None:
            return
        if entry[1]:
            self.stream.deliver(entry[1])
        if len(entry) == 3:
            self.stream.finish(None)
        elif len(entry) == 4:
            self.stream.finish(entry[3].to_error())

    def lose(self, error: StatorError) -> None:
        if self._call is not None:
            self._call.abandon()
        self.stream.lose(error)

    def queue(self, call: ServerCall) -> None:
        self._carrier.queue(self)

    def forget(self, call: ServerCall, /) -> None:
        # Two that know each other would be the garbage collector's.
        self._call = None
        self._carrier.discard(self)

    def release(self, stream: ClientStream) -> None:
        self._carrier.discard(self)

    def send_cancel(self, stream: ClientStream) -> None:
        if self._call is not None:
            self._loop.call_soon(self._call.abandon)

    def send_credit(self, stream: ClientStream, num_items: int) -> None:
        if self._call is not None:
            self._call.add_credit(num_items)
