"""From vLLM's KV event publishers, one per data-parallel rank, to the one event stream of `engines.base.Engine`.

For each rank a follower reads what is published and applies it in order (core.engine_sequence, core.engine_blocks).
What was missed it has replayed. Where a replay cannot help, the rank is *rebuilt*: its state is made anew from all that
the publisher still keeps, beside the old one, and swapped in whole, so that listeners see one BlocksCleared and what
is held. Nothing is then claimed that the engine may have dropped; blocks stored before the publisher's memory begins
are not known until they are stored again.

Published messages can be lost without a later one that would show it, at start and when a reader is slow. So while
nothing is heard, every PROBE_S a replay is asked for, which is empty then and takes the publisher some microseconds.
"""

import asyncio
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stator.core.engine_blocks import EngineBlocks, UnionOfRanks
from stator.core.engine_sequence import BatchSequence, Step
from stator.engines.base import KvListener
from stator.engines.vllm.kv_sockets import FrameSocket, KvSockets, ZmqSockets
from stator.engines.vllm.kv_wire import KvBatchDecoder, KvWireError, read_published, read_replayed, replay_request
from stator.errors import ConfigError
from stator.messages.engine import KvEvent
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

PROBE_S = 5.0
ANSWER_S = 5.0
"""Of silence, after which a replay counts as unanswered. vLLM's publisher looks for requests every 0.1 s."""

REST_S = 1.0
"""Of silence within an answer, after which its rest counts as dropped."""

REPLAYED_BATCHES = 10_000
"""Batches that vLLM keeps (`buffer_steps`)."""

MAX_ROUNDS = 20
"""Requests for one replay. Of a long answer vLLM drops what exceeds a queue of 1000, and it is asked for again."""

MAX_SYNC_ROUNDS = 10

_MAX_IPC_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class KvEndpoint:
    """Where one data-parallel rank publishes and where it answers replays: `ipc://` and an absolute path."""

    rank: int
    publish: str
    replay: str


def kv_events_settings(directory: str | os.PathLike[str], dp_ranks: int) -> tuple[dict[str, Any], list[KvEndpoint]]:
    """(`kv_events_config` for vLLM, where ranks 0 .. dp_ranks - 1 will then publish).

    directory: made with mode 0700 if it is not there, else it must be ours and closed to others. Raises ConfigError,
    also if the paths in it would be too long for Unix sockets (107 bytes).
    """
    path = Path(directory).absolute()
    # vLLM 0.32 makes the addresses of ranks above 0 by adding to a port (tcp) or a suffix (inproc), and refuses all
    # others. It goes by the address containing these words: with `inproc` in the file's name ipc gets a suffix too.
    publish, replay = f"ipc://{path}/inproc-kv", f"ipc://{path}/inproc-kv-replay"
    suffixes = ["" if rank == 0 else f"_dp{rank}" for rank in range(dp_ranks)]
    endpoints = [KvEndpoint(rank, publish + suffix, replay + suffix) for rank, suffix in enumerate(suffixes)]
    for endpoint in endpoints:
        _check_address(endpoint.publish)
        _check_address(endpoint.replay)
    _make_private(path)
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": publish,
        "replay_endpoint": replay,
        "buffer_steps": REPLAYED_BATCHES,
        "topic": "",
    }
    return config, endpoints


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"the directory {path} for vLLM's KV event sockets cannot be made: {error}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"the directory {path} for vLLM's KV event sockets must be a directory of this user with mode 0700 "
            f"(found uid {found.st_uid}, mode {stat.filemode(found.st_mode)}); use another one"
        )


def _check_address(address: str) -> None:
    path = address.removeprefix("ipc://")
    if path == address or not path.startswith("/"):
        raise ConfigError(
            f"KV event address {address!r} is not `ipc://` and an absolute path; vLLM's KV events carry prompts and "
            "have no authentication, so only Unix sockets in a private directory are taken"
        )
    if len(os.fsencode(path)) > _MAX_IPC_PATH_BYTES:
        raise ConfigError(
            f"KV event socket path {path} has {len(os.fsencode(path))} bytes, a Unix socket's has at most "
            f"{_MAX_IPC_PATH_BYTES}; use a shorter directory"
        )


def _unlink(address: str) -> None:
    # An engine that was killed left it; one that ended has unlinked it itself.
    Path(address.removeprefix("ipc://")).unlink(missing_ok=True)


