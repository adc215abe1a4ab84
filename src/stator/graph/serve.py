"""`stator serve`: load, resolve, validate, plan, start, watch."""

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from stator.config import environment
from stator.config.external import ExternalPlanes
from stator.discovery.hub_client import HubDiscovery
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph import banner, network, token
from stator.graph.children import child_environment
from stator.graph.dead_instances import DeadInstances
from stator.graph.hub_node import running_hub
from stator.graph.interpreter import source_for
from stator.graph.node import Node, ServeOptions, prepare
from stator.graph.placement import FRONTEND, PROCESSOR, ProcessPlan
from stator.graph.planes import open_planes
from stator.graph.protocol import ChildSpec, ExitCode, Serving
from stator.graph.sockets import open_listener, socket_directory
from stator.graph.supervisor import Supervisor, make_specs
from stator.graph.terminal import Terminal, log_to
from stator.ids import InstanceId
from stator.transport.addresses import TcpAddress
from stator.transport.client import RequestPlaneClient
from stator.transport.settings import Identity, Listen

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 60.0
JOIN_RETRY_S = 2.0


async def serve(options: ServeOptions) -> ExitCode:
    """Run a node until it is stopped. Raises ConfigError if it cannot start."""
    terminal = Terminal()
    log_to(terminal, options.namespace)
    try:
        node = prepare(options, for_start=True)
        for notice in node.notices:
            terminal.say(f"stator: {notice}")
        async with _control_plane(options, node, terminal) as plane:
            async with _undertaker(options, node, plane) as dead:
                with contextlib.ExitStack() as resources, contextlib.ExitStack() as listening:
                    specs, listeners = _specs(node, plane, resources, listening)
                    supervisor = _supervisor(node, specs, terminal, plane.public_hub, listening, listeners, dead)
                    return await supervisor.run(serves_clients=_serves_clients(node))
    finally:
        terminal.close()


def _token(options: ServeOptions) -> str:
    if options.join is None:
        return token.find_or_make_token(options.namespace, options.token_file)
    secret = token.find_token(options.namespace, options.token_file)
    if secret is None:
        raise ConfigError(token.missing_token(options.namespace, options.join))
    return secret


@dataclass(frozen=True, slots=True)
class _ControlPlane:
    """hub: its address for this node's processes. public_hub: for other nodes, if the hub is here."""

    token: str
    hub: tuple[str, int] | None = None
    public_hub: tuple[str, int] | None = None


@contextlib.asynccontextmanager
async def _control_plane(options: ServeOptions, node: Node, terminal: Terminal) -> AsyncGenerator[_ControlPlane]:
    if node.external is not None:
        # Not above: who uses a hub need not wait for their import.
        from stator.graph.external import external_control_plane

        given = token.find_given_token(options.token_file)
        async with external_control_plane(node.external, options.namespace, given, terminal) as secret:
            yield _ControlPlane(secret)
        return
    secret = _token(options)
    if node.head is not None:
        await _check_join(options, secret, node.head, terminal)
        yield _ControlPlane(secret, node.head)
        return
    host = options.hub_host or options.host
    listen = Listen(host=host, port=options.hub_port, advertise=node.advertise)
    async with running_hub(options.namespace, secret, listen, node.guests()) as port:
        local = "127.0.0.1" if network.is_wildcard(host) else host
        yield _ControlPlane(secret, (local, port), (node.advertise, port))


@contextlib.asynccontextmanager
async def _undertaker(options: ServeOptions, node: Node, plane: _ControlPlane) -> AsyncGenerator[DeadInstances]:
    planes = open_planes(_identity(options, plane.token), plane.hub, node.external)
    dead = DeadInstances(planes.discovery)
    try:
        yield dead
    finally:
        await dead.close()
        await planes.close()


def _identity(options: ServeOptions, secret: str) -> Identity:
    return Identity(options.namespace, InstanceId(f"node-{uuid4().hex[:12]}"), "supervisor", secret, environment.tls())


async def _check_join(options: ServeOptions, secret: str, head: tuple[str, int], terminal: Terminal) -> None:
    """Wait until the head answers. Raises ConfigError if it refuses us, or does not come up in time."""
    client = RequestPlaneClient(_identity(options, secret))
    discovery = HubDiscovery(client, (str(TcpAddress(*head)),), namespace=options.namespace)
    told = False
    try:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            while True:
                try:
                    await discovery.get("joined")
                    return
                except StatorError as error:
                    if error.code is not ErrorCode.INSTANCE_LOST:
                        raise ConfigError(f"the head at {options.join} refused this node: {error.message}") from None
                    if not told:
                        told = True
                        terminal.say(f"stator: waiting for the head at {options.join}: {error.message}")
                await asyncio.sleep(JOIN_RETRY_S)
    except TimeoutError:
        raise ConfigError(
            f"the head at {options.join} did not answer for {JOIN_TIMEOUT_S:g} s; is it running, and may this host "
            f"reach that port?"
        ) from None
    finally:
        await discovery.close()
        await client.close()


