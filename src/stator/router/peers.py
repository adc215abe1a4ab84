"""A router and the other routers of its deployment: each tells the others of its bookings, over the request plane.

Every instance that discovery shows with the endpoint `bookings` is a peer; nothing is configured. The rules are in
`core.peer_bookings`; this shell sends what changed, at once after a quiet time and then every FLUSH_EVERY_S, and
follows each peer's stream for as long as its lease lives. A subscriber that falls behind is ended with SLOW_READER, and
begins again with the whole state.
"""

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from stator.core.peer_bookings import FORGET_MS, HEARTBEAT_MS, BookingLog, OthersBookings, PeerView
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.instances import InstanceInfo
from stator.messages.reports import PEER_DELAY_S, PeerStats
from stator.messages.routing import BOOKINGS_ENDPOINT, BookingChanges, BookingsRequest
from stator.runtime.context import CallContext, loop_time
from stator.runtime.directory import InstanceDirectory
from stator.transport.base import Call, StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 0.005
PROBE_EVERY_S = 1.0
CHECK_EVERY_S = 0.1
FIRST_RETRY_S = 0.05
MAX_RETRY_S = 1.0
MAX_SUBSCRIBERS = 64


class PeerExchange:
    """From construction to `close`.

    own_id: this router's, which is no peer. log: this router's bookings. into: where the
    peers' go. on_room: called when a peer's bookings have ended.
    """

    def __init__(
        self,
        *,
        client: TransportClient,
        directory: InstanceDirectory,
        own_id: InstanceId,
        log: BookingLog,
        into: OthersBookings,
        rng: Random,
        on_room: Callable[[], None],
    ) -> None:
        self.client = client
        self.rng = rng
        self.into = into
        self.num_resyncs = 0
        self._directory = directory
        self._own_id = own_id
        self._log = log
        self._on_room = on_room
        self._loop = asyncio.get_running_loop()
        self._subscribers: dict[Call, None] = {}
        self._flush_timer: asyncio.Handle | None = None
        self._last_flush = self._loop.time() - FLUSH_EVERY_S
        self._heartbeat: asyncio.TimerHandle | None = None
        self._check_timer: asyncio.TimerHandle | None = None
        self._peers: dict[InstanceId, _Peer] = {}
        self._delays = [0] * (len(PEER_DELAY_S) + 1)
        self._delay_sum_s = 0.0
        log.on_change = self._changed
        self._unsubscribe = directory.subscribe(lambda _: self._follow())

    # Telling

    def bookings(self, call: Call) -> None:
        """Endpoint `bookings`: BookingsRequest in, BookingChanges out until cancelled."""
        request: BookingsRequest = call.request
        if request.probe:
            call.items([BookingChanges()])
            call.end()
            return
        if len(self._subscribers) >= MAX_SUBSCRIBERS:
            call.end(StatorError(ErrorCode.OVERLOADED, f"{MAX_SUBSCRIBERS} routers follow this one's bookings already"))
            return
        call.on_cancel(lambda: self._left(call))
        if call.cancelled:
            return
        if self._subscribers:
            self._flush()
        else:
            self._log.follow(True)
        call.items(self._log.snapshot(self._now()))
        self._subscribers[call] = None
        self._set_heartbeat()

    def _changed(self) -> None:
        if self._flush_timer is None:
            self._flush_timer = self._loop.call_at(self._last_flush + FLUSH_EVERY_S, self._flush)

    def _flush(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        self._last_flush = self._loop.time()
        changes = self._log.take(self._now())
        for call in list(self._subscribers):
            call.items([changes])
        if self._subscribers:
            self._set_heartbeat()

    def _set_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._heartbeat = self._loop.call_later(HEARTBEAT_MS / 1e3, self._flush)

    def _left(self, call: Call) -> None:
        if self._subscribers.pop(call, self) is self or self._subscribers:
            return
        self._log.follow(False)
        for timer in (self._heartbeat, self._flush_timer):
            if timer is not None:
                timer.cancel()
        self._heartbeat = self._flush_timer = None

    # Following

    def lag_ms(self) -> float:
        """Of the slowest peer's view; 0 without peers."""
        if not self._peers:
            return 0.0
        now = self._now()
        return max(peer.view.lag_ms(now) for peer in self._peers.values())

    def received(self, late_ms: float, changes: BookingChanges) -> None:
        if changes.part:
            return
        if changes.booked or changes.started or changes.failed or changes.ended:
            self._delays[bisect_left(PEER_DELAY_S, late_ms / 1e3)] += 1
            self._delay_sum_s += late_ms / 1e3
        if changes.ended:
            self._on_room()

    def stats(self) -> PeerStats:
        now = self._now()
        lags = [min(peer.view.lag_ms(now), FORGET_MS) for peer in self._peers.values()]
        return PeerStats(
            num_peers=len(self._peers),
            num_bookings=sum(peer.view.num_bookings for peer in self._peers.values()),
            lag_s=max(lags, default=0.0) / 1e3,
            resyncs_total=self.num_resyncs,
            delay_counts=list(self._delays),
            delay_sum_s=self._delay_sum_s,
        )

    def close(self) -> None:
        """Idempotent."""
        self._unsubscribe()
        for timer in (self._flush_timer, self._heartbeat, self._check_timer):
            if timer is not None:
                timer.cancel()
        self._flush_timer = self._heartbeat = self._check_timer = None
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        for call in list(self._subscribers):
            call.end()
        self._subscribers.clear()

    def _now(self) -> float:
        return self._loop.time() * 1e3

    def _follow(self) -> None:
        found = self._directory.instances(ready_only=False)
        live = {i.instance_id: i for i in found if BOOKINGS_ENDPOINT in i.endpoints and i.instance_id != self._own_id}
        for instance_id in [known for known in self._peers if known not in live]:
            self._peers.pop(instance_id).close()
            logger.info("router %s has left; its bookings are forgotten", instance_id)
            self._on_room()
        for instance_id, instance in live.items():
            known = self._peers.get(instance_id)
            if known is None:
                logger.info("exchanging bookings with router %s on %s", instance_id, instance.host)
                self._peers[instance_id] = _Peer(self, instance)
            else:
                known.instance = instance
        if self._peers and self._check_timer is None:
            self._check_timer = self._loop.call_later(CHECK_EVERY_S, self._check)

    def _check(self) -> None:
        self._check_timer = None
        for peer in self._peers.values():
            peer.check()
        if self._peers:
            self._check_timer = self._loop.call_later(CHECK_EVERY_S, self._check)


class _Stream:
    """One attempt's transport sink; forgotten once another is opened."""

    def __init__(self, peer: "_Peer") -> None:
        self._peer: _Peer | None = peer

    def detach(self) -> None:
        self._peer = None

    def items(self, items: Sequence[Any], /) -> None:
        for item in items:
            if self._peer is not None:
                self._peer.receive(item)

    def end(self, error: StatorError | None = None, /) -> None:
        if self._peer is not None:
            self._peer.ended()


class _Probe:
    """Measures the way there and back."""

    def __init__(self, view: PeerView) -> None:
        self._view = view
        self._sent_at = loop_time()

    def items(self, items: Sequence[Any], /) -> None:
        self._view.round_trip((loop_time() - self._sent_at) * 1e3)

    def end(self, error: StatorError | None = None, /) -> None:
        pass


class _Peer:
    """One other router, while its lease lives."""

    def __init__(self, owner: PeerExchange, instance: InstanceInfo) -> None:
        self.instance = instance
        self.view = PeerView(owner.into)
        self._owner = owner
        self._stream: _Stream | None = None
        self._handle: StreamHandle | None = None
        self._probe: StreamHandle | None = None
        self._probe_at = 0.0
        self._retry: asyncio.TimerHandle | None = None
        self._num_failures = 0
        self._proof_at = 0.0
        self._open()

    def receive(self, changes: BookingChanges) -> None:
        now = loop_time()
        late_ms = self.view.receive(changes, now * 1e3)
        if late_ms is None:
            logger.info("the bookings of router %s have a gap; reading them anew", self.instance.instance_id)
            self._reopen()
            return
        self._proof_at = now
        self._num_failures = 0
        if self._probe_at <= now and not changes.part:
            self._probe_at = now + PROBE_EVERY_S
            self._send_probe()
        self._owner.received(late_ms, changes)

    def ended(self) -> None:
        self._reopen()

    def check(self) -> None:
        now = loop_time()
        self.view.tick(now * 1e3)
        if self._stream is not None and (now - self._proof_at) * 1e3 >= 2 * FORGET_MS:
            self._reopen()

    def close(self) -> None:
        self._leave()
        if self._retry is not None:
            self._retry.cancel()
        if self._probe is not None:
            self._probe.cancel()
        self.view.close(loop_time() * 1e3)

    def _open(self) -> None:
        self._retry = None
        self._proof_at = loop_time()
        self._stream = _Stream(self)
        self._handle = self._call(BookingsRequest(), self._stream)

    def _send_probe(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
        self._probe = self._call(BookingsRequest(probe=True), _Probe(self.view))

    def _call(self, request: BookingsRequest, sink: Any) -> StreamHandle:
        target = Target(self.instance.addresses, BOOKINGS_ENDPOINT, self.instance.instance_id)
        context = CallContext(RequestId(f"bookings/{self.instance.instance_id}"))
        return self._owner.client.open(target, request, sink, context=context, item_type=BookingChanges)

    def _reopen(self) -> None:
        self._leave()
        self.view.lost()
        self._owner.num_resyncs += 1
        delay_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2**self._num_failures) * (0.5 + self._owner.rng.random())
        self._num_failures = min(self._num_failures + 1, 16)
        self._retry = asyncio.get_running_loop().call_later(delay_s, self._open)

    def _leave(self) -> None:
        if self._stream is not None:
            self._stream.detach()
            self._stream = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
