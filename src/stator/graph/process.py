"""The services of one process, from start to the end of their lease.

The order is the point. Start: connect, take a lease, start each service after those it calls, announce all. End: tell
discovery that we drain, drain, stop, give the lease back, close. When the lease is lost the instance must no longer
act (its peers believe it dead), so that it ends at once and without draining.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any, cast
from uuid import uuid4

from stator.config.decode import Errors
from stator.config.load import Configuration, Section, decode_section, raise_all
from stator.config.schema import WorkerConfig
from stator.discovery.base import Lease
from stator.engines.registry import check_installed
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph import banner
from stator.graph.client import ServiceClient
from stator.graph.context import InfoFields, ServiceContext
from stator.graph.graph import Graph
from stator.graph.instance import RunningService
from stator.graph.network import is_loopback, is_wildcard
from stator.graph.planes import Planes
from stator.graph.protocol import ChildSpec, ExitCode, Ready, Report
from stator.graph.service import ServiceSpec
from stator.graph.sockets import socket_path
from stator.ids import InstanceId
from stator.messages.instances import InstanceState
from stator.runtime.tasks import TaskOwner
from stator.transport import calls
from stator.transport.settings import Identity, Listen

logger = logging.getLogger(__name__)

HUB_RETRY_S = 1.0


class ServiceProcess:
    """Runs the services that `spec` names.

    connect: opens the planes, which `run` closes. report: told what the supervisor should know.
    """

    def __init__(
        self,
        spec: ChildSpec,
        graph: Graph,
        connect: Callable[[], Planes],
        report: Callable[[Report], None],
    ) -> None:
        self._spec = spec
        self._graph = graph
        self._connect = connect
        self._report = report
        self._stopping = asyncio.Event()
        self._failure: str | None = None
        self._left = False
        self._running: dict[str, RunningService] = {}

    def request_stop(self) -> None:
        """Begin to drain; `run` returns when that is done."""
        self._stopping.set()

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            logger.error("stopping: %s", reason)
            self._failure = reason
        self._stopping.set()

    def _leave(self, reason: str) -> None:
        """As `_fail`, for a reason that lies elsewhere: the exit is one that is not counted."""
        if self._failure is None:
            self._left = True
        self._fail(reason)

    async def run(self) -> ExitCode:
        """Raises ConfigError, StatorError or whatever a service's start raises, after everything is closed."""
        sections = self._decode()
        planes = self._connect()
        try:
            await planes.start()
            lease = await self._take_lease(planes)
            if lease is None:
                return ExitCode.OK
            try:
                return await self._serve(planes, lease, sections)
            finally:
                await lease.revoke()
        finally:
            await planes.close()

    async def _take_lease(self, planes: Planes) -> Lease | None:
        """Wait for a hub that cannot be reached: it may be starting, or starting again. None if a stop came first."""
        while True:
            try:
                return await planes.discovery.grant_lease()
            except StatorError as error:
                if error.code is not ErrorCode.INSTANCE_LOST:
                    raise
                logger.warning("waiting for the hub: %s", error)
            if await _first(self._stopping.wait(), asyncio.sleep(HUB_RETRY_S)):
                return None

    def _decode(self) -> dict[str, Section]:
        configuration = Configuration(self._spec.sections, self._spec.source)
        errors = Errors()
        sections: dict[str, Section] = {}
        for name in self._spec.services:
            section = decode_section(name, self._graph.services[name].config_type, configuration, errors, [])
            if section is not None:
                sections[name] = section
        raise_all(errors)
        for section in sections.values():
            if isinstance(section.config, WorkerConfig):
                check_installed(section.config.engine, allow_untested=self._spec.allow_untested_engine)
        return sections

    async def _serve(self, planes: Planes, lease: Lease, sections: dict[str, Section]) -> ExitCode:
        started = False
        try:
            started = await self._until_stopped(lease, self._start(planes, lease, sections))
            if started:
                self._report(Ready())
                await self._until_stopped(lease, self._stopping.wait())
            if started and not lease.lost.is_set() and self._failure is None:
                await self._until_lost(lease, self._drain())
        finally:
            for service in self._running.values():
                await service.stop()
        if lease.lost.is_set():
            logger.error("the lease is lost (the hub did not hear from this process in time); leaving for a new start")
            return ExitCode.FENCED
        if self._left:
            return ExitCode.FENCED
        return ExitCode.OK if self._failure is None else ExitCode.FAILURE

    async def _until_stopped(self, lease: Lease, work: Any) -> bool:
        """Await work; give it up when a stop is asked for or the lease is lost. True: it is done."""
        return await _first(work, self._stopping.wait(), lease.lost.wait())

    async def _until_lost(self, lease: Lease, work: Any) -> bool:
        return await _first(work, lease.lost.wait())

    async def _start(self, planes: Planes, lease: Lease, sections: dict[str, Section]) -> None:
        # Consumers come first in the spec; they start last, and stop first.
        for name in self._spec.services:
            self._running[name] = self._build(self._graph.services[name], planes, lease, sections[name])
        for service in self._running.values():
            await service.context.server.start()
        for service in reversed(self._running.values()):
            await service.start()
        for service in reversed(self._running.values()):
            await service.announce(InstanceState.READY, os.getpid())

    def _build(self, spec: ServiceSpec, planes: Planes, lease: Lease, section: Section) -> RunningService:
        instance_id = InstanceId(f"{spec.name}-{uuid4().hex[:12]}")
        child = self._spec
        identity = Identity(child.namespace, instance_id, spec.role, child.token)
        listen = Listen(
            host=child.host,
            port_range=child.port_range,
            advertise=child.advertise,
            unix_path=self._unix_path(spec, instance_id),
            inproc_name=str(instance_id),
        )
        is_first = spec.name == child.services[0]
        context = ServiceContext(
            service=spec.name,
            namespace=child.namespace,
            instance_id=instance_id,
            host=child.advertise,
            config=section.config,
            client=planes.client,
            server=planes.server(identity, listen),
            discovery=planes.discovery,
            lease=lease,
            directory=planes.directory,
            network=planes.network,
            tasks=TaskOwner(spec.name),
            open_queue=planes.queue,
            on_fail=self._fail,
            on_leave=self._leave,
            on_serving=self._report,
            fields=InfoFields(spec.role),
            process=child.index,
            copies=child.copies if is_first else 1,
            listen_fd=child.listen_fd if is_first else None,
            join_command=banner.join_command(
                spec, child.directory, child.source, self._hub_for_others(), child.namespace
            ),
        )
        instance: object = spec.cls()
        for attribute, (other, linked) in self._graph.resolve(spec).items():
            client = ServiceClient(
                other, linked=linked, client=planes.client, instances=planes.directory, colocated=self._colocated(other)
            )
            setattr(instance, attribute, client)
        return RunningService(spec, context, instance, calls.CallTasks(spec.name))

    def _hub_for_others(self) -> tuple[str, int]:
        """The head's own processes reach the hub at an address that is no use elsewhere."""
        host, port = self._spec.hub
        return (self._spec.advertise if is_loopback(host) or is_wildcard(host) else host), port

    def _unix_path(self, spec: ServiceSpec, instance_id: InstanceId) -> str | None:
        """For what this node's own processes call: services made to be colocated, and copies among each other."""
        child = self._spec
        if child.socket_dir is None or spec.name != child.services[0]:
            return None
        return socket_path(child.socket_dir, instance_id) if spec.colocate or child.copies > 1 else None

    def _colocated(self, spec: ServiceSpec) -> Callable[[], tuple[InstanceId, tuple[str, ...]] | None]:
        def find() -> tuple[InstanceId, tuple[str, ...]] | None:
            running = self._running.get(spec.name)
            return None if running is None else (running.context.instance_id, running.context.server.addresses)

        return find

    async def _drain(self) -> None:
        for service in self._running.values():
            try:
                await service.announce(InstanceState.DRAINING, os.getpid())
            except StatorError as error:
                logger.warning("%s could not say that it drains: %s", service.spec.name, error)
        for service in self._running.values():
            await service.drain()


async def _first(work: Any, *interrupts: Any) -> bool:
    """Await work until an interrupt is done first; then cancel it. Raises what work raised. True: work is done."""
    task = asyncio.ensure_future(work)
    others = [asyncio.ensure_future(interrupt) for interrupt in interrupts]
    try:
        await asyncio.wait([task, *others], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for pending in (task, *others):
            pending.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)


def describe_failure(error: BaseException) -> str:
    """One line for the person who started the node."""
    if isinstance(error, (ConfigError, StatorError)):
        return str(error)
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(describe_failure(e) for e in cast(tuple[BaseException, ...], error.exceptions))
    return f"{type(error).__name__}: {error}"
