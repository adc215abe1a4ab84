"""A router's index over all workers: follows the directory, subscribes to every worker's KV events, answers overlaps.

An answer is a lookup in memory. A view is *trusted* while its stream is whole; when the stream is lost or found wrong
the last whole view serves on, untrusted, until a new snapshot is in or the worker's lease ends.

Bounds. A trusted view is what the worker held at some moment of the last STALE_BOUND_S: a lost item shows at the next
one, a digest comes every DIGEST_INTERVAL_S and tells silent differences, and a stream without a digest or a part of a
snapshot for SILENCE_S is given up. From the end of a fault, whatever it was, the view is trusted and exact again within
RECOVERY_BOUND_S, plus the time it takes to send a snapshot.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from stator.core.kv_stream import KvView, KvViewStats, Received
from stator.core.prefix_index import DEFAULT_MAX_ENTRIES, PrefixIndex
from stator.errors import StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.instances import InstanceInfo
from stator.messages.kv_events import DIGEST_INTERVAL_S, KV_EVENTS_ENDPOINT, KvChanges, KvDigest, KvItem, KvSubscribe
from stator.runtime.context import CallContext, loop_time
from stator.runtime.directory import InstanceDirectory
from stator.transport.base import StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)

SILENCE_S = 2.5 * DIGEST_INTERVAL_S
CHECK_EVERY_S = 0.25
FIRST_RETRY_S = 0.1
MAX_RETRY_S = 1.0
STALE_BOUND_S = SILENCE_S + CHECK_EVERY_S
RECOVERY_BOUND_S = STALE_BOUND_S + 1.5 * MAX_RETRY_S

CLEAN_EVERY_S = 0.01


@dataclass(frozen=True, slots=True)
class KvIndexStats:
    """num_entries: distinct blocks; memory_bytes: estimate. num_dropped: entries given up because the index was full.
    num_events: blocks stored and removed. num_mismatches: digests that differed. num_lost: streams that ended by
    themselves. num_silent: streams given up because no digest came. num_resubscriptions: streams opened after
    the first one of each instance."""

    num_instances: int
    num_trusted: int
    num_entries: int
    memory_bytes: int
    num_dropped: int
    num_events: int
    num_snapshots: int
    num_gaps: int
    num_duplicates: int
    num_mismatches: int
    num_malformed: int
    num_stale: int
    num_lost: int
    num_silent: int
    num_resubscriptions: int


class _Stream:
    """One attempt's transport sink; forgotten by its subscription once another is opened."""

    def __init__(self, subscription: "_Subscription") -> None:
        self._subscription: _Subscription | None = subscription

    def detach(self) -> None:
        self._subscription = None

    def items(self, items: Sequence[Any], /) -> None:
        for item in items:
            if self._subscription is None:
                return
            self._subscription.receive(item)

    def end(self, error: StatorError | None = None, /) -> None:
        if self._subscription is not None:
            self._subscription.ended(error)


