"""Which instances live now: a view of discovery that is always at hand, without a call to the server."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from stator.discovery.base import Discovery, Lease, WatchBatch
from stator.errors import DECODE_ERRORS
from stator.ids import InstanceId
from stator.messages.instances import INSTANCES_PREFIX, InstanceInfo, InstanceState, instance_key
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DirectoryChange:
    """Instances that came, went, or published something new about themselves (`changed`: the new info)."""

    added: tuple[InstanceInfo, ...] = ()
    removed: tuple[InstanceInfo, ...] = ()
    changed: tuple[InstanceInfo, ...] = ()


DirectoryListener = Callable[[DirectoryChange], None]


class InstanceDirectory:
    """Follows INSTANCES_PREFIX from `start` to `close`. While discovery is unreachable the last view stays.

    A value that is not an InstanceInfo is logged once per key and ignored.
    """

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery
        self._tasks = TaskOwner("instance directory")
        self._by_key: dict[str, InstanceInfo] = {}
        self._by_id: dict[InstanceId, InstanceInfo] = {}
        self._complained: set[str] = set()
        self._listeners: list[DirectoryListener] = []
        self._changed = asyncio.Event()
        self._synced = asyncio.Event()

    async def start(self) -> None:
        """Begins to follow, without waiting for the first view: `wait_for` does that."""
        self._tasks.spawn(self._follow(), "follow")

    async def close(self) -> None:
        await self._tasks.close()

    @property
    def synced(self) -> bool:
        """Whether a whole view has arrived since the start."""
        return self._synced.is_set()

    def instances(
        self,
        *,
        role: str | None = None,
        service: str | None = None,
        model: str | None = None,
        adapter: str | None = None,
        ready_only: bool = True,
    ) -> list[InstanceInfo]:
        """Sorted by instance id. Filters that are None match everything; ready_only leaves out the draining. adapter: a
        LoRA adapter's name."""
        matching = self._matching(role, service, model, ready_only)
        if adapter is not None:
            matching = (info for info in matching if info.adapter(adapter) is not None)
        return sorted(matching, key=lambda info: info.instance_id)

    def get(self, instance_id: InstanceId) -> InstanceInfo | None:
        return self._by_id.get(instance_id)

    def subscribe(self, listener: DirectoryListener) -> Callable[[], None]:
        """Calls listener before returning with all instances known, as added (if there are any), then on every change.

        The view is up to date when it is called. What it raises is logged. Returns the function that ends it.
        """
        self._listeners.append(listener)
        if self._by_key:
            self._tell(listener, DirectoryChange(added=tuple(self._by_key[key] for key in sorted(self._by_key))))

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    async def wait_for(self, predicate: Callable[["InstanceDirectory"], bool], timeout_s: float | None) -> None:
        """Returns once the first view has arrived and predicate(self) holds. Raises TimeoutError after timeout_s."""
        async with asyncio.timeout(timeout_s):
            await self._synced.wait()
            while not predicate(self):
                changed = self._changed
                await changed.wait()

    def _matching(
        self, role: str | None, service: str | None, model: str | None, ready_only: bool
    ) -> Iterator[InstanceInfo]:
        for info in self._by_id.values():
            if ready_only and info.state is not InstanceState.READY:
                continue
            if role in (None, info.role) and service in (None, info.service) and model in (None, info.model):
                yield info

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._discovery.watch(INSTANCES_PREFIX)) as batches:
            async for batch in batches:
                self._apply(batch)

    def _apply(self, batch: WatchBatch) -> None:
        before = self._by_key
        after: dict[str, InstanceInfo] = {} if batch.reset else dict(before)
        for key in batch.deletes:
            after.pop(key, None)
            self._complained.discard(key)
        for entry in batch.puts:
            info = self._decode(entry.key, entry.value)
            if info is None:
                after.pop(entry.key, None)
            else:
                after[entry.key] = info
        self._by_key = after
        self._by_id = {info.instance_id: info for info in after.values()}
        self._synced.set()
        self._announce(before, after)

    def _announce(self, before: dict[str, InstanceInfo], after: dict[str, InstanceInfo]) -> None:
        change = DirectoryChange(
            added=tuple(after[key] for key in sorted(after.keys() - before.keys())),
            removed=tuple(before[key] for key in sorted(before.keys() - after.keys())),
            changed=tuple(after[key] for key in sorted(after.keys() & before.keys()) if after[key] != before[key]),
        )
        if change == DirectoryChange():
            return
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in list(self._listeners):
            self._tell(listener, change)

    def _tell(self, listener: DirectoryListener, change: DirectoryChange) -> None:
        try:
            listener(change)
        except Exception:
            logger.exception("a listener of the instance directory failed")

    def _decode(self, key: str, value: bytes) -> InstanceInfo | None:
        try:
            info = msgspec.msgpack.decode(value, type=InstanceInfo)
        except DECODE_ERRORS as error:
            if key not in self._complained:
                self._complained.add(key)
                logger.warning("ignoring %s in discovery: not an instance this version understands (%s)", key, error)
            return None
        self._complained.discard(key)
        return info


async def register_instance(discovery: Discovery, lease: Lease, info: InstanceInfo) -> None:
    """Publish an instance for as long as the lease lives, or replace what it published.

    Raises StatorError(NOT_FOUND) if the lease has ended, INSTANCE_LOST if discovery is unreachable.
    """
    await discovery.put(instance_key(info.service, info.instance_id), msgspec.msgpack.encode(info), lease)


async def update_instance_state(
    discovery: Discovery, lease: Lease, info: InstanceInfo, state: InstanceState
) -> InstanceInfo:
    """Publish another state, e.g. DRAINING so that no new calls come. Returns the info with it."""
    updated = msgspec.structs.replace(info, state=state)
    await register_instance(discovery, lease, updated)
    return updated
