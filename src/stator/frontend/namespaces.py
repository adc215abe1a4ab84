"""Which models one frontend serves, of its own namespace and of others, and whose Processors answer for each.

A model that several namespaces have is served by one of them: by the first that could finish a request now, our own
before the others and those as they are listed. The next one stands in while that one cannot. They do not share a load:
each has a router of its own, and what one model's name stands for in two deployments nobody has compared.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from stator.frontend.generate import Targets
from stator.frontend.health import HealthReport, ModelHealth, NamespaceHealth, health_of, models_of
from stator.messages.instances import InstanceInfo
from stator.messages.openai import ModelCard
from stator.runtime.context import CallContext
from stator.runtime.directory import DirectoryChange, InstanceDirectory
from stator.transport.base import Sink, StreamHandle, Target, TransportClient

PROCESSOR = "processor"

Ready = Sequence[InstanceInfo]
"""The ready instances of one namespace. Of several namespaces, our own comes first."""


def served_by(spaces: Sequence[Ready]) -> dict[str, int]:
    """For each model, which namespace answers for it, by its place in spaces.

    One without a worker for it, but with a Processor that says it is its own, comes after all that have one: it can at
    least say that the model exists, and wait for a worker.
    """
    found: dict[str, int] = {}
    for index, instances in enumerate(spaces):
        if _has_processor(instances):
            for card in models_of(instances, 0):
                found.setdefault(card.id, index)
    for index, instances in enumerate(spaces):
        for instance in instances:
            if instance.role == PROCESSOR and instance.model is not None:
                found.setdefault(instance.model, index)
    return found


def cards_of(spaces: Sequence[Ready], created: int) -> list[ModelCard]:
    """What `/v1/models` lists. A Processor of our own may be in this process, and is taken for there."""
    cards: dict[str, ModelCard] = {}
    for index, instances in enumerate(spaces):
        if index == 0 or _has_processor(instances):
            for card in models_of(instances, created):
                cards.setdefault(card.id, card)
    return [cards[name] for name in sorted(cards)]


def health_of_all(spaces: Mapping[str, Ready]) -> HealthReport:
    """By namespace, our own first. A model's instances in several are summed up; KV blocks pair only within one."""
    reports = _reports(spaces)
    own = next(iter(reports))
    if len(reports) == 1:
        return reports[own]
    models: dict[str, ModelHealth] = {}
    for report in reports.values():
        for model, has in report.models.items():
            known = models.get(model, ModelHealth())
            models[model] = ModelHealth(known.decode + has.decode, known.prefill + has.prefill)
    return HealthReport(
        any(report.ready for report in reports.values()),
        [
            reason if name == own else f"namespace {name}: {reason}"
            for name, report in reports.items()
            for reason in report.reasons
        ],
        models,
        [refusal for report in reports.values() for refusal in report.pairing_refusals],
        {name: NamespaceHealth(report.ready, report.models) for name, report in reports.items()},
    )


def _reports(spaces: Mapping[str, Ready]) -> dict[str, HealthReport]:
    # A Processor of our own may be in this process.
    return {
        name: health_of(instances, () if index == 0 else (PROCESSOR,))
        for index, (name, instances) in enumerate(spaces.items())
    }


def _has_processor(instances: Ready) -> bool:
    return any(instance.role == PROCESSOR for instance in instances)


class Space(TransportClient, Protocol):
    """Another namespace: a client for its instances, and which ones there are."""

    @property
    def namespace(self) -> str: ...

    @property
    def directory(self) -> InstanceDirectory: ...


@dataclass(frozen=True, slots=True)
class _FarTarget(Target):
    """client: of the namespace that it is in."""

    client: TransportClient | None = field(default=None, compare=False, repr=False)


class _FarClient:
    """A transport client for targets of any of the namespaces. Closing it closes none of theirs."""

    def __init__(self, own: TransportClient) -> None:
        self._own = own

    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        client = target.client if isinstance(target, _FarTarget) and target.client is not None else self._own
        return client.open(target, request, sink, context=context, item_type=item_type)

    async def close(self) -> None:
        pass


class Namespaces:
    """namespace, directory, client, targets: our own; targets finds the Processors that may be called.

    others: in order of preference. created: Unix seconds, of all model cards. Follows the directories until `close`.
    """

    def __init__(
        self,
        namespace: str,
        *,
        directory: InstanceDirectory,
        client: TransportClient,
        targets: Targets,
        others: Sequence[Space] = (),
        created: int,
    ) -> None:
        self._own_targets = targets
        self._created = created
        self._names = (namespace, *(other.namespace for other in others))
        self._others = tuple(others)
        self._directories = (directory, *(other.directory for other in others))
        self._clients = (client, *others)
        self._changed = asyncio.Event()
        self._served: dict[str, int] = {}
        self._parents: list[dict[str, str]] = []
        self._processors: list[list[InstanceInfo]] = [[] for _ in others]
        self._unsubscribe: list[Callable[[], None]] = []
        self.client: TransportClient = _FarClient(client) if others else client
        for followed in self._directories:
            self._unsubscribe.append(followed.subscribe(self._on_change))

    def models(self) -> list[ModelCard]:
        return cards_of(self._instances(), self._created)

    def health(self) -> HealthReport:
        return health_of_all(dict(zip(self._names, self._instances(), strict=True)))

    def of_model(self, model: str) -> Targets:
        """The Processors to ask for that model: our own if nobody has it, who then say so."""
        index = self._served.get(model, 0)
        if index == 0:
            return self._own_targets
        # A Processor says which model is its own; the adapters of it are its own as well.
        return partial(self._far_targets, index - 1, self._parents[index].get(model, model))

    def everywhere(self, endpoint: str) -> list[Target]:
        """The Processors of all namespaces."""
        far = [self._far_targets(number, None, endpoint) for number in range(len(self._others))]
        return [*self._own_targets(endpoint), *(target for targets in far for target in targets)]

    def sources(self) -> list[tuple[TransportClient, InstanceDirectory]]:
        """Of each namespace: what its instances are, and how to call them."""
        return list(zip(self._clients, self._directories, strict=True))

    async def ready(self) -> str:
        """Waits until a request can be finished; a model that it may be for, our own first."""
        while True:
            for space in _reports(dict(zip(self._names, self._instances(), strict=True))).values():
                if space.ready:
                    return next(model for model, has in space.models.items() if has.decode)
            changed = self._changed
            await changed.wait()

    def close(self) -> None:
        for unsubscribe in self._unsubscribe:
            unsubscribe()

    def _instances(self) -> list[Ready]:
        return [directory.instances() for directory in self._directories]

    def _on_change(self, _change: DirectoryChange) -> None:
        instances = self._instances()
        self._served = served_by(instances)
        self._parents = [{c.id: c.parent for c in models_of(each, 0) if c.parent is not None} for each in instances]
        self._processors = [[info for info in others if info.role == PROCESSOR] for others in instances[1:]]
        self._changed.set()
        self._changed = asyncio.Event()

    def _far_targets(self, number: int, model: str | None, endpoint: str) -> list[Target]:
        """Of one of the others. model: Processors that say it is theirs come alone, if there are any."""
        processors = [info for info in self._processors[number] if endpoint in info.endpoints]
        named = [info for info in processors if info.model == model]
        client = self._others[number]
        return [_FarTarget(info.addresses, endpoint, info.instance_id, client=client) for info in named or processors]
