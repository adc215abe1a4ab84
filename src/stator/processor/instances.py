"""What the Processor knows of decode instances, and which of its attempts are open where.

Discovery hears of a death that no connection tells of: a machine that was unplugged, or a partition in which packets
just vanish. An instance whose lease has ended ends every attempt that is open there, at once, and gets no other. One
that is not known is used all the same: a router's view may be ahead of ours.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from stator.core.resuming import first_used
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import SamplingParams
from stator.messages.instances import InstanceInfo, InstanceState
from stator.processor.suspects import SuspectLine
from stator.runtime.directory import DirectoryChange, InstanceDirectory

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 10_000
"""Instances that have left are remembered, the last so many: a router that was slow to hear may still name them."""

DECODE_ROLE = "decode"


class OpenAttempt(Protocol):
    def lost(self, error: StatorError) -> None:
        """The instance is gone. Not called for an attempt that was taken off."""
        ...


class DecodeInstances:
    """directory: None knows nothing, so that failures are learned from calls alone. suspects: of crashes there.

    Opening and ending an attempt costs one dictionary operation each; a removal as much as there are attempts open at
    that instance.
    """

    def __init__(self, directory: InstanceDirectory | None) -> None:
        self._directory = directory
        self.suspects = SuspectLine()
        # Dictionaries, for their order: what one event does must not depend on where objects lie in memory.
        self._open: dict[InstanceId, dict[OpenAttempt, None]] = {}
        self._waiting: dict[Callable[[], None], None] = {}
        self._gone: dict[InstanceId, None] = {}
        self._cannot_resume: dict[InstanceId, tuple[str, ...]] = {}
        self._lacking: dict[InstanceId, tuple[str, ...]] = {}
        self._adapters: dict[str | None, frozenset[str]] | None = None
        self._unsubscribe = None if directory is None else directory.subscribe(self._changed)

    @property
    def num_open(self) -> int:
        """Attempts at all instances; for tests."""
        return sum(len(attempts) for attempts in self._open.values())

    def close(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()

    def is_gone(self, instance_id: InstanceId) -> bool:
        return instance_id in self._gone

    def opened(self, instance_id: InstanceId, attempt: OpenAttempt) -> None:
        attempts = self._open.get(instance_id)
        if attempts is None:
            attempts = self._open[instance_id] = {}
        attempts[attempt] = None

    def ended(self, instance_id: InstanceId, attempt: OpenAttempt) -> None:
        """Idempotent."""
        attempts = self._open.get(instance_id)
        if attempts is not None and attempts.pop(attempt, self) is None and not attempts:
            del self._open[instance_id]

    def wake_on_change(self, callback: Callable[[], None]) -> None:
        """Call it when an instance came or got ready, as often as that happens until `sleep`."""
        self._waiting[callback] = None

    def sleep(self, callback: Callable[[], None]) -> None:
        self._waiting.pop(callback, None)

    def is_known(self, instance_id: InstanceId) -> bool:
        """Whether discovery shows it here. Without a directory every instance is."""
        return self._directory is None or self._directory.get(instance_id) is not None

    def any_ready(self, model: str, lora_name: str | None = None) -> bool:
        """Whether discovery shows an instance of the model, with the adapter, that takes requests."""
        return bool(self._ready(model, lora_name))

    def adapters(self, model: str) -> frozenset[str]:
        """Names of the LoRA adapters that any instance of the model has, ready or not."""
        if self._directory is None:
            return frozenset()
        if self._adapters is None:
            found: dict[str | None, set[str]] = {}
            for info in self._directory.instances(role=DECODE_ROLE, ready_only=False):
                found.setdefault(info.model, set()).update(adapter.name for adapter in info.adapters)
            self._adapters = {name: frozenset(adapters) for name, adapters in found.items()}
        return self._adapters.get(model, frozenset())

    def _ready(self, model: str, lora_name: str | None) -> list[InstanceInfo]:
        if self._directory is None:
            return []
        return self._directory.instances(role=DECODE_ROLE, model=model, adapter=lora_name)

    def obstacle(self, instance_id: InstanceId, sampling: SamplingParams) -> str | None:
        """The sampling field because of which that instance cannot continue the request."""
        fields = self._cannot_resume.get(instance_id)
        return None if fields is None else first_used(sampling, fields)

    def unable(
        self, model: str, sampling: SamplingParams, lora_name: str | None = None
    ) -> tuple[dict[InstanceId, str], bool]:
        """(instances that cannot continue the request, with the field; whether to ask for another: one of the model
        can, or none is there and one may come)."""
        kinds = {fields: first_used(sampling, fields) for fields in set(self._cannot_resume.values())}
        if self._directory is None or not any(kinds.values()):
            return {}, True
        unable = {i: field for i, fields in self._cannot_resume.items() if (field := kinds[fields]) is not None}
        ready = self._ready(model, lora_name)
        return unable, not ready or any(info.instance_id not in unable for info in ready)

    def lacking(self, model: str, sampling: SamplingParams) -> tuple[str, str] | None:
        """(engine, sampling field) because of which no instance of the model can take the request at all. None if one
        may: it refuses the request itself if need be."""
        if not self._lacking or self._directory is None:
            return None
        found: tuple[str, str] | None = None
        for info in self._directory.instances(role=DECODE_ROLE, model=model):
            field = first_used(sampling, self._lacking.get(info.instance_id, ()))
            if field is None or info.engine is None:
                return None
            found = info.engine.engine, field
        return found

    def cannot_embed(self, model: str) -> str | None:
        """The engine of the model's instances if they are there, and none of them makes embeddings."""
        infos = () if self._directory is None else self._directory.instances(role=DECODE_ROLE, model=model)
        engines = [info.engine for info in infos if info.engine is not None]
        return engines[0].engine if engines and not any(engine.can_embed for engine in engines) else None

    def _changed(self, change: DirectoryChange) -> None:
        self._adapters = None
        for info in change.added:
            self._gone.pop(info.instance_id, None)
        for info in (*change.added, *change.changed):
            if info.role == DECODE_ROLE and info.engine is not None and info.engine.cannot_resume:
                self._cannot_resume[info.instance_id] = info.engine.cannot_resume
            if info.role == DECODE_ROLE and info.engine is not None and info.engine.cannot:
                self._lacking[info.instance_id] = info.engine.cannot
        for info in change.removed:
            self._lacking.pop(info.instance_id, None)
            self._cannot_resume.pop(info.instance_id, None)
            self._lost(info.instance_id)
        if any(info.state is InstanceState.READY for info in (*change.added, *change.changed)):
            for callback in list(self._waiting):
                callback()

    def _lost(self, instance_id: InstanceId) -> None:
        self._gone[instance_id] = None
        if len(self._gone) > MAX_REMEMBERED:
            del self._gone[next(iter(self._gone))]
        attempts = self._open.pop(instance_id, None)
        if not attempts:
            return
        logger.warning("instance %s has left; its %d open requests go on elsewhere", instance_id, len(attempts))
        for attempt in attempts:
            # One that was closed by another's failure knows that it is.
            attempt.lost(StatorError(ErrorCode.INSTANCE_LOST, f"instance {instance_id} has left: its lease has ended"))
