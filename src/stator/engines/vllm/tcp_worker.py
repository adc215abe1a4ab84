"""One vLLM worker's end of Stator's connector: a request plane in a thread, which serves and fetches KV blocks.

vLLM calls from its own thread, once a step; everything else happens on the thread's event loop. What ended is left in
a `WorkerReport`, which the next step takes. Threads meet in `submit`, `cancel` and `take_*` only.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from stator.config import environment
from stator.config.token_file import read_token_file
from stator.core.kv_handover import Load, LoadParams, StepWork, WorkerReport
from stator.engines.base import TRANSFER_HOLD_S
from stator.engines.transfer.fetcher import BlockFetcher
from stator.engines.transfer.server import BlockServer
from stator.errors import ConfigError, StatorError
from stator.ids import InstanceId, RequestId, TransferId
from stator.runtime.loop import run_loop
from stator.runtime.tasks import TaskOwner
from stator.transport.client import RequestPlaneClient
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class ConnectorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`kv_connector_extra_config` of StatorConnector.

    host: to listen on; advertise: what peers are told, by default host. port: of the first worker, the others take the
    next ones; 0 takes free ones. token_file: mode 0600; the token itself must not be here, since vLLM logs its
    configuration. hold_s: how long a finished prefill waits to be fetched. timeout_s: for one whole fetch.
    """

    namespace: str
    instance_id: InstanceId
    token_file: str
    host: str = "127.0.0.1"
    advertise: str | None = None
    port: int = 0
    hold_s: float = TRANSFER_HOLD_S
    timeout_s: float = TRANSFER_HOLD_S

    @classmethod
    def parse(cls, extra: dict[str, Any]) -> "ConnectorSettings":
        """Raises ConfigError naming the key. Unknown keys are ignored: they may be vLLM's."""
        try:
            settings = msgspec.convert(extra, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"kv-transfer-config: kv_connector_extra_config of StatorConnector: {error}") from error
        if not settings.namespace or not settings.instance_id:
            raise ConfigError("kv-transfer-config: StatorConnector needs a namespace and an instance_id")
        if settings.hold_s <= 0 or settings.timeout_s <= 0:
            raise ConfigError("kv-transfer-config: hold_s and timeout_s must be above 0 seconds")
        return settings


class Blocks(Protocol):
    """The worker's KV cache: see kv_rows.KvRows."""

    layout: str

    def mark(self) -> None: ...

    def export_blocks(self, block_ids: Sequence[int], num_bytes: int, /) -> list[bytes]: ...

    def import_blocks(self, blocks: Sequence[tuple[int, bytes]], /) -> None: ...


@dataclass(frozen=True, slots=True)
class _Source:
    """The peer worker that a load's blocks come from (engines.transfer.fetcher.HeldBlocks)."""

    transfer_id: TransferId
    instance_id: InstanceId
    addresses: tuple[str, ...]


