"""The services of one process, from start to the end of their lease.

The order is the point. Start: connect, take a lease, start each service after those it calls, announce all. End: tell
discovery that we drain, drain, stop, give the lease back, close; the same whether a signal or a call of
`instance.drain` asked for it. When the lease is lost the instance must no longer act (its peers believe it dead), so
that it ends at once and without draining; and so does one whose engine hangs, which gives its lease back first.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from random import Random, SystemRandom
from types import MappingProxyType
from typing import Any, cast

from stator.config import environment
from stator.config.decode import Errors
from stator.config.load import Configuration, Section, decode_section, raise_all
from stator.config.provenance import option_origins
from stator.config.schema import WorkerConfig
from stator.discovery.base import Lease
from stator.engines.registry import check_installed
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph import banner
from stator.graph.client import ServiceClient
from stator.graph.context import InfoFields, ServiceContext
from stator.graph.draining import DrainDesk
from stator.graph.graph import Graph
from stator.graph.instance import RunningService
from stator.graph.network import is_loopback, is_wildcard
from stator.graph.pause import PauseWatch
from stator.graph.planes import Planes
from stator.graph.protocol import SUCCESSOR_TIMEOUT_S, Announcing, ChildSpec, ExitCode, Hung, Leaving, Ready, Report
from stator.graph.service import ServiceSpec
from stator.graph.sockets import socket_path
from stator.ids import InstanceId
from stator.messages.instances import DrainPhase, DrainRequest, InstanceState, SettingState, instance_key
from stator.runtime.context import Clocks, loop_time
from stator.runtime.settings import LiveSettings
from stator.runtime.tasks import TaskOwner
from stator.transport import calls
from stator.transport.settings import Identity, Listen

logger = logging.getLogger(__name__)

HUB_RETRY_S = 1.0

SETTINGS_TIMEOUT_S = 2.0
"""For the store to tell the deployment's settings, before services start with what they are configured with."""

SETTLE_S = 0.25
"""For callers to learn that an instance drains: what they send until then is taken, and finished."""

DRAIN_SHARE = 0.8
"""Of the grace after a signal: the rest is for ending what is left, so that it goes on elsewhere, and for the stop."""

HUNG_STOP_S = 3.0
"""For whatever of a hung engine's process can be stopped."""

STOP_TIMEOUT_S = 45.0
"""For all on_stop hooks together; what takes longer is left to the end of the process."""


