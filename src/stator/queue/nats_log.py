"""The log of one queue in JetStream: written by its members, followed by each, shortened by snapshots.

Three streams, named after the namespace, the queue and the version of its rules: LOG has the events in order, BODY the
payloads until they are freed (or a day old), SNAP the latest snapshot. A follower is given every event once and in
order; what it missed (a restart of the server, events deleted behind it, a connection that was lost) it reads again, or
begins anew from the snapshot. It tells a log that is another (wiped, or shorter than it was) by the stream's time of
creation and by the time stamp of the last event that it knows.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
from collections.abc import Callable
from typing import Any

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from stator.core.job_queue_events import QueueLimits
from stator.core.replicated_queue import (
    Applied,
    Body,
    Entry,
    LoggedPut,
    LoggedTick,
    Misplaced,
    Place,
    ReplicatedQueue,
    entry_of,
    log_version,
    place_of,
)
from stator.errors import DECODE_ERRORS, ErrorCode, StatorError
from stator.hub.client import Backoff
from stator.queue.nats_connection import JetStreamError, NatsConnection, NoResponders
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
SILENCE_S = 3 * HEARTBEAT_S + 1.0
SNAPSHOT_EVERY = 1_000
"""Events. The log keeps as many before a snapshot as well, for members that are a little behind."""
BODY_MAX_AGE_S = 86_400.0
LOAD_TRIES = 5
TRY_S = 2.0
_PART_ROOM = 8 * 1024
_NS = 1_000_000_000

_PLACES = {place.value: place for place in Place}

_NOT_FOUND, _NO_MESSAGE, _EXISTS = 10059, 10037, 10058
_FULL = {10047, 10077, 10122, 10023}


class _State(msgspec.Struct, frozen=True):
    first_seq: int = 0
    last_seq: int = 0
    messages: int = 0


class _StreamInfo(msgspec.Struct, frozen=True):
    created: str = ""
    state: _State = _State()


class _Anything(msgspec.Struct, frozen=True):
    pass


class _StoredMessage(msgspec.Struct, frozen=True):
    data: bytes = b""


class _Stored(msgspec.Struct, frozen=True):
    message: _StoredMessage


class _Head(msgspec.Struct, frozen=True):
    """Of the snapshot: of which log, after which of its events, in how many parts."""

    created: str
    sequence: int
    num_parts: int


class LogNames:
    """Of the streams and subjects of one queue. Anything may be in the names of namespaces and queues."""

    def __init__(self, namespace: str, queue: str, limits: QueueLimits) -> None:
        digest = hashlib.sha256(f"{namespace}\0{queue}".encode()).hexdigest()[:8]
        plain = [re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64] for name in (namespace, queue)]
        whole = f"{plain[1]}-{digest}-{log_version(limits)}"
        self.log, self.body, self.snap = (f"STATOR-{plain[0]}-{whole}-{kind}" for kind in ("LOG", "BODY", "SNAP"))
        self.subject = f"stator.{plain[0]}.{whole}"

    def event(self, entry: Entry) -> str:
        """One subject for the shared line of jobs, one for each instance's, one for ticks, and one for all else: a
        server's permissions go by them (deploy/secure/nats.conf)."""
        place = place_of(entry.event)
        if not isinstance(entry.event, LoggedPut):
            return f"{self.subject}.log.{place}"
        preferred = entry.event.preferred
        return f"{self.subject}.log.{place}." + ("shared" if preferred is None else f"instance.{_token(preferred)}")

    def place(self, subject: str) -> Place | None:
        """Of what was found there; None for a subject that no event has."""
        name, _, rest = subject.removeprefix(f"{self.subject}.log.").partition(".")
        place = _PLACES.get(name)
        return place if bool(rest) == (place is Place.PUT) else None


