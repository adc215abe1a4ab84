"""`stator serve`: load, resolve, validate, plan, start, watch."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from stator.config import environment
from stator.config.decode import Errors
from stator.config.load import Configuration, Section, decode_section, load_configuration, raise_all
from stator.discovery.hub_client import HubDiscovery
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph import banner, network, token
from stator.graph.graph import Graph, build_graph
from stator.graph.placement import ProcessPlan, plan_processes
from stator.graph.protocol import ChildSpec, ExitCode, Serving
from stator.graph.supervisor import Settings, Supervisor, make_specs
from stator.graph.targets import load_target
from stator.graph.terminal import Terminal
from stator.hub.server import Hub
from stator.ids import InstanceId
from stator.observability.logs import setup_logging
from stator.transport.addresses import TcpAddress, parse_address
from stator.transport.client import RequestPlaneClient
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

logger = logging.getLogger(__name__)

DEFAULT_HUB_PORT = 7440
JOIN_TIMEOUT_S = 60.0
JOIN_RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says. join_lines: how others join, if not by the graph's own components."""

    target: str
    directory: Path
    config: Path | None = None
    overrides: Sequence[tuple[str, str]] = ()
    namespace: str = banner.DEFAULT_NAMESPACE
    join: str | None = None
    token_file: Path | None = None
    host: str = "0.0.0.0"
    advertise: str | None = None
    port_range: str | None = None
    hub_host: str | None = None
    hub_port: int = DEFAULT_HUB_PORT
    join_lines: tuple[banner.JoinLine, ...] = ()
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class _Node:
    """Everything that was checked before anything is started."""

    graph: Graph
    configuration: Configuration
    sections: dict[str, Section]
    head: tuple[str, int] | None
    advertise: str
    port_range: tuple[int, int] | None
    token: str
    token_place: str


async def serve(options: ServeOptions) -> ExitCode:
    """Run a node until it is stopped. Raises ConfigError if it cannot start."""
    # What a hub has to say about its leases is not for the terminal of a node, unless it is asked for.
    setup_logging("stator", options.namespace, environ={"STATOR_LOG_LEVEL": "WARNING", **os.environ})
    terminal = Terminal()
    try:
        node = _prepare(options, terminal)
        async with _control_plane(options, node, terminal) as (hub, public_hub):
            return await _run(options, node, terminal, hub, public_hub)
    finally:
        terminal.close()


def _prepare(options: ServeOptions, terminal: Terminal) -> _Node:
    token.check_namespace(options.namespace)
    graph = build_graph(load_target(options.target, options.directory))
    _check_control_plane(options, graph, terminal)
    configuration, sections, notices = _sections(options, graph)
    for notice in notices:
        terminal.say(f"stator: {notice}")
    head = None if options.join is None else network.parse_host_port(options.join, DEFAULT_HUB_PORT, "--join")
    secret = token.find_token(options.namespace, options.token_file)
    if secret is None:
        if options.join is not None:
            raise ConfigError(token.missing_token(options.namespace, options.join))
        secret = token.make_token(options.namespace)
    return _Node(
        graph,
        configuration,
        sections,
        head,
        network.advertised_address(options.host, options.advertise, head),
        None if options.port_range is None else network.parse_port_range(options.port_range),
        secret,
        _token_place(options),
    )


def _sections(options: ServeOptions, graph: Graph) -> tuple[Configuration, dict[str, Section], list[str]]:
    path = None if options.config is None else options.directory / options.config
    configuration = load_configuration(path, options.overrides, list(graph.services), shown_as=str(options.config))
    errors = Errors()
    notices = list(configuration.notices)
    sections: dict[str, Section] = {}
    for name, spec in graph.services.items():
        section = decode_section(name, spec.config_type, configuration, errors, notices)
        if section is not None:
            sections[name] = section
    raise_all(errors)
    return configuration, sections, list(dict.fromkeys(notices))


def _check_control_plane(options: ServeOptions, graph: Graph, terminal: Terminal) -> None:
    if options.join is not None:
        return
    values = dict(zip(("NATS_SERVER", "ETCD_ENDPOINTS"), environment.external_control_plane(), strict=True))
    present = [name for name, value in values.items() if value]
    missing = [name for name, value in values.items() if not value]
    later = "NATS and etcd as external services come with a later version"
    if not graph.is_component:
        if present:
            terminal.say(f"stator: {' and '.join(present)} not used: {later}; this head runs its own hub")
        return
    name = graph.root.name
    joins = f"{name} is a component target: it joins a running deployment and starts only itself"
    if not missing:
        raise ConfigError(f"{joins}. {later}; give --join HEAD:{DEFAULT_HUB_PORT} (the head prints the line)")
    if present:
        raise ConfigError(
            f"{joins}. {present[0]} is set, but {missing[0]} is not: set both, or give --join HEAD:{DEFAULT_HUB_PORT}"
        )
    raise ConfigError(
        f"{joins}. Give --join HEAD:{DEFAULT_HUB_PORT} (the head prints the line), or set NATS_SERVER and "
        f"ETCD_ENDPOINTS; to start a deployment here, serve a graph, for instance graphs.agg_router:Frontend"
    )