class KvEventFeed:
    """The prefix cache of one engine with all its ranks, as its KV events tell. On one event loop."""

    def __init__(
        self,
        model: str,
        block_size: int,
        endpoints: Sequence[KvEndpoint],
        *,
        make_sockets: Callable[[], KvSockets] = ZmqSockets,
    ) -> None:
        """model: the served name that our hashes are made with. block_size: tokens. Raises ConfigError for an address
        that is not ipc."""
        if not endpoints:
            raise ValueError("a KV event feed needs an endpoint for each data-parallel rank, got none")
        for endpoint in endpoints:
            _check_address(endpoint.publish)
            _check_address(endpoint.replay)
        self._endpoints = list(endpoints)
        self._make_blocks = lambda: EngineBlocks(model, block_size)
        self._make_sockets = make_sockets
        self._union = UnionOfRanks([self._make_blocks() for _ in endpoints])
        self._listeners: dict[int, KvListener] = {}
        self._num_listeners = 0
        self._tasks = TaskOwner("vLLM KV events")
        self._sockets: KvSockets | None = None
        self._followers: list[_Follower] = []

    @property
    def num_blocks(self) -> int:
        """Blocks that any rank holds."""
        return self._union.num_blocks

    async def start(self) -> None:
        """To be called once, when the engine is up: then everything published so far is applied on return. Before
        that it waits for ANSWER_S, and catches up within PROBE_S of the engine's coming. Raises ConfigError without
        pyzmq."""
        self._sockets = sockets = self._make_sockets()
        self._followers = [
            _Follower(index, endpoint, sockets, self._union, self._make_blocks, self._deliver)
            for index, endpoint in enumerate(self._endpoints)
        ]
        await asyncio.gather(*(follower.begin() for follower in self._followers))
        for follower in self._followers:
            self._tasks.spawn(follower.follow(), f"follow rank {follower.rank}")
            self._tasks.spawn(follower.probe(), f"probe rank {follower.rank}")

    def watch(self, listener: KvListener) -> Callable[[], None]:
        """As engines.base.Engine.watch_kv."""
        listener(self._union.snapshot())
        self._num_listeners += 1
        key = self._num_listeners
        self._listeners[key] = listener

        def unwatch() -> None:
            self._listeners.pop(key, None)

        return unwatch

    def longest_prefix(self, chain: Sequence[int]) -> tuple[int, int]:
        """(leading blocks of `chain` in the rank that holds most of them, that rank); the first rank if all are equal.
        chain: our block hashes of a prompt."""
        num_blocks, index = self._union.longest_prefix(chain)
        return num_blocks, self._endpoints[index].rank

    async def sync(self) -> None:
        """Apply what was published until now, as far as the publishers answer; up to 0.1 s each if they are idle."""
        await asyncio.gather(*(follower.sync() for follower in self._followers))

    def clear_mark(self) -> tuple[int, ...]:
        """For `clear`: to be taken before the engine is asked to reset its prefix cache."""
        return self._union.num_clears

    def clear(self, since: tuple[int, ...] | None = None) -> None:
        """The engine has reset its prefix cache. It says so itself, but only with its next step.

        since: with the mark from before the reset, ranks that have said so (or were rebuilt) meanwhile keep what they
        stored after it, and what others published before it and comes late is ignored. Without, such latecomers are
        claimed until the next step.
        """
        for index, follower in enumerate(self._followers):
            if since is None or self._union.num_clears[index] == since[index]:
                follower.clear(void=since is not None)

    async def close(self) -> None:
        """To be called after the engine has ended. No task, socket or socket file is left. Idempotent."""
        await self._tasks.close()
        self._listeners.clear()
        if self._sockets is not None:
            self._sockets.close()
        for endpoint in self._endpoints:
            _unlink(endpoint.publish)
            _unlink(endpoint.replay)

    def _deliver(self, events: Sequence[KvEvent]) -> None:
        for listener in list(self._listeners.values()) if events else []:
            listener(events)