class QueueLog:
    """Follows from `start` to `close`.

    on_event: given each event after it was applied to the copy, with what it did. on_copy: given the copy that it
    follows from now on, which is not the one of before, and whether the events of before are gone from the log.
    on_synced: called whenever everything that was in the log when it was last asked has been applied.
    """

    def __init__(
        self,
        connection: NatsConnection,
        names: LogNames,
        limits: QueueLimits,
        replicas: int,
        *,
        on_event: Callable[[Entry, Applied], None],
        on_copy: Callable[[ReplicatedQueue, bool], None],
        on_synced: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._names = names
        self._limits = limits
        self._replicas = replicas
        self._on_event = on_event
        self._on_copy = on_copy
        self._on_synced = on_synced
        self._tasks = TaskOwner(f"queue log {names.log}")
        self._copy: ReplicatedQueue | None = None
        self._created = ""
        self._distrusted: int | None = None
        self._gap_after: int | None = None
        self._target = 0
        self._broken = asyncio.Event()
        self._took = asyncio.Event()
        self._closing = False
        self._heard_at = 0.0
        self._subscription: Subscription | None = None
        self._subscribed = 0
        self._unsubscribe = connection.on_change(self._connection_changed)

    def start(self) -> None:
        self._tasks.spawn(self._follow(), "follow")

    async def close(self) -> None:
        self._unsubscribe()
        # Cancelling alone may be lost: wait_for, which nats-py uses, swallows it on CPython 3.11 if it ends just then.
        self._closing = True
        self._broken.set()
        self._took.set()
        await self._tasks.close()
        await self._stop_following()

    # Writing.

    async def write(self, entry: Entry, deadline: float) -> None:
        """Returns when the log has it, once, however often it was tried. Raises StatorError."""
        headers = {"Nats-Msg-Id": f"{entry.writer}.{entry.number}"}
        await self._publish(self._names.event(entry), msgspec.msgpack.encode(entry), deadline, headers)
        self._took.set()

    async def write_body(self, name: str, payload: bytes, deadline: float) -> Body:
        size = self._connection.max_payload_bytes - _PART_ROOM
        parts = [payload[start : start + size] for start in range(0, len(payload), size)] or [b""]
        for number, part in enumerate(parts):
            subject = f"{self._names.subject}.body.{name}.{number}"
            await self._publish(subject, part, deadline, {"Nats-Msg-Id": f"{name}.{number}"})
        return Body(name, len(parts))

    async def read_body(self, body: Body) -> bytes | None:
        """None: it is gone."""
        parts: list[bytes] = []
        for number in range(body.num_parts):
            part = await self._last(self._names.body, f"{self._names.subject}.body.{body.name}.{number}")
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts)

    async def free(self, body: Body) -> None:
        await self._purge(self._names.body, {"filter": f"{self._names.subject}.body.{body.name}.*"})

    async def write_snapshot(self, data: bytes, sequence: int) -> None:
        """Afterwards new members begin there. Old snapshots are deleted."""
        names, deadline = self._names, loop_time() + self._connection.timeout_s
        before = await self._head()
        size = self._connection.max_payload_bytes - _PART_ROOM
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        for number, part in enumerate(parts):
            await self._publish(f"{names.subject}.snap.part.{sequence}.{number}", part, deadline, {})
        head = _Head(self._created, sequence, len(parts))
        await self._publish(f"{names.subject}.snap.head", msgspec.json.encode(head), deadline, {})
        if before is not None and before.sequence != sequence:
            await self._purge(names.snap, {"filter": f"{names.subject}.snap.part.{before.sequence}.*"})

    async def shorten(self, sequence: int) -> None:
        """Delete the events before that one, which is not the first: the server would take that for all."""
        assert sequence > 1
        await self._purge(self._names.log, {"seq": sequence})

    async def _publish(self, subject: str, payload: bytes, deadline: float, headers: dict[str, str]) -> None:
        backoff = Backoff(self._connection.random_source)
        while True:
            left_s = deadline - loop_time()
            try:
                answer = await self._connection.request(
                    subject, payload, timeout_s=max(0.01, min(left_s, TRY_S)), headers=headers or None
                )
            except NoResponders:
                # The stream is gone. Whoever follows makes it again.
                self._broken.set()
                if deadline - loop_time() <= 0.05:
                    raise self._connection.lost("has lost the queue's streams") from None
            except StatorError as error:
                if (
                    error.code is not ErrorCode.INSTANCE_LOST
                    or deadline - loop_time() <= 0.05
                    or self._connection.closed
                ):
                    raise
            else:
                self._check_stored(answer.data)
                return
            await self._connection.pause(min(backoff.next_s(), max(0.0, deadline - loop_time())))

    def _check_stored(self, data: bytes) -> None:
        try:
            error = msgspec.json.decode(data, type=_PubAck).error
        except DECODE_ERRORS:
            raise StatorError(
                ErrorCode.PROTOCOL, f"{self._connection.name}: an answer that is not JetStream's"
            ) from None
        if error is not None:
            code = ErrorCode.OVERLOADED if error.err_code in _FULL else ErrorCode.INTERNAL
            raise StatorError(code, f"{self._connection.name} did not take it: {error.description}")

    # Streams.

    async def _streams(self) -> _StreamInfo:
        """Makes those that are missing. Returns the log's."""
        names = self._names
        infos: list[_StreamInfo] = []
        for name, kind in ((names.body, "body"), (names.snap, "snap"), (names.log, "log")):
            config: dict[str, Any] = {
                "name": name,
                "subjects": [f"{names.subject}.{kind}.>"],
                "retention": "limits",
                "storage": "file",
                "num_replicas": self._replicas,
                "allow_direct": kind != "log",
                "duplicate_window": 120 * _NS,
            }
            if kind != "log":
                config["max_msgs_per_subject"] = 1
            if kind == "body":
                config |= {"max_bytes": self._limits.max_bytes, "discard": "new", "max_age": int(BODY_MAX_AGE_S * _NS)}
            infos.append(await self._stream(name, config))
        return infos[-1]

    async def _stream(self, name: str, config: dict[str, Any]) -> _StreamInfo:
        for _ in range(2):
            try:
                return await self._api(f"STREAM.INFO.{name}", None, _StreamInfo)
            except JetStreamError as error:
                if error.error.err_code != _NOT_FOUND:
                    raise self._refused(error) from None
            try:
                return await self._api(f"STREAM.CREATE.{name}", config, _StreamInfo)
            except JetStreamError as error:
                # Another member was first.
                if error.error.err_code != _EXISTS:
                    raise self._refused(error) from None
        raise self._connection.lost("makes and forgets the queue's streams")

    async def _api(self, call: str, body: Any, kind: type[Any]) -> Any:
        # A cluster without a leader does not answer at all, and does not come back to it.
        return await self._connection.api(call, body, kind, timeout_s=min(TRY_S, self._connection.timeout_s))

    def _refused(self, error: JetStreamError) -> StatorError:
        return StatorError(ErrorCode.INSTANCE_LOST, f"{self._connection.name}: JetStream refused: {error}")

    async def _last(self, stream: str, subject: str) -> bytes | None:
        try:
            found: _Stored = await self._api(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}, _Stored)
        except JetStreamError as error:
            if error.error.err_code in (_NO_MESSAGE, _NOT_FOUND):
                return None
            raise self._refused(error) from None
        return found.message.data

    async def _purge(self, stream: str, what: dict[str, Any]) -> None:
        try:
            await self._api(f"STREAM.PURGE.{stream}", what, _Anything)
        except JetStreamError as error:
            raise self._refused(error) from None

    async def _head(self) -> _Head | None:
        data = await self._last(self._names.snap, f"{self._names.subject}.snap.head")
        try:
            return None if data is None else msgspec.json.decode(data, type=_Head)
        except DECODE_ERRORS as error:
            logger.error("what says where the snapshot of %s is cannot be read: %s", self._names.log, error)
            return None

    # Following.

    async def _follow(self) -> None:
        backoff = Backoff(self._connection.random_source)
        told = False
        while not self._connection.closed and not self._closing:
            await self._connection.wait_up()
            if self._closing:
                return
            self._broken.clear()
            self._took.clear()
            try:
                await self._begin()
                backoff.reset()
                told = False
                await self._until_broken()
            except StatorError as error:
                if not told and not self._connection.closed:
                    told = True
                    logger.warning("cannot follow the queue %s, trying again: %s", self._names.log, error.message)
            await self._stop_following()
            if not self._broken.is_set() or told:
                # Unless the log took something meanwhile: then it is there, and somebody waits to hear of it.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff.next_s()):
                        await self._took.wait()

    async def _begin(self) -> None:
        info = await self._streams()
        copy, state = self._copy, info.state
        same = copy is not None and info.created == self._created and state.last_seq >= copy.sequence
        if copy is None or not same or state.first_seq > copy.sequence + 1:
            first = self._copy is None
            copy, info = await self._load()
            self._copy, self._created = copy, info.created
            self._on_copy(copy, not first and not same)
        self._target = info.state.last_seq
        await self._subscribe(copy)
        if copy.sequence >= self._target:
            self._on_synced()

    async def _load(self) -> tuple[ReplicatedQueue, _StreamInfo]:
        """A copy to begin with, and the log that it is of: of the snapshot, or empty at the beginning of the log."""
        heads: list[_Head | None] = []
        for _ in range(LOAD_TRIES):
            head = await self._head()
            heads.append(head)
            # After the snapshot, which may be of a later event than the log had when it was asked last.
            info = await self._streams()
            copy = await self._restore(head, info) if head is not None else None
            if copy is not None and info.state.first_seq > copy.sequence + 1:
                continue  # Meanwhile there is a newer one.
            if copy is None and head is not None and head != await self._head():
                continue
            return copy or ReplicatedQueue(self._limits, max(0, info.state.first_seq - 1)), info
        if any(head != heads[0] for head in heads):
            raise self._connection.lost("writes snapshots of the queue faster than they can be read")
        logger.error("%s was deleted beyond its snapshot; beginning with what is left of it", self._names.log)
        info = await self._streams()
        return ReplicatedQueue(self._limits, max(0, info.state.first_seq - 1)), info

    async def _restore(self, head: _Head, info: _StreamInfo) -> ReplicatedQueue | None:
        """None for a snapshot that is not of this log, or not whole."""
        if head.created != info.created or head.sequence > info.state.last_seq or head.sequence == self._distrusted:
            return None
        parts = [
            await self._last(self._names.snap, f"{self._names.subject}.snap.part.{head.sequence}.{number}")
            for number in range(head.num_parts)
        ]
        whole = [part for part in parts if part is not None]
        if len(whole) < head.num_parts:
            return None
        try:
            return ReplicatedQueue.restore(b"".join(whole), self._limits)
        except DECODE_ERRORS as error:
            logger.error("the snapshot of %s cannot be read: %s", self._names.log, error)
            return None

    async def _subscribe(self, copy: ReplicatedQueue) -> None:
        inbox = self._connection.new_inbox()
        self._subscribed += 1
        number = self._subscribed

        async def receive(message: Msg) -> None:
            if number == self._subscribed and not self._broken.is_set():
                self._receive(copy, message)

        self._heard_at = loop_time()
        self._subscription = await self._connection.subscribe(inbox, receive)
        config = {
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            # The last that is known comes once more, to see that it is the same.
            "opt_start_seq": max(1, copy.sequence),
            "ack_policy": "none",
            "replay_policy": "instant",
            "idle_heartbeat": int(HEARTBEAT_S * _NS),
            "mem_storage": True,
            "num_replicas": 1,
        }
        try:
            body = {"stream_name": self._names.log, "config": config}
            await self._api(f"CONSUMER.CREATE.{self._names.log}", body, _Anything)
        except JetStreamError as error:
            raise self._refused(error) from None

    async def _stop_following(self) -> None:
        self._subscribed += 1
        subscription, self._subscription = self._subscription, None
        if subscription is not None and self._connection.is_up:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()

    async def _until_broken(self) -> None:
        while not self._broken.is_set():
            left_s = self._heard_at + SILENCE_S - loop_time()
            if left_s <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._broken.wait()

    def _connection_changed(self, up: bool) -> None:
        if not up:
            self._broken.set()

    def _receive(self, copy: ReplicatedQueue, message: Msg) -> None:
        self._heard_at = loop_time()
        if message.headers and "Status" in message.headers:
            last = int(message.headers.get("Nats-Last-Stream") or 0)
            if last > copy.sequence:
                self._broken.set()
            return
        metadata = message.metadata
        sequence, stamp_s = metadata.sequence.stream, metadata.timestamp.timestamp()
        if sequence <= copy.sequence:
            if sequence == copy.sequence and copy.stamp_s not in (None, stamp_s):
                # The end of the log that we know was lost (it was not on disk yet), and others have written since.
                logger.warning("%s is not the log of before; beginning anew", self._names.log)
                self._created, self._distrusted = "", sequence
                self._broken.set()
            return
        if sequence > copy.sequence + 1:
            if self._gap_after != copy.sequence:
                # Deleted behind a snapshot, most likely: look again.
                self._gap_after = copy.sequence
                self._broken.set()
                return
            logger.error("%s has no events %d to %d any more", self._names.log, copy.sequence + 1, sequence - 1)
            copy.skip(sequence - 1)
        try:
            entry = entry_of(message.data, self._names.place(message.subject))
        except Misplaced as error:
            logger.warning(
                "%s: entry %d on %s counts for nothing: %s", self._names.log, sequence, message.subject, error
            )
            entry = Entry("", 0, LoggedTick())
        self._on_event(entry, copy.apply(sequence, stamp_s, entry.event))
        if sequence == self._target:
            self._on_synced()


class _PubAck(msgspec.Struct, frozen=True):
    error: "_PubError | None" = None


class _PubError(msgspec.Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


def _token(name: str) -> str:
    """A subject's token for any name."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:64]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