class ServiceProcess:
    """Runs the services that `spec` names.

    connect: opens the planes, which `run` closes. report: told what the supervisor should know. left_behind: something
    could not be stopped in time, such as a thread; the process must not wait for it. clock: see PauseWatch. rng: what
    instance ids and the services' randomness come from, by default the system. clocks, pid: by default the machine's.
    """

    def __init__(
        self,
        spec: ChildSpec,
        graph: Graph,
        connect: Callable[[], Planes],
        report: Callable[[Report], None],
        *,
        rng: Random | None = None,
        clocks: Clocks = time,
        pid: int | None = None,
        clock: Callable[[], float] = loop_time,
    ) -> None:
        self._spec = spec
        self._graph = graph
        self._connect = connect
        self._clock = clock
        self._pause: PauseWatch | None = None
        self._report = report
        self._rng = rng if rng is not None else SystemRandom()
        self._clocks = clocks
        self._pid = os.getpid() if pid is None else pid
        self._stopping = asyncio.Event()
        self._failure: str | None = None
        self._left = False
        self._hung = False
        self.left_behind = False
        self._running: dict[str, RunningService] = {}
        self._settings: LiveSettings | None = None
        self._desk = DrainDesk(
            num_open=self._num_open, begin=self._begin_drain, stalls=spec.stalls, settings=self._setting_states
        )
        self._drain_limit: asyncio.Timeout | None = None
        self._successor_late: asyncio.TimerHandle | None = None

    @property
    def running(self) -> Mapping[str, RunningService]:
        """The services by name, once they are made."""
        return MappingProxyType(self._running)

    def request_stop(self) -> None:
        """Begin to drain; `run` returns when that is done. While a longer drain is under way, it gets no longer than
        the grace from now on."""
        self._stopping.set()
        if (limit := self._drain_limit) is not None and (when := limit.when()) is not None and not limit.expired():
            limit.reschedule(min(when, loop_time() + self._spec.grace_s * DRAIN_SHARE))

    def resumed(self) -> None:
        """The process goes on after it was stopped. May be called from a signal handler."""
        if self._pause is not None:
            self._pause.look()

    def _stood_still(self, seconds: float) -> None:
        for service in self._running.values():
            service.context.server.mute()
        self._leave(f"this process stood still for {seconds:.1f} s, as long as a lease lasts; others take it for dead")

    def _begin_drain(self, request: DrainRequest) -> None:
        who = ", ".join(self._running)
        logger.info("%s asked to drain%s", who, " and to be started again" if request.restart else "")
        if not (request.restart and self._spec.overlaps):
            self._stopping.set()
            return
        self._desk.show(DrainPhase.SUCCESSOR)
        self._successor_late = asyncio.get_running_loop().call_later(SUCCESSOR_TIMEOUT_S, self._no_successor)
        self._report(Leaving())

    def _no_successor(self) -> None:
        if self._stopping.is_set():
            return
        message = f"{self._spec.label} goes on: what was to take its place was not ready in {SUCCESSOR_TIMEOUT_S:g} s"
        logger.error("%s", message)
        self._desk.refuse(StatorError(ErrorCode.DEADLINE, f"{message}; the log of its node has the reason"))

    def _num_open(self) -> int:
        return sum(service.context.num_open() for service in self._running.values())

    def _setting_states(self) -> tuple[SettingState, ...]:
        return () if self._settings is None else self._settings.states()

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            logger.error("stopping: %s", reason)
            self._failure = reason
        self._stopping.set()

    def _stalled(self, reason: str) -> None:
        self._hung = True
        self._report(Hung(reason))
        self._fail(reason)

    def _leave(self, reason: str) -> None:
        """As `_fail`, for a reason that lies elsewhere: the exit is one that is not counted."""
        if self._failure is None:
            self._left = True
        self._fail(reason)

    async def run(self) -> ExitCode:
        """Raises ConfigError, StatorError or whatever a service's start raises, after everything is closed."""
        sections = self._decode()
        planes = self._connect()
        # Draws from rng only when a store has lost its state.
        settings = self._settings = LiveSettings(planes.discovery, self._rng)
        try:
            await planes.start()
            settings.start()
            lease = await self._take_lease(planes)
            if lease is None:
                return ExitCode.OK
            try:
                return await self._serve(planes, lease, sections)
            finally:
                await lease.revoke()
        finally:
            await settings.close()
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
        self._pause = PauseWatch(lease.ttl_s, self._stood_still, self._clock)
        self._pause.start()
        try:
            started = await self._until_stopped(lease, self._start(planes, lease, sections))
            if started:
                self._report(Ready())
                await self._until_stopped(lease, self._stopping.wait())
            if started and not lease.lost.is_set() and self._failure is None:
                await self._until_lost(lease, self._drain())
        finally:
            if self._successor_late is not None:
                self._successor_late.cancel()
            self._pause.close()
            self._desk.close()
            if self._hung:
                await self._break_off(lease)
            await self._stop_services(HUNG_STOP_S if self._hung else STOP_TIMEOUT_S)
        if self._hung:
            return ExitCode.STALLED
        if lease.lost.is_set():
            logger.error("the lease is lost (the hub did not hear from this process in time); leaving for a new start")
            return ExitCode.FENCED
        if self._left:
            return ExitCode.FENCED
        if self._failure is not None:
            return ExitCode.FAILURE
        if (request := self._desk.request) is not None:
            return ExitCode.RESTART if request.restart else ExitCode.DRAINED
        return ExitCode.OK

    async def _until_stopped(self, lease: Lease, work: Any) -> bool:
        """Await work; give it up when a stop is asked for or the lease is lost. True: it is done."""
        return await _first(work, self._stopping.wait(), lease.lost.wait())

    async def _until_lost(self, lease: Lease, work: Any) -> bool:
        return await _first(work, lease.lost.wait())

    async def _start(self, planes: Planes, lease: Lease, sections: dict[str, Section]) -> None:
        assert self._settings is not None
        await self._settings.wait_synced(SETTINGS_TIMEOUT_S)
        # Consumers come first in the spec; they start last, and stop first.
        for name in self._spec.services:
            self._running[name] = self._build(self._graph.services[name], planes, lease, sections[name], self._settings)
        keys = (instance_key(name, service.context.instance_id) for name, service in self._running.items())
        self._report(Announcing(tuple(keys)))
        for service in self._running.values():
            await service.context.server.start()
        for service in reversed(self._running.values()):
            await service.start()
        for service in reversed(self._running.values()):
            await self._announce(service)

    async def _announce(self, service: RunningService) -> None:
        try:
            await service.announce(InstanceState.READY, self._pid)
        except StatorError as error:
            if error.code is not ErrorCode.INSTANCE_LOST:
                raise
            # A start may have taken minutes. What was put under the lease reaches the hub with its next renewal.
            logger.warning("%s is shown to others when the hub is back: %s", service.spec.name, error)

    def _build(
        self, spec: ServiceSpec, planes: Planes, lease: Lease, section: Section, settings: LiveSettings
    ) -> RunningService:
        instance_id = InstanceId(f"{spec.name}-{self._rng.getrandbits(48):012x}")
        child = self._spec
        identity = Identity(child.namespace, instance_id, spec.role, child.token, environment.tls())
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
            rng=Random(self._rng.getrandbits(64)),
            settings=settings,
            origins=option_origins(spec.name, section, Configuration(child.sections, child.source)),
            clocks=self._clocks,
            open_queue=planes.queue,
            look_into=planes.neighbour,
            on_fail=self._fail,
            on_leave=self._leave,
            on_serving=self._report,
            on_stalled=self._stalled,
            fields=InfoFields(spec.role),
            process=child.index,
            copies=child.copies if is_first else 1,
            listen_fd=child.listen_fd if is_first else None,
            stalls=child.stalls,
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
        for endpoint in self._desk.endpoints():
            context.server.register(endpoint)
        return RunningService(spec, context, instance, calls.CallTasks(spec.name))

    def _hub_for_others(self) -> tuple[str, int] | None:
        """The head's own processes reach the hub at an address that is no use elsewhere. None: there is no hub."""
        if self._spec.hub is None:
            return None
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
        """One path for a signal and for a call of `instance.drain`; a bound on all of it, after which `stop` ends what
        is left."""
        request = self._desk.request
        limit_s = self._spec.grace_s * DRAIN_SHARE if request is None else request.timeout_s
        others = request is not None and (request.restart or self._spec.copies > 1)
        for service in self._running.values():
            service.context.handed_over = others
        self._desk.show(DrainPhase.DRAINING)
        outcome = DrainPhase.DRAINED
        try:
            async with asyncio.timeout(limit_s) as self._drain_limit:
                await asyncio.gather(*(self._say_draining(service) for service in self._running.values()))
                await asyncio.sleep(SETTLE_S)
                for service in self._running.values():
                    await service.drain()
        except TimeoutError:
            outcome = DrainPhase.CUT_OFF
            logger.warning("%s still has %d open after its time to drain", self._spec.label, self._num_open())
        self._drain_limit = None
        self._desk.show(outcome)

    async def _say_draining(self, service: RunningService) -> None:
        try:
            await service.announce(InstanceState.DRAINING, self._pid)
        except StatorError as error:
            logger.warning("%s could not say that it drains: %s", service.spec.name, error)

    async def _break_off(self, lease: Lease) -> None:
        """End every call and the lease, at once, so that requests go on elsewhere."""
        closing = (service.context.server.close() for service in self._running.values())
        try:
            async with asyncio.timeout(HUNG_STOP_S):
                await asyncio.gather(lease.revoke(), *closing, return_exceptions=True)
        except TimeoutError:
            logger.warning("discovery did not hear that %s leaves; its lease will end", self._spec.label)

    async def _stop_services(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                for service in self._running.values():
                    await service.stop()
        except TimeoutError:
            self.left_behind = True
            logger.warning("%s: not everything could be stopped within %g s", self._spec.label, timeout_s)


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
