"""`stator serve`: load, resolve, validate, plan, start, watch."""

import asyncio
import contextlib
import logging
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from stator.config import environment
from stator.discovery.hub_client import HubDiscovery
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph import banner, network, token
from stator.graph.children import child_environment
from stator.graph.interpreter import source_for
from stator.graph.node import Node, ServeOptions, prepare
from stator.graph.placement import FRONTEND, ProcessPlan
from stator.graph.protocol import ChildSpec, ExitCode, Serving
from stator.graph.sockets import open_listener, socket_directory
from stator.graph.supervisor import Supervisor, make_specs
from stator.graph.terminal import Terminal
from stator.hub.server import Hub
from stator.ids import InstanceId
from stator.observability.logs import setup_logging
from stator.transport.addresses import TcpAddress, parse_address
from stator.transport.client import RequestPlaneClient
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 60.0
JOIN_RETRY_S = 2.0


async def serve(options: ServeOptions) -> ExitCode:
    """Run a node until it is stopped. Raises ConfigError if it cannot start."""
    # What a hub has to say about its leases is not for the terminal of a node, unless it is asked for.
    setup_logging("stator", options.namespace, environ={"STATOR_LOG_LEVEL": "WARNING", **os.environ})
    terminal = Terminal()
    try:
        node = prepare(options, for_start=True)
        for notice in node.notices:
            terminal.say(f"stator: {notice}")
        secret = _token(options)
        async with _control_plane(options, node, secret, terminal) as (hub, public_hub):
            with contextlib.ExitStack() as resources, contextlib.ExitStack() as listening:
                specs = _specs(node, secret, hub, resources, listening)
                # From then on only the processes hold their listening sockets: when they are gone, clients are refused.
                supervisor = _supervisor(node, specs, terminal, public_hub, on_stopping=listening.close)
                return await supervisor.run(serves_clients=_serves_clients(node))
    finally:
        terminal.close()


def _token(options: ServeOptions) -> str:
    secret = token.find_token(options.namespace, options.token_file)
    if secret is not None:
        return secret
    if options.join is not None:
        raise ConfigError(token.missing_token(options.namespace, options.join))
    return token.make_token(options.namespace)


def _token_place(options: ServeOptions) -> str:
    if environment.token() is not None:
        return "set the same STATOR_TOKEN there"
    path = options.token_file or token.default_token_file(options.namespace)
    return f"copy {path} to the same place there, or give it with --token-file"


def _port(addresses: Sequence[str]) -> int:
    return next(a.port for a in map(parse_address, addresses) if isinstance(a, TcpAddress))


@contextlib.asynccontextmanager
async def _control_plane(
    options: ServeOptions, node: Node, secret: str, terminal: Terminal
) -> AsyncGenerator[tuple[tuple[str, int], tuple[str, int] | None]]:
    """The hub's address for this node's processes, and for other nodes if the hub is here."""
    if node.head is not None:
        await _check_join(options, secret, node.head, terminal)
        yield node.head, None
        return
    host = options.hub_host or options.host
    identity = Identity(options.namespace, InstanceId(f"hub-{uuid4().hex[:12]}"), "hub", secret)
    server = RequestPlaneServer(identity, Listen(host=host, port=options.hub_port, advertise=node.advertise))
    hub = Hub(server)
    try:
        await server.start()
    except ConfigError as error:
        raise ConfigError(
            f"the hub: {error}. If another head runs on this host, stop it, or choose another port with --hub-port "
            f"(0 takes a free one)"
        ) from None
    try:
        port = _port(server.addresses)
        local = "127.0.0.1" if network.is_wildcard(host) else host
        yield (local, port), (node.advertise, port)
    finally:
        await hub.close()
        await server.close()


async def _check_join(options: ServeOptions, secret: str, head: tuple[str, int], terminal: Terminal) -> None:
    """Wait until the head answers. Raises ConfigError if it refuses us, or does not come up in time."""
    identity = Identity(options.namespace, InstanceId(f"join-{uuid4().hex[:12]}"), "supervisor", secret)
    client = RequestPlaneClient(identity)
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
    secret: str,
    hub: tuple[str, int],
    resources: contextlib.ExitStack,
    listening: contextlib.ExitStack,
) -> list[tuple[ProcessPlan, ChildSpec]]:
    """What the supervisor starts. resources, listening: own the directories and the sockets that the processes use."""
    options = node.options
    plans = _with_interpreters(node, resources)
    base = ChildSpec(
        target=options.target,
        directory=str(options.directory),
        services=(),
        index=0,
        namespace=options.namespace,
        hub=hub,
        token=secret,
        host=options.host,
        advertise=node.advertise,
        port_range=node.port_range,
        sections=node.configuration.sections,
        source=node.configuration.source,
        supervisor_pid=0,
        status_fd=0,
        allow_untested_engine=options.allow_untested_engine,
        socket_dir=resources.enter_context(socket_directory()) if node.needs_sockets() else None,
    )
    listeners: dict[str, int] = {}
    for name in node.shared_listeners():
        config = node.sections[name].config
        listeners[name] = listening.enter_context(open_listener(name, config.host, config.port)).fileno()
    return make_specs(base, plans, listeners)


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
    on_stopping: Callable[[], None],
) -> Supervisor:
    options, plans = node.options, node.plans

    def ready(serving: Serving | None) -> None:
        terminal.say(_ready_text(options, node, public_hub, serving))

    if public_hub is not None:
        terminal.say(f"stator: starting {', '.join(plan.label for plan in plans)}; the hub is at {_text(public_hub)}")
        if not _can_finish_alone(node, plans):
            terminal.say("stator: no decode worker is started here; waiting for one to join")
            terminal.say(_join_text(options, node, public_hub))
    return Supervisor(specs, terminal, options.settings, ready, on_stopping)


def _serves_clients(node: Node) -> bool:
    return any(node.role(name) == FRONTEND for plan in node.plans for name in plan.services)


def _ready_text(options: ServeOptions, node: Node, public_hub: tuple[str, int] | None, serving: Serving | None) -> str:
    if public_hub is None:
        return f"stator: joined {options.join} (namespace {options.namespace}); Ctrl-C leaves"
    parts = ["", "Stator is ready."]
    if serving is not None:
        parts.append(banner.format_serving(serving, node.advertise))
    parts.append(_join_text(options, node, public_hub))
    parts += ["  Ctrl-C stops everything.", ""]
    return "\n".join(parts)


def _join_text(options: ServeOptions, node: Node, hub: tuple[str, int]) -> str:
    lines = options.join_lines or banner.join_lines(node.graph, options.directory, options.config, options.overrides)
    return banner.format_join(lines, hub, options.namespace, _token_place(options))


def _text(address: tuple[str, int]) -> str:
    return f"{network.url_host(address[0])}:{address[1]}"


def _can_finish_alone(node: Node, plans: Sequence[ProcessPlan]) -> bool:
    roles = {spec.role for spec in node.graph.services.values()}
    planned = {node.graph.services[name].role for plan in plans for name in plan.services}
    return "decode" not in roles or "decode" in planned
