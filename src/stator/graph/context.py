"""What a running service is given: its identity, its configuration and the planes."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from stator.discovery.base import Discovery, Lease
from stator.graph.neighbour import Neighbour
from stator.graph.protocol import Serving
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo
from stator.messages.instances import InstanceInfo, InstanceState
from stator.messages.lora import LoraAdapter
from stator.queue.base import JobQueue
from stator.runtime.context import Clocks
from stator.runtime.directory import InstanceDirectory
from stator.runtime.settings import LiveSettings
from stator.runtime.tasks import TaskOwner
from stator.transport.base import TransportClient, TransportServer
from stator.transport.inprocess import InProcessNetwork


@dataclass(slots=True)
class InfoFields:
    """The part of InstanceInfo that a service decides."""

    role: str
    model: str | None = None
    engine: EngineInfo | None = None
    adapters: tuple[LoraAdapter, ...] = ()


async def _nothing() -> None:
    pass


@dataclass(slots=True)
class ServiceContext:
    """Given to on_start hooks; valid until the service's last on_stop hook has returned.

    host: that peers reach this process at. config: the section's options, as `@service(config=...)` or the built-in
    schema declares them, else a dict.
    process, copies: which one of how many processes of this service on this node, from 1. listen_fd: a bound socket
    for clients, of the supervisor, which the copies and their successors share; None for one that opens its own.
    join_command: starts this service on one more node. stalls: of this process's predecessors.
    settings: of the deployment, which the process follows. origins: where each option of config was written.
    announce_again: see `show_adapters`.
    handed_over: set before the on_drain hooks run: others accept clients from the socket, now or soon.
    client, discovery, lease, directory and network are shared by the services of one process; server, instance_id and
    tasks are this instance's own. tasks are cancelled after the on_stop hooks.
    rng: this instance's source of randomness. clocks: what time it is for people; intervals are the event loop's.
    """

    service: str
    namespace: str
    instance_id: InstanceId
    host: str
    config: Any
    client: TransportClient
    server: TransportServer
    discovery: Discovery
    lease: Lease
    directory: InstanceDirectory
    network: InProcessNetwork
    tasks: TaskOwner
    rng: Random
    settings: LiveSettings
    open_queue: Callable[[str], JobQueue] = field(repr=False)
    look_into: Callable[[str], Awaitable[Neighbour]] = field(repr=False)
    on_fail: Callable[[str], None] = field(repr=False)
    on_leave: Callable[[str], None] = field(repr=False)
    on_serving: Callable[[Serving], None] = field(repr=False)
    on_stalled: Callable[[str], None] = field(repr=False)
    fields: InfoFields
    origins: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    clocks: Clocks = time
    process: int = 1
    copies: int = 1
    listen_fd: int | None = None
    join_command: str = ""
    stalls: int = 0
    handed_over: bool = False
    num_open: Callable[[], int] = field(default=lambda: 0, repr=False)
    stop_following: Callable[[], Awaitable[None]] | None = field(default=None, repr=False)
    announce_again: Callable[[], Awaitable[None]] = field(default=_nothing, repr=False)

    def queue(self, name: str) -> JobQueue:
        """The deployment's queue of that name; the same object for the same name. Closed with the process."""
        return self.open_queue(name)

    async def neighbours(self, namespaces: Sequence[str]) -> list[Neighbour]:
        """Other namespaces of this control plane, in that order and once each; our own is left out. Closed with the
        process. Raises ConfigError for one that may not be looked into."""
        return [await self.look_into(name) for name in dict.fromkeys(namespaces) if name != self.namespace]

    def follow_setting(self, name: str, option: str, apply: Callable[[Any], None]) -> None:
        """Have a setting of the deployment (`core.settings`) applied here, now and whenever it changes.

        option: of this service's section, which counts while the setting is not set. apply: given each new value, and
        before this returns if it is not what is configured; must not raise."""
        self.settings.follow(name, getattr(self.config, option), self.origins.get(option, "default"), apply)

    def info_fields(
        self, *, model: str | None = None, engine: EngineInfo | None = None, role: str | None = None
    ) -> None:
        """Say more about this instance; call it in an on_start hook, before the instance is announced."""
        self.fields.model = model if model is not None else self.fields.model
        self.fields.engine = engine if engine is not None else self.fields.engine
        self.fields.role = role if role is not None else self.fields.role

    async def show_adapters(self, adapters: tuple[LoraAdapter, ...]) -> None:
        """Say which LoRA adapters this instance has, at any time; before it is announced this only notes them.

        While discovery cannot be reached the change waits for it."""
        self.fields.adapters = adapters
        await self.announce_again()

    def report_serving(self, url: str, model: str) -> None:
        """Tell the user who started this node that requests for `model` can be finished at `url` from now on."""
        self.on_serving(Serving(url=url, model=model))

    def fail(self, reason: str) -> None:
        """This instance can do no more (a dead engine): leave discovery, stop the process, be started again."""
        self.on_fail(f"{self.service}: {reason}")

    def leave(self, reason: str) -> None:
        """What this instance was part of is gone, through no fault of its own: as `fail`, but it does not count as a
        failure of this process."""
        self.on_leave(f"{self.service}: {reason}")

    def stalled(self, reason: str) -> None:
        """The engine makes no progress and may never answer again: leave discovery and end all calls at once, so that
        they go on elsewhere; then stop, however little of the engine can be stopped, and be started again."""
        self.on_stalled(f"{self.service}: {reason}")

    def counts_open(self, num_open: Callable[[], int]) -> None:
        """Call it in an on_start hook: how a drain tells how much there still is to finish."""
        self.num_open = num_open

    def follow(self, on_stop: Callable[[], Awaitable[None]]) -> None:
        """Call it in an on_start hook: this process works for another instance. It is not announced, takes no calls,
        and none of its on_drain and on_stop hooks run; on_stop is awaited at its end instead."""
        self.stop_following = on_stop

    def info(self, state: InstanceState, *, endpoints: tuple[str, ...], pid: int) -> InstanceInfo:
        return InstanceInfo(
            instance_id=self.instance_id,
            service=self.service,
            role=self.fields.role,
            addresses=tuple(a for a in self.server.addresses if not a.startswith("inproc://")),
            endpoints=endpoints,
            host=self.host,
            pid=pid,
            state=state,
            model=self.fields.model,
            engine=self.fields.engine,
            adapters=self.fields.adapters,
        )
