"""Commands that look at a running deployment, or change it: connected as a node is, through the hub of its head, or
through etcd and NATS."""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from stator.cli.control_plane import ControlPlane, HubControl
from stator.config import environment
from stator.config.external import ExternalPlanes
from stator.discovery.base import KeyValue
from stator.errors import DECODE_ERRORS, ConfigError, ErrorCode, StatorError
from stator.graph import network, token
from stator.graph.node import DEFAULT_HUB_PORT
from stator.graph.planes import Planes, open_planes
from stator.ids import InstanceId, RequestId
from stator.messages.instances import INSTANCES_PREFIX, InstanceInfo
from stator.runtime.context import CallContext, loop_time
from stator.transport import calls
from stator.transport.addresses import TcpAddress
from stator.transport.base import Target
from stator.transport.settings import Identity

LOCAL_HEAD = f"127.0.0.1:{DEFAULT_HUB_PORT}"


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """join: HOST[:PORT] of the head's hub; None for etcd and NATS if the environment names them, else LOCAL_HEAD."""

    join: str | None = None
    namespace: str = "stator"
    token_file: Path | None = None


class Deployment:
    """A deployment as a command sees it: its planes, and calls that answer once."""

    def __init__(self, planes: Planes, namespace: str, control: ControlPlane) -> None:
        self.planes = planes
        self.namespace = namespace
        self.control = control

    async def entries(self) -> list[tuple[KeyValue, InstanceInfo]]:
        """What discovery has now, sorted by service and instance; what this version cannot read is left out."""
        found: list[tuple[KeyValue, InstanceInfo]] = []
        for entry in await self.planes.discovery.get_prefix(INSTANCES_PREFIX):
            with contextlib.suppress(*DECODE_ERRORS):
                found.append((entry, msgspec.msgpack.decode(entry.value, type=InstanceInfo)))
        return found

    async def ask(self, instance: InstanceInfo, endpoint: str, request: Any, item_type: Any, timeout_s: float) -> Any:
        """The endpoint's one item. Raises StatorError; ConfigError if the instance does not take our token."""
        target = Target(instance.addresses, endpoint, instance.instance_id)
        try:
            return await calls.call(
                self.planes.client, target, request, context=_context(timeout_s), item_type=item_type
            )
        except StatorError as error:
            if error.code is ErrorCode.UNAUTHORIZED:
                raise ConfigError(f"{instance.instance_id} refused this command: {error.message}") from None
            raise

    async def first(self, instance: InstanceInfo, endpoint: str, request: Any, item_type: Any, timeout_s: float) -> Any:
        """The first item of a stream that does not end by itself. Raises StatorError."""
        stream = self.stream(instance, endpoint, request, item_type, timeout_s)
        async with contextlib.aclosing(stream) as lists:
            async for items in lists:
                return items[0]
        raise StatorError(ErrorCode.PROTOCOL, f"{endpoint} of {instance.instance_id} ended without an item")

    def stream(
        self, instance: InstanceInfo, endpoint: str, request: Any, item_type: Any, timeout_s: float | None = None
    ) -> AsyncGenerator[list[Any], None]:
        target = Target(instance.addresses, endpoint, instance.instance_id)
        return calls.stream(self.planes.client, target, request, context=_context(timeout_s), item_type=item_type)


@contextlib.asynccontextmanager
async def connected(options: ControlOptions) -> AsyncGenerator[Deployment]:
    """Raises ConfigError if the control plane refuses us or cannot be reached."""
    token.check_namespace(options.namespace)
    external = None if options.join is not None else environment.external_control_plane()
    opened = _through_hub(options) if external is None else _through_services(options, external)
    async with opened as deployment:
        yield deployment


@contextlib.asynccontextmanager
async def _through_hub(options: ControlOptions) -> AsyncGenerator[Deployment]:
    join = options.join or LOCAL_HEAD
    host, port = network.parse_host_port(join, DEFAULT_HUB_PORT, "--join")
    secret = token.find_token(options.namespace, options.token_file)
    if secret is None:
        raise ConfigError(token.missing_token(options.namespace, join))
    planes = open_planes(_identity(options, secret), (host, port), None)
    control = HubControl(planes.client, (str(TcpAddress(host, port)),), join, options.namespace)
    try:
        try:
            await planes.discovery.get("reached")
        except StatorError as error:
            if error.code is not ErrorCode.INSTANCE_LOST:
                raise ConfigError(f"the head at {join} refused this command: {error.message}") from None
            elsewhere = "" if options.join else ", or set NATS_SERVER and ETCD_ENDPOINTS"
            raise ConfigError(
                f"there is no head at {join} ({error.message}); give its address with --join HOST[:PORT]{elsewhere}"
            ) from None
        yield Deployment(planes, options.namespace, control)
    finally:
        await planes.close()


@contextlib.asynccontextmanager
async def _through_services(options: ControlOptions, external: ExternalPlanes) -> AsyncGenerator[Deployment]:
    # Whoever uses a hub has no need of their clients.
    from stator.cli.external_control import ExternalControl, read_token

    given = token.find_given_token(options.token_file)
    secret = await read_token(external, options.namespace, given)
    planes = open_planes(_identity(options, secret), None, external)
    try:
        yield Deployment(planes, options.namespace, ExternalControl(planes, external))
    finally:
        await planes.close()


def _identity(options: ControlOptions, secret: str) -> Identity:
    return Identity(options.namespace, InstanceId(f"cli-{uuid4().hex[:12]}"), "cli", secret, environment.tls())


def _context(timeout_s: float | None) -> CallContext:
    return CallContext(RequestId(f"cli-{uuid4().hex}"), None if timeout_s is None else loop_time() + timeout_s)