def _specs(
    node: Node,
    plane: _ControlPlane,
    resources: contextlib.ExitStack,
    listening: contextlib.ExitStack,
) -> tuple[list[tuple[ProcessPlan, ChildSpec]], dict[int, socket.socket]]:
    """What the supervisor starts, and the sockets for clients. resources, listening: own the directories and the
    sockets that the processes use."""
    options = node.options
    plans = _with_interpreters(node, resources)
    base = ChildSpec(
        target=options.target,
        directory=str(options.directory),
        services=(),
        index=0,
        namespace=options.namespace,
        hub=plane.hub,
        external=node.external,
        token=plane.token,
        host=options.host,
        advertise=node.advertise,
        port_range=node.port_range,
        sections=node.configuration.sections,
        source=node.configuration.source,
        supervisor_pid=0,
        status_fd=0,
        allow_untested_engine=options.allow_untested_engine,
        grace_s=options.settings.grace_s,
        socket_dir=resources.enter_context(socket_directory()) if node.needs_sockets() else None,
    )
    listeners: dict[str, socket.socket] = {}
    for name in node.shared_listeners():
        config = node.sections[name].config
        listeners[name] = listening.enter_context(open_listener(name, config.host, config.port))
    specs = make_specs(base, plans, {name: listener.fileno() for name, listener in listeners.items()})
    return specs, {listener.fileno(): listener for listener in listeners.values()}


def _with_interpreters(node: Node, resources: contextlib.ExitStack) -> list[ProcessPlan]:
    """The plans, with Stator on the PYTHONPATH of other interpreters that lack it."""
    paths: dict[str, str | None] = {}
    plans: list[ProcessPlan] = []
    for plan in node.plans:
        if (python := plan.args.python) is not None:
            if python not in paths:
                links = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="stator-")))
                environ = child_environment(os.environ, plan.environment)
                paths[python] = source_for(plan.label, python, environ, str(node.options.directory), links)
            if (path := paths[python]) is not None:
                plan = replace(plan, environment={**plan.environment, "PYTHONPATH": path})
        plans.append(plan)
    return plans


def _supervisor(
    node: Node,
    specs: Sequence[tuple[ProcessPlan, ChildSpec]],
    terminal: Terminal,
    public_hub: tuple[str, int] | None,
    listening: contextlib.ExitStack,
    listeners: Mapping[int, socket.socket],
    dead: DeadInstances,
) -> Supervisor:
    options, plans = node.options, node.plans

    def ready(serving: Serving | None) -> None:
        terminal.say(_ready_text(options, node, public_hub, serving))

    if public_hub is not None:
        terminal.say(f"stator: starting {', '.join(plan.label for plan in plans)}; the hub is at {_text(public_hub)}")
        if not _can_finish_alone(node, plans):
            terminal.say("stator: no decode worker is started here; waiting for one to join")
            terminal.say(_join_text(options, node, public_hub))
    elif node.external is not None:
        terminal.say(f"stator: starting {', '.join(plan.label for plan in plans)}; {node.external.shown}")
        if not node.graph.is_component and not _can_finish_alone(node, plans):
            terminal.say("stator: no decode worker is started here; waiting for one to join")
            terminal.say(_exports_text(options, node, node.external))
    # Once stopping, only the processes hold their listening sockets: when they are gone, clients are refused.
    return Supervisor(
        specs,
        terminal,
        options.settings,
        ready,
        listening.close,
        on_unused=lambda descriptor: listeners[descriptor].close(),
        on_dead=dead.bury,
        has_hub=public_hub is not None,
    )


def _serves_clients(node: Node) -> bool:
    return any(node.role(name) == FRONTEND for plan in node.plans for name in plan.services)


def _ready_text(options: ServeOptions, node: Node, public_hub: tuple[str, int] | None, serving: Serving | None) -> str:
    if public_hub is None and (node.external is None or node.graph.is_component):
        where = options.join if node.external is None else node.external.shown
        joined = f"stator: joined {where} (namespace {options.namespace}); Ctrl-C leaves"
        return joined if serving is None else f"{joined}\n{banner.format_serving(serving, node.advertise)}"
    parts = ["", "Stator is ready."]
    if serving is not None:
        parts.append(banner.format_serving(serving, node.advertise))
    if public_hub is not None:
        parts.append(_join_text(options, node, public_hub))
    elif node.external is not None:
        parts.append(_exports_text(options, node, node.external))
    parts += ["  Ctrl-C stops everything.", ""]
    return "\n".join(parts)


def _exports_text(options: ServeOptions, node: Node, external: ExternalPlanes) -> str:
    exports = banner.format_exports(_lines(options, node), external, options.namespace)
    return _with_guests(options, node, None, exports)


def _lines(options: ServeOptions, node: Node) -> Sequence[banner.JoinLine]:
    return options.join_lines or banner.join_lines(node.graph, options.directory, options.config, options.overrides)


def _join_text(options: ServeOptions, node: Node, hub: tuple[str, int]) -> str:
    lines = _lines(options, node)
    place = token.place_of_token(options.namespace, options.token_file)
    return _with_guests(options, node, hub, banner.format_join(lines, hub, options.namespace, place))


def _with_guests(options: ServeOptions, node: Node, hub: tuple[str, int] | None, text: str) -> str:
    processor = next((spec.name for spec in node.graph.services.values() if spec.role == PROCESSOR), None)
    target = "TARGET" if processor is None else f"{options.target.partition(':')[0]}:{processor}"
    token_file = None
    if environment.token() is None:
        token_file = options.token_file or token.default_token_file(options.namespace)
    guests = banner.format_guests(node.guests(), target, hub, token_file)
    return "\n".join(part for part in (text, guests) if part)


def _text(address: tuple[str, int]) -> str:
    return f"{network.url_host(address[0])}:{address[1]}"


def _can_finish_alone(node: Node, plans: Sequence[ProcessPlan]) -> bool:
    roles = {spec.role for spec in node.graph.services.values()}
    planned = {node.graph.services[name].role for plan in plans for name in plan.services}
    return "decode" not in roles or "decode" in planned
