"""The hub of a deployment: in the head's supervisor, or alone with `stator hub`.

Alone it lets every node that serves be restarted by itself. It holds nothing that the deployment cannot tell it again,
so that it may be restarted under load as well.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from stator.config import environment
from stator.errors import ConfigError
from stator.graph import banner, network, token
from stator.graph.protocol import ExitCode
from stator.graph.terminal import Terminal, log_to
from stator.hub.server import Hub
from stator.ids import InstanceId
from stator.transport.addresses import TcpAddress, parse_address
from stator.transport.refusals import HUB_ROLE
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

JOINING = (
    ("graph", "graphs.disagg_router:Frontend"),
    ("prefill worker", "components.prefill_worker:PrefillWorker"),
    ("decode worker", "components.worker:VllmWorker"),
)


@dataclass(frozen=True, slots=True)
class HubOptions:
    """What the command line says. also: namespaces whose graphs may join as well."""

    namespace: str
    token_file: Path | None
    host: str
    port: int
    advertise: str | None
    also: tuple[str, ...] = ()


@contextlib.asynccontextmanager
async def running_hub(namespace: str, secret: str, listen: Listen, also: Collection[str] = ()) -> AsyncGenerator[int]:
    """The port it listens on. also: namespaces besides its own. Raises ConfigError if it cannot."""
    instance_id = InstanceId(f"hub-{uuid4().hex[:12]}")
    identity = Identity(namespace, instance_id, HUB_ROLE, secret, environment.tls(), frozenset(also))
    server = RequestPlaneServer(identity, listen)
    hub = Hub(server)
    try:
        await server.start()
    except ConfigError as error:
        raise ConfigError(
            f"the hub: {error}. If another head runs on this host, stop it, or choose another port with --hub-port "
            f"(0 takes a free one)"
        ) from None
    try:
        yield _port(server.addresses)
    finally:
        await hub.close()
        await server.close()


async def run_hub(options: HubOptions) -> ExitCode:
    """Run a hub until SIGINT or SIGTERM. Raises ConfigError if it cannot start."""
    token.check_namespace(options.namespace)
    for other in options.also:
        token.check_namespace(other, "--also")
    terminal = Terminal()
    log_to(terminal, options.namespace)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        secret = token.find_or_make_token(options.namespace, options.token_file)
        advertise = network.advertised_address(options.host, options.advertise, None)
        listen = Listen(host=options.host, port=options.port, advertise=advertise)
        async with running_hub(options.namespace, secret, listen, options.also) as port:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
            terminal.say(_hub_text(options, (advertise, port)))
            await stop.wait()
            terminal.say("stator: the hub stops; who serves goes on with what it knows until a hub is back here")
        return ExitCode.OK
    finally:
        terminal.close()


def _hub_text(options: HubOptions, address: tuple[str, int]) -> str:
    lines = [banner.JoinLine(what, ("stator", "serve", target, "-f", "CONFIG")) for what, target in JOINING]
    join = banner.format_join(
        lines, address, options.namespace, token.place_of_token(options.namespace, options.token_file)
    )
    return (
        f"\nThe hub is ready at {network.url_host(address[0])}:{address[1]} (namespace {options.namespace}). "
        f"It serves no clients; a graph that joins does.\n{join}\n  Ctrl-C stops it.\n"
    )


def _port(addresses: Sequence[str]) -> int:
    return next(a.port for a in map(parse_address, addresses) if isinstance(a, TcpAddress))