class TransferWorker:
    """rank: of this worker among the engine's; it fetches from the peer's worker of the same rank. port_offset: of this
    worker among all that share the settings.

    Every load ends as received exactly once; every hold ends as sent exactly once: fetched and released by the peer,
    released by anybody, or expired.
    """

    def __init__(self, settings: ConnectorSettings, blocks: Blocks, *, rank: int = 0, port_offset: int = 0) -> None:
        """Raises ConfigError for a token file that cannot be used."""
        self._settings = settings
        self._blocks = blocks
        self._rank = rank
        self._port_offset = port_offset
        self._token = read_token_file(Path(settings.token_file))
        self._lock = threading.Lock()
        self._report = WorkerReport()
        self._held: dict[TransferId, tuple[RequestId, Sequence[int]]] = {}
        self._loads: dict[RequestId, asyncio.Task[bool]] = {}
        self._submitted_loads: set[RequestId] = set()  # vLLM's thread only; until their requests have ended
        self._started: Future[tuple[str, ...]] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="stator-kv-transfer", daemon=True)

    def start(self) -> tuple[str, ...]:
        """Returns where peers reach this worker. Raises ConfigError for a port that cannot be had."""
        self._thread.start()
        return self._started.result(START_TIMEOUT_S)

    def submit(self, work: StepWork) -> None:
        """What the engine's scheduler side says with a step. Waking the thread costs a step more than all else here."""
        if not work:
            return
        if work.loads:
            self._submitted_loads.update(load.request_id for load in work.loads)
            self._blocks.mark()
        self._call(self._begin, work)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """The requests ended: loads of theirs stop, and are then reported as received."""
        ended = [RequestId(request_id) for request_id in request_ids]
        if ended and self._submitted_loads.intersection(ended):
            self._submitted_loads.difference_update(ended)
            self._call(self._cancel, ended)

    def take_ended(self) -> tuple[set[str], set[str]]:
        with self._lock:
            return self._report.take_ended()

    def take_failed_block_ids(self) -> set[int]:
        with self._lock:
            return self._report.take_failed_block_ids()

    def stop(self) -> None:
        """Ends every hold and load, closes every socket, joins the thread. Idempotent."""
        if self._stopping is not None:
            self._call(self._stopping.set)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _call(self, function: Any, *args: Any) -> None:
        loop = self._loop
        assert loop is not None, "the worker has not been started"
        # A loop that has been closed has ended everything already.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            run_loop(self._main())
        except BaseException as error:
            if self._started.done():
                logger.exception("the KV transfer thread failed")
            else:
                self._started.set_exception(error)

    async def _main(self) -> None:
        settings = self._settings
        identity = Identity(settings.namespace, settings.instance_id, "kv-transfer", self._token, environment.tls())
        port = settings.port + self._port_offset if settings.port else 0
        server = RequestPlaneServer(identity, Listen(settings.host, port, advertise=settings.advertise))
        client = RequestPlaneClient(identity)
        layout = self._blocks.layout
        self._server = BlockServer(
            blocks_of=self._blocks_of, free=self._hold_ended, export=self._export, hold_s=settings.hold_s, layout=layout
        )
        self._fetcher = BlockFetcher(client, self._import, timeout_s=settings.timeout_s, layout=layout)
        self._tasks = TaskOwner("kv transfer")
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._server.register(server)
        try:
            await server.start()
            self._started.set_result(server.addresses)
            await self._stopping.wait()
        finally:
            await self._tasks.close()
            await self._server.close()
            await client.close()
            await server.close()

    def _begin(self, work: StepWork) -> None:
        for transfer_id in work.announced:
            self._server.announce(transfer_id)
        for transfer_id in work.withdrawn:
            self._server.withdraw(transfer_id)
        for hold in work.holds:
            self._held[hold.transfer_id] = (hold.request_id, hold.block_ids)
            self._server.hold(hold.transfer_id)
        for load in work.loads:
            self._start_load(load)
        for params in work.releases:
            self._fetcher.release(self._source(params), RequestId(params.transfer_id))

    def _cancel(self, request_ids: list[RequestId]) -> None:
        for request_id in request_ids:
            if (task := self._loads.get(request_id)) is not None:
                task.cancel()

    def _start_load(self, load: Load) -> None:
        source = self._source(load.source)
        task = self._tasks.spawn(self._load(load, source), f"load {load.request_id}")
        self._loads[load.request_id] = task
        # Not in the task itself, which may be cancelled before it has begun.
        task.add_done_callback(lambda task: self._load_ended(load, source, task))

    async def _load(self, load: Load, source: _Source) -> bool:
        indexes = range(load.first_block, load.first_block + len(load.block_ids))
        try:
            await self._fetcher.fetch(source, load.request_id, indexes, list(load.block_ids))
        except StatorError as error:
            logger.warning("request %s: no KV blocks from the prefill engine: %s", load.request_id, error.message)
            return False
        except Exception:
            logger.exception("request %s: importing KV blocks failed", load.request_id)
            return False
        return True

    def _load_ended(self, load: Load, source: _Source, task: asyncio.Task[bool]) -> None:
        del self._loads[load.request_id]
        # Of a cancelled load nobody asks whether its blocks were filled: its request is gone.
        filled = task.cancelled() or task.result()
        with self._lock:
            self._report.received(load.request_id, () if filled else load.block_ids)
        self._fetcher.release(source, load.request_id)

    def _source(self, params: LoadParams) -> _Source:
        return _Source(params.transfer_id, params.remote_instance_id, params.remote_addresses[self._rank])

    def _blocks_of(self, transfer_id: TransferId) -> Sequence[int] | None:
        held = self._held.get(transfer_id)
        return None if held is None else held[1]

    def _hold_ended(self, transfer_id: TransferId) -> None:
        request_id, _ = self._held.pop(transfer_id)
        with self._lock:
            self._report.sent(request_id)

    async def _export(self, block_ids: Sequence[int], num_bytes: int) -> list[bytes]:
        return self._blocks.export_blocks(block_ids, num_bytes)

    async def _import(self, blocks: list[tuple[int, bytes]]) -> None:
        self._blocks.import_blocks(blocks)