def _token_place(options: ServeOptions) -> str:
    if environment.token() is not None:
        return "set the same STATOR_TOKEN there"
    path = options.token_file or token.default_token_file(options.namespace)
    return f"copy {path} to the same place there, or give it with --token-file"


def _port(addresses: Sequence[str]) -> int:
    return next(a.port for a in map(parse_address, addresses) if isinstance(a, TcpAddress))


@contextlib.asynccontextmanager
async def _control_plane(
    options: ServeOptions, node: _Node, terminal: Terminal
) -> AsyncGenerator[tuple[tuple[str, int], tuple[str, int] | None]]:
    """The hub's address for this node's processes, and for other nodes if the hub is here."""
    if node.head is not None:
        await _check_join(options, node, node.head, terminal)
        yield node.head, None
        return
    host = options.hub_host or options.host
    identity = Identity(options.namespace, InstanceId(f"hub-{uuid4().hex[:12]}"), "hub", node.token)
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


async def _check_join(options: ServeOptions, node: _Node, head: tuple[str, int], terminal: Terminal) -> None:
    """Wait until the head answers. Raises ConfigError if it refuses us, or does not come up in time."""
    identity = Identity(options.namespace, InstanceId(f"join-{uuid4().hex[:12]}"), "supervisor", node.token)
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


async def _run(
    options: ServeOptions, node: _Node, terminal: Terminal, hub: tuple[str, int], public_hub: tuple[str, int] | None
) -> ExitCode:
    base = ChildSpec(
        target=options.target,
        directory=str(options.directory),
        services=(),
        index=0,
        namespace=options.namespace,
        hub=hub,
        token=node.token,
        host=options.host,
        advertise=node.advertise,
        port_range=node.port_range,
        sections=node.configuration.sections,
        source=node.configuration.source,
        supervisor_pid=0,
        status_fd=0,
    )
    plans = plan_processes(node.graph, node.sections)
    if not plans:
        raise ConfigError(f"{options.target}: every service has ServiceArgs.workers 0; there is nothing to start")
    has_frontend = any(node.graph.services[name].role == "frontend" for plan in plans for name in plan.services)

    def ready(serving: Serving | None) -> None:
        terminal.say(_ready_text(options, node, public_hub, serving))

    if public_hub is not None:
        terminal.say(f"stator: starting {', '.join(plan.label for plan in plans)}; the hub is at {_text(public_hub)}")
        if not _can_finish_alone(node, plans):
            terminal.say("stator: no decode worker is started here; waiting for one to join")
            terminal.say(_join_text(options, node, public_hub))
    supervisor = Supervisor(make_specs(base, plans), terminal, options.settings, ready)
    return await supervisor.run(serves_clients=has_frontend)


def _ready_text(options: ServeOptions, node: _Node, public_hub: tuple[str, int] | None, serving: Serving | None) -> str:
    if public_hub is None:
        return f"stator: joined {options.join} (namespace {options.namespace}); Ctrl-C leaves"
    parts = ["", "Stator is ready."]
    if serving is not None:
        parts.append(banner.format_serving(serving, node.advertise))
    parts.append(_join_text(options, node, public_hub))
    parts += ["  Ctrl-C stops everything.", ""]
    return "\n".join(parts)


def _join_text(options: ServeOptions, node: _Node, hub: tuple[str, int]) -> str:
    lines = options.join_lines or banner.join_lines(node.graph, options.directory, options.config, options.overrides)
    return banner.format_join(lines, hub, options.namespace, node.token_place)


def _text(address: tuple[str, int]) -> str:
    return f"{network.url_host(address[0])}:{address[1]}"


def _can_finish_alone(node: _Node, plans: Sequence[ProcessPlan]) -> bool:
    roles = {spec.role for spec in node.graph.services.values()}
    planned = {node.graph.services[name].role for plan in plans for name in plan.services}
    return "decode" not in roles or "decode" in planned