class _Subscription:
    """One worker's stream, opened again while its lease lives."""

    def __init__(self, owner: "KvIndex", instance: InstanceInfo, view: KvView[InstanceId]) -> None:
        self.instance = instance
        self.view = view
        self._owner = owner
        self._stream: _Stream | None = None
        self._handle: StreamHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._num_failures = 0
        self._last_proof = loop_time()
        self._open()

    def receive(self, item: KvItem) -> None:
        result = self.view.receive(item)
        if result is Received.PROGRESS:
            self._progress(item)
        elif result is Received.USELESS:
            logger.info("the KV events of %s have a gap or differ; subscribing again", self.instance.instance_id)
            self._reopen()
        self._owner.clean_soon()

    def _progress(self, item: KvItem) -> None:
        # Changes prove only that none is missing; that they were right is known from digests.
        if not isinstance(item, KvChanges):
            self._last_proof = loop_time()
            if isinstance(item, KvDigest):
                self._num_failures = 0

    def ended(self, error: StatorError | None) -> None:
        self._owner.num_lost += 1
        logger.info("the KV events of %s ended (%s)", self.instance.instance_id, error or "the worker closed them")
        self._reopen()

    def check(self, now: float) -> None:
        if self._stream is not None and now - self._last_proof >= SILENCE_S:
            self._owner.num_silent += 1
            logger.info(
                "no digest of the KV events of %s for %.1f s; subscribing again", self.instance.instance_id, SILENCE_S
            )
            self._reopen()

    def close(self) -> None:
        self._leave()
        if self._retry is not None:
            self._retry.cancel()
        self.view.close()

    def _open(self) -> None:
        self._retry = None
        self._last_proof = loop_time()
        self.view.open()
        self._stream = _Stream(self)
        target = Target(self.instance.addresses, KV_EVENTS_ENDPOINT, self.instance.instance_id)
        context = CallContext(RequestId(f"kv-events/{self.instance.instance_id}"))
        request = KvSubscribe(self._owner.stride)
        self._handle = self._owner.client.open(target, request, self._stream, context=context, item_type=KvItem)

    def _reopen(self) -> None:
        self._leave()
        self.view.lose()
        # Spread, so that the routers of a worker that comes back do not all ask for its snapshot at once.
        delay_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2**self._num_failures) * (0.5 + self._owner.rng.random())
        self._num_failures = min(self._num_failures + 1, 16)
        self._owner.num_resubscriptions += 1
        self._retry = asyncio.get_running_loop().call_later(delay_s, self._open)

    def _leave(self) -> None:
        if self._stream is not None:
            self._stream.detach()
            self._stream = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class KvIndex:
    """What every instance of a role holds, from construction to `close`. All methods are for the event loop.

    stride: only every stride-th block is indexed, and overlaps are rounded down to it: less memory, less to send.
    max_entries: distinct blocks; see core.prefix_index for what happens beyond.
    """

    def __init__(
        self,
        *,
        client: TransportClient,
        directory: InstanceDirectory,
        rng: Random,
        role: str = "decode",
        stride: int = 1,
        max_entries: int = DEFAULT_MAX_ENTRIES,
    ) -> None:
        self.client = client
        self.rng = rng
        self.stride = stride
        self.num_lost = 0
        self.num_silent = 0
        self.num_resubscriptions = 0
        self._directory = directory
        self._role = role
        self._index: PrefixIndex[InstanceId] = PrefixIndex(stride=stride, max_entries=max_entries)
        self._view_stats = KvViewStats()
        self._subscriptions: dict[InstanceId, _Subscription] = {}
        self._clean_timer: asyncio.TimerHandle | None = None
        self._check_timer = asyncio.get_running_loop().call_later(CHECK_EVERY_S, self._check)
        self._unsubscribe: Callable[[], None] = directory.subscribe(lambda _: self._follow())

    def overlaps(self, block_hashes: Sequence[int]) -> dict[InstanceId, int]:
        """Leading blocks of a prompt that each instance holds; only instances with at least one.

        block_hashes: chained hashes of the prompt's full blocks, first block first. An absent instance holds none if it
        is `settled`; otherwise nothing is known of it.
        """
        return self._index.overlaps(block_hashes)

    def trusted(self, instance_id: InstanceId) -> bool:
        """What `overlaps` says of it is at most STALE_BOUND_S old, as far as is known."""
        subscription = self._subscriptions.get(instance_id)
        return subscription is not None and subscription.view.trusted

    def settled(self, instance_id: InstanceId) -> bool:
        """A whole snapshot of it was had, now or earlier in its life."""
        subscription = self._subscriptions.get(instance_id)
        return subscription is not None and subscription.view.settled

    def stats(self) -> KvIndexStats:
        views, index = self._view_stats, self._index
        return KvIndexStats(
            num_instances=len(self._subscriptions),
            num_trusted=sum(s.view.trusted for s in self._subscriptions.values()),
            num_entries=index.num_entries,
            memory_bytes=index.memory_bytes,
            num_dropped=index.num_dropped,
            num_events=views.num_events,
            num_snapshots=views.num_snapshots,
            num_gaps=views.num_gaps,
            num_duplicates=views.num_duplicates,
            num_mismatches=views.num_mismatches,
            num_malformed=views.num_malformed,
            num_stale=views.num_stale,
            num_lost=self.num_lost,
            num_silent=self.num_silent,
            num_resubscriptions=self.num_resubscriptions,
        )

    def close(self) -> None:
        """Ends every subscription. Idempotent."""
        self._unsubscribe()
        self._check_timer.cancel()
        if self._clean_timer is not None:
            self._clean_timer.cancel()
            self._clean_timer = None
        for subscription in self._subscriptions.values():
            subscription.close()
        self._subscriptions.clear()

    def clean_soon(self) -> None:
        """Have the bits of dead holders cleared, a little at a time."""
        if self._clean_timer is None and self._index.needs_cleaning:
            self._clean_timer = asyncio.get_running_loop().call_later(CLEAN_EVERY_S, self._clean)

    def _clean(self) -> None:
        self._clean_timer = None
        self._index.clean()
        self.clean_soon()

    def _check(self) -> None:
        now = loop_time()
        for subscription in self._subscriptions.values():
            subscription.check(now)
        self._check_timer = asyncio.get_running_loop().call_later(CHECK_EVERY_S, self._check)

    def _follow(self) -> None:
        instances = self._directory.instances(role=self._role, ready_only=False)
        live = {i.instance_id: i for i in instances if KV_EVENTS_ENDPOINT in i.endpoints}
        for instance_id in [i for i in self._subscriptions if i not in live]:
            self._subscriptions.pop(instance_id).close()
        for instance_id, instance in live.items():
            known = self._subscriptions.get(instance_id)
            if known is None:
                view = KvView(self._index, instance_id, self._view_stats)
                self._subscriptions[instance_id] = _Subscription(self, instance, view)
            else:
                known.instance = instance
        self.clean_soon()
