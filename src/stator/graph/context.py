"""What a running service is given: its identity, its configuration and the planes."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from stator.discovery.base import Discovery, Lease
from stator.graph.protocol import Serving
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo
from stator.messages.instances import InstanceInfo, InstanceState
from stator.queue.base import JobQueue
from stator.runtime.directory import InstanceDirectory
from stator.runtime.tasks import TaskOwner
from stator.transport.base import TransportClient, TransportServer
from stator.transport.inprocess import InProcessNetwork


@dataclass(slots=True)
class InfoFields:
    """The part of InstanceInfo that a service decides."""

    role: str
    model: str | None = None
    engine: EngineInfo | None = None


@dataclass(slots=True)
class ServiceContext:
    """Given to on_start hooks; valid until the service's last on_stop hook has returned.

    host: that peers reach this process at. config: the section's options, as `@service(config=...)` or the built-in
    schema declares them, else a dict.
    process, copies: which one of how many processes of this service on this node, from 1. listen_fd: a bound socket
    for clients that the copies share; None if there is one, which opens its own.
    join_command: starts this service on one more node.
    client, discovery, lease, directory and network are shared by the services of one process; server, instance_id and
    tasks are this instance's own. tasks are cancelled after the on_stop hooks.
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
    open_queue: Callable[[str], JobQueue] = field(repr=False)
    on_fail: Callable[[str], None] = field(repr=False)
    on_leave: Callable[[str], None] = field(repr=False)
    on_serving: Callable[[Serving], None] = field(repr=False)
    fields: InfoFields
    process: int = 1
    copies: int = 1
    listen_fd: int | None = None
    join_command: str = ""
    stop_following: Callable[[], Awaitable[None]] | None = field(default=None, repr=False)

    def queue(self, name: str) -> JobQueue:
        """The deployment's queue of that name; the same object for the same name. Closed with the process."""
        return self.open_queue(name)

    def info_fields(
        self, *, model: str | None = None, engine: EngineInfo | None = None, role: str | None = None
    ) -> None:
        """Say more about this instance; call it in an on_start hook, before the instance is announced."""
        self.fields.model = model if model is not None else self.fields.model
        self.fields.engine = engine if engine is not None else self.fields.engine
        self.fields.role = role if role is not None else self.fields.role

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
        )