class _Follower:
    """One rank. What changes its state in several steps holds `_lock`; `clear` does not and may come in between."""

    def __init__(
        self,
        index: int,
        endpoint: KvEndpoint,
        sockets: KvSockets,
        union: UnionOfRanks,
        make_blocks: Callable[[], EngineBlocks],
        deliver: Callable[[Sequence[KvEvent]], None],
    ) -> None:
        self.rank = endpoint.rank
        self._index = index
        self._endpoint = endpoint
        self._sockets = sockets
        self._union = union
        self._make_blocks = make_blocks
        self._deliver = deliver
        self._decoder = KvBatchDecoder()
        self._sequence = BatchSequence()
        self._lock = asyncio.Lock()
        self._published: FrameSocket = sockets.subscribe(endpoint.publish)
        self._heard = False
        self._incomplete = False
        self._batches_to_next_rebuild = 0
        self._cleared = False

    async def begin(self) -> None:
        async with self._lock:
            await self._rebuild()

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            frames = await self._published.recv()
            self._heard = True
            async with self._lock:
                await self._receive(frames)
                await self._complete()
            # A receive that finds something does not wait; a backlog must not hold the loop.
            await asyncio.sleep(0)

    async def probe(self) -> None:
        """Until cancelled."""
        while True:
            self._heard = False
            await asyncio.sleep(PROBE_S)
            if not self._heard:
                async with self._lock:
                    await self._catch_up()
                    await self._complete()

    async def sync(self) -> None:
        # What was published may still wait for the publisher's thread while that answers.
        for _ in range(MAX_SYNC_ROUNDS):
            async with self._lock:
                before = self._sequence.last
                await self._catch_up()
                await self._complete()
                if self._sequence.last == before:
                    return

    def clear(self, *, void: bool) -> None:
        self._cleared = True
        self._batches_to_next_rebuild = 0
        self._deliver(self._union.clear(self._index, void=void))

    async def _receive(self, frames: Sequence[bytes]) -> None:
        try:
            message = read_published(frames)
        except KvWireError as error:
            logger.error("vLLM's KV events of rank %d: %s; ignored", self.rank, error)
            return
        number, payload = message.number, message.payload
        assert number is not None, "only a replay has an end"
        step = self._sequence.published(number, payload)
        if step is Step.APPLY:
            self._apply(payload)
        elif step is Step.GAP:
            logger.info("vLLM's KV events of rank %d: %s to %d missed", self.rank, self._sequence.last, number)
            await self._catch_up()
        elif step is Step.LOST:
            logger.info("vLLM's KV events of rank %d begin again (number %d)", self.rank, number)
            await self._rebuild()
        if self._sequence.last is None or self._sequence.last < number:
            logger.warning(
                "vLLM's KV events of rank %d before number %d are lost and cannot be replayed; what this rank holds is "
                "known from here on only",
                self.rank,
                number,
            )
            self._deliver(self._union.replace(self._index, self._make_blocks()))
            self._sequence.accept(number, payload)
            self._apply(payload)

    async def _catch_up(self) -> None:
        """Apply what follows the batch applied last. Nothing changes if the publisher does not answer."""
        for _ in range(MAX_ROUNDS):
            before = self._sequence.last
            step = await self._replay(self._sequence, self._apply)
            if step is None or step is Step.SKIP:
                return
            if step is Step.LOST or self._sequence.last == before:
                break
        await self._rebuild()

    async def _rebuild(self) -> None:
        """Make the state anew from all that the publisher still has; empty if that cannot be had whole."""
        blocks, sequence = self._make_blocks(), BatchSequence()
        step = None
        self._cleared = False
        for _ in range(MAX_ROUNDS):
            before = sequence.last
            step = await self._replay(sequence, lambda payload, into=blocks: self._apply_to(into, payload))
            if step is None or step is Step.SKIP:
                break
            if step is Step.LOST or sequence.last == before:
                blocks, sequence = self._make_blocks(), BatchSequence()
        if step is not Step.SKIP:
            blocks, sequence = self._make_blocks(), BatchSequence()
        elif self._cleared:
            # What came may be from before the reset. If it is not, its successors will ask for another replay.
            blocks, step = self._make_blocks(), None
        self._sequence = sequence
        self._incomplete = False
        # Another replay gives no more than this one, until the publisher has other batches.
        self._batches_to_next_rebuild = REPLAYED_BATCHES if step is Step.SKIP else 0
        self._deliver(self._union.replace(self._index, blocks))

    async def _complete(self) -> None:
        if self._incomplete and self._batches_to_next_rebuild <= 0:
            logger.info("vLLM's KV events of rank %d follow on blocks that are not known", self.rank)
            await self._rebuild()
        self._incomplete = False

    async def _replay(self, sequence: BatchSequence, apply: Callable[[bytes], None]) -> Step | None:
        """One request and its answer, applied. SKIP: it was whole. GAP: the rest is to be asked for again. LOST: as in
        core.engine_sequence. None: no answer came."""
        first = sequence.begin_replay()
        progress = False
        socket = self._sockets.ask(self._endpoint.replay)
        try:
            await socket.send(replay_request(first))
            while True:
                async with asyncio.timeout(REST_S if progress else ANSWER_S):
                    frames = await socket.recv()
                message = read_replayed(frames)
                if message.number is None:
                    return sequence.replay_ended()
                step = sequence.replayed(message.number, message.payload)
                if step is Step.APPLY:
                    apply(message.payload)
                    progress = True
                elif step is not Step.SKIP:
                    return step
                await asyncio.sleep(0)
        except TimeoutError:
            return Step.GAP if progress else None
        except KvWireError as error:
            logger.error("vLLM's answer to a replay request, rank %d: %s", self.rank, error)
            return None
        finally:
            socket.close()

    def _apply(self, payload: bytes) -> None:
        self._batches_to_next_rebuild -= 1
        try:
            events = self._decoder.decode(payload)
        except KvWireError as error:
            self._malformed(error)
            self._deliver(self._union.clear(self._index))
            return
        applied = self._union.apply(self._index, events)
        self._incomplete |= applied.incomplete
        self._deliver(applied.events)

    def _apply_to(self, blocks: EngineBlocks, payload: bytes) -> None:
        try:
            blocks.apply(self._decoder.decode(payload))
        except KvWireError as error:
            self._malformed(error)
            blocks.clear()

    def _malformed(self, error: KvWireError) -> None:
        logger.error(
            "vLLM's KV events of rank %d: %s; what this rank holds is known from here on only", self.rank, error
        )
