"""LoRA adapters of one worker: loaded and unloaded while it runs, and shown in discovery.

A load: the engine first, then discovery. An unload: discovery first; what callers send until they know of it is taken
for SETTLE_S; then new requests for the adapter are refused, those that run are waited for, and what is left when the
time is over is ended so that it goes on where the adapter still is, or for good if that is nowhere; the engine drops it
last.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from stator.engines.base import Engine
from stator.engines.lora import LoraEngine
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo
from stator.messages.lora import LoadLora, LoraAdapter, LoraLoaded, LoraUnloaded, UnloadLora
from stator.runtime.directory import InstanceDirectory
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

SETTLE_S = 0.25
"""For routers and decode workers to learn that an adapter leaves."""

MAX_ADAPTERS = 256
"""All of them are in the instance's record in discovery."""

MAX_NAME_CHARS = 256

T = TypeVar("T")
Show = Callable[[tuple[LoraAdapter, ...]], Awaitable[None]]


class AdapterUser(Protocol):
    """Who has requests for adapters."""

    async def adapter_idle(self, name: str) -> None:
        """Returns once no request for it runs."""
        ...

    def end_adapter(self, name: str, error: StatorError) -> int:
        """End the requests for it that run; how many there were."""
        ...


class WorkerAdapters:
    """show: puts them into discovery. user: set before the first request. settle_s: as SETTLE_S.

    One change at a time; a change goes on when its caller leaves, until `close`.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        info: EngineInfo,
        instance_id: InstanceId,
        directory: InstanceDirectory,
        show: Show,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._engine = engine if isinstance(engine, LoraEngine) else None
        self._info = info
        self._instance_id = instance_id
        self._directory = directory
        self._show = show
        self._settle_s = settle_s
        self._lock = asyncio.Lock()
        self._leaving: set[str] = set()
        self._refused: set[str] = set()
        self._tasks = TaskOwner(f"adapters of {instance_id}")
        self.user: AdapterUser | None = None

    @property
    def shown(self) -> tuple[LoraAdapter, ...]:
        """What discovery is told, by name."""
        if self._engine is None:
            return ()
        adapters = self._engine.adapters
        return tuple(adapters[name] for name in sorted(adapters) if name not in self._leaving)

    def refusal(self, name: str) -> StatorError | None:
        """Why a request for that adapter is not taken. Another instance may have it."""
        if self._engine is not None and name in self._engine.adapters and name not in self._refused:
            return None
        message = f"instance {self._instance_id} does not have the adapter {name!r} (any more)"
        return StatorError(ErrorCode.DRAINING, message)

    def digest(self, name: str) -> str:
        adapter = None if self._engine is None else self._engine.adapters.get(name)
        return "" if adapter is None else adapter.digest

    async def load(self, request: LoadLora) -> LoraLoaded:
        """Endpoint `load_lora`. Raises StatorError as LoadLora says."""
        return await self._to_its_end(self._load(request), f"load {request.name}")

    async def unload(self, request: UnloadLora) -> LoraUnloaded:
        """Endpoint `unload_lora`. Raises StatorError as UnloadLora says."""
        return await self._to_its_end(self._unload(request), f"unload {request.name}")

    async def close(self) -> None:
        await self._tasks.close()

    async def _to_its_end(self, change: Coroutine[Any, Any, T], name: str) -> T:
        async def outcome() -> T | StatorError:
            # Told to the caller; in the log it would look like a failure of ours.
            try:
                return await change
            except StatorError as error:
                return error

        done = await asyncio.shield(self._tasks.spawn(outcome(), name))
        if isinstance(done, StatorError):
            raise done
        return done

    async def _load(self, request: LoadLora) -> LoraLoaded:
        engine, name = self._able(), request.name
        _check(request)
        async with self._lock:
            known = engine.adapters.get(name)
            if known is not None and known.path == request.path:
                return LoraLoaded(known, already=True)
            if (reason := self._taken(name, known)) is not None:
                raise StatorError(ErrorCode.INVALID_REQUEST, reason, param="name")
            if len(engine.adapters) >= MAX_ADAPTERS:
                message = f"this worker has {MAX_ADAPTERS} adapters, as many as one may; unload one first"
                raise StatorError(ErrorCode.INVALID_REQUEST, message)
            self._leaving.add(name)
            try:
                adapter = await engine.load_adapter(name, request.path)
                if (other := self._differing(adapter)) is not None:
                    await engine.unload_adapter(name)
                    raise StatorError(
                        ErrorCode.INVALID_REQUEST,
                        f"{other} has another adapter under the name {name!r}; a name means the same everywhere: "
                        "unload it there first, or use another name",
                        param="name",
                    )
            finally:
                self._leaving.discard(name)
            await self._show(self.shown)
            logger.info("loaded the LoRA adapter %s from %s", name, request.path)
            return LoraLoaded(adapter)

    async def _unload(self, request: UnloadLora) -> LoraUnloaded:
        engine, name = self._able(), request.name
        if not request.timeout_s >= 0:
            message = f"timeout_s is {request.timeout_s}; it must be a number of seconds, 0 or more"
            raise StatorError(ErrorCode.INVALID_REQUEST, message, param="timeout_s")
        async with self._lock:
            if name not in engine.adapters:
                loaded = ", ".join(engine.adapters) or "none"
                message = f"the adapter {name!r} is not loaded here; loaded are: {loaded}"
                raise StatorError(ErrorCode.NOT_FOUND, message, param="name")
            self._leaving.add(name)
            try:
                await self._show(self.shown)
                await asyncio.sleep(self._settle_s)
                self._refused.add(name)
                num_ended = await self._drain(name, request.timeout_s)
                await engine.unload_adapter(name)
            finally:
                self._leaving.discard(name)
                self._refused.discard(name)
            logger.info("unloaded the LoRA adapter %s; %d requests had no time to finish", name, num_ended)
            return LoraUnloaded(name, num_ended)

    async def _drain(self, name: str, timeout_s: float) -> int:
        if self.user is None:
            return 0
        try:
            async with asyncio.timeout(timeout_s):
                await self.user.adapter_idle(name)
            return 0
        except TimeoutError:
            num_ended = self.user.end_adapter(name, self._unloaded(name))
            await self.user.adapter_idle(name)
            return num_ended

    def _unloaded(self, name: str) -> StatorError:
        """What its requests end with. Without another instance that has it they would wait for one in vain."""
        others = self._directory.instances(role="decode", model=self._info.model, adapter=name)
        if any(info.instance_id != self._instance_id for info in others):
            return StatorError(ErrorCode.DRAINING, f"instance {self._instance_id} unloads the adapter {name!r}")
        message = f"the adapter {name!r} was unloaded while the request ran, and no other worker has it"
        return StatorError(ErrorCode.NO_INSTANCE, message)

    def _able(self) -> LoraEngine:
        if self._engine is None:
            message = f"the engine {self._info.engine} has no LoRA adapters; vllm has"
            raise StatorError(ErrorCode.UNSUPPORTED, message)
        return self._engine

    def _taken(self, name: str, known: LoraAdapter | None) -> str | None:
        if known is not None:
            return f"{name!r} is loaded already, from {known.path}; unload it first, or use another name"
        served = {info.model for info in self._directory.instances(ready_only=False)}
        if name == self._info.model or name in served:
            return f"{name!r} is the name of a model that is served here; use another one"
        return None

    def _differing(self, adapter: LoraAdapter) -> InstanceId | None:
        for info in self._directory.instances(model=self._info.model, adapter=adapter.name, ready_only=False):
            other = info.adapter(adapter.name)
            if info.instance_id != self._instance_id and other is not None and other.digest != adapter.digest:
                return info.instance_id
        return None


def _check(request: LoadLora) -> None:
    name = request.name
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
        message = f"an adapter's name has 1 to {MAX_NAME_CHARS} printable characters, no space around them"
        raise StatorError(ErrorCode.INVALID_REQUEST, message, param="name")
    if not request.path.startswith("/") or "\0" in request.path:
        message = f"{request.path!r} is not an absolute path; it is one on the worker's node"
        raise StatorError(ErrorCode.INVALID_REQUEST, message, param="path")
