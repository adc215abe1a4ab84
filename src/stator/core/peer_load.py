"""Other routers' bookings among own ones: in the workers' loads, and in the blocks that they will hold. Pure."""

from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from stator.core.booked_blocks import BookedBlocks
from stator.core.routing_memory import Sessions
from stator.core.worker_load import WorkerLoad
from stator.ids import InstanceId
from stator.messages.routing import PeerBooking

NEWS_MS = 1000.0
"""A booking that was made longer ago says nothing of where its session is now, if that is known here."""


class _OfPeer(NamedTuple):
    instance_id: InstanceId
    block_hashes: Sequence[int]


class PeersLoad:
    """Implements `core.peer_bookings.OthersBookings` over the state of one `RoutingCore`.

    blocks: None in modes that do not go by them; set anew when the mode changes. Numbers given out are negative: those
    of own bookings are positive.
    """

    def __init__(
        self, loads: MutableMapping[InstanceId, WorkerLoad], blocks: BookedBlocks | None, sessions: Sessions
    ) -> None:
        self._loads = loads
        self.blocks = blocks
        self._sessions = sessions
        self._open: dict[int, _OfPeer] = {}
        self._num_booked = 0
        # Perhaps of workers that we shall never see, or that are gone: such a load goes with its last booking.
        self._unseen: set[InstanceId] = set()

    @property
    def num_bookings(self) -> int:
        return len(self._open)

    def seen(self, instance_id: InstanceId) -> None:
        """This router knows of the worker itself, or no more."""
        if self._unseen:
            self._unseen.discard(instance_id)

    def book_of_peer(self, booking: PeerBooking, at: float, now: float) -> int:
        """at: when it was made. Returns a number for it, for the methods below; call `release_of_peer` exactly once."""
        instance_id, hashes = booking.instance_id, booking.block_hashes
        self._num_booked += 1
        number = -self._num_booked
        load = self._loads.get(instance_id)
        if load is None:
            load = self._loads[instance_id] = WorkerLoad()
            self._unseen.add(instance_id)
        load.book(
            number,
            now,
            prefill_ms=booking.prefill_ms,
            work_ms=booking.work_ms,
            kv_tokens=booking.kv_tokens,
            prompt_tokens=booking.prompt_tokens,
            at=at,
        )
        if booking.started:
            load.first_token(number, now)
        elif self.blocks is not None and hashes and at + booking.expected_ms > now:
            self.blocks.add(instance_id, hashes, at + booking.expected_ms)
        session = booking.session_id
        if session is not None and (now - at < NEWS_MS or self._sessions.get(session) is None):
            self._sessions.put(session, instance_id)
        self._open[number] = _OfPeer(instance_id, hashes)
        return number

    def first_token_of_peer(self, number: int, now: float) -> None:
        if (known := self._open.get(number)) is not None and (load := self._loads.get(known.instance_id)) is not None:
            load.first_token(number, now)

    def failed_of_peer(self, number: int) -> None:
        if self.blocks is not None and (known := self._open.get(number)) is not None:
            self.blocks.revoke(known.instance_id, known.block_hashes)

    def release_of_peer(self, number: int, now: float) -> None:
        known = self._open.pop(number, None)
        if known is None or (load := self._loads.get(known.instance_id)) is None:
            return
        load.release(number, now)
        if known.instance_id in self._unseen and not load.num_streams:
            self._unseen.discard(known.instance_id)
            del self._loads[known.instance_id]
