"""Which KV connector a vLLM engine gets, and how it is set up, from the user's `kv-transfer-config`.

The choice is one key, `kv_connector`: `StatorConnector` (ours, over TCP; the default without GPUs), `NixlConnector`
(the default with them), or any other of vLLM's, which is passed on as it is. `DynamoNixlConnector` is an older name
for NixlConnector.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stator.engines.base import TRANSFER_HOLD_S, EngineHost, NodePlace
from stator.errors import ConfigError
from stator.ids import InstanceId

logger = logging.getLogger(__name__)

STATOR_CONNECTOR = "StatorConnector"
STATOR_CONNECTOR_MODULE = "stator.engines.vllm.tcp_connector"
STATOR_CONNECTOR_VERSION = "1"
"""Changes with what two StatorConnectors say to each other or what a block's bytes mean."""

NIXL_CONNECTOR = "NixlConnector"
NIXL_RELEASE = "stator.engines.vllm.nixl_release.NixlRelease"
_OLDER_NAMES = {"DynamoNixlConnector": NIXL_CONNECTOR}

NIXL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
NIXL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class TransferPlane:
    """What this worker tells its engine's connector.

    host: to listen on; advertise: what peers on other machines connect to. num_data_parallel: engines that share this
    process's settings; each takes ports of its own. engine_id: vLLM's, of an engine over several nodes, each of which
    would draw another.
    """

    namespace: str
    instance_id: InstanceId
    token_file: Path
    host: str = "127.0.0.1"
    advertise: str | None = None
    num_data_parallel: int = 1
    hold_s: float = TRANSFER_HOLD_S
    timeout_s: float = TRANSFER_HOLD_S
    engine_id: str | None = None


def transfer_plane(
    host: EngineHost, place: NodePlace | None, directory: Path, *, num_data_parallel: int, hold_s: float
) -> TransferPlane:
    """Of an engine of this host. place: of an engine over several nodes. directory: gets a file with the token."""
    identity = host.identity
    listen, advertise = listen_hosts(host.addresses)
    return TransferPlane(
        namespace=identity.namespace,
        # Peers know an engine by one name, whichever of its nodes they fetch from.
        instance_id=host.instance_id if place is None else place.instance_id,
        token_file=write_token_file(identity.token or "", directory),
        host=listen,
        advertise=advertise,
        num_data_parallel=num_data_parallel,
        hold_s=hold_s,
        engine_id=None if place is None else str(place.instance_id),
    )


@dataclass(frozen=True, slots=True)
class ConnectorPlan:
    """config: vLLM's `kv_transfer_config`. environment: to be set before the engine starts; nothing that the user has
    set is in it. worker_extension: for `worker_extension_cls`, if the user has none."""

    name: str
    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    worker_extension: str | None = None


def plan_connector(
    value: Mapping[str, Any] | str | None, plane: TransferPlane, *, gpu: bool, environment: Mapping[str, str]
) -> ConnectorPlan:
    """value: the user's `kv-transfer-config`, a mapping or JSON text. environment: the process's, as the user set it.

    Raises ConfigError naming the key and what was expected. May take a free port from the system.
    """
    config = read_config(value)
    name = config.setdefault("kv_connector", NIXL_CONNECTOR if gpu else STATOR_CONNECTOR)
    config.setdefault("kv_role", "kv_both")
    if plane.engine_id is not None:
        config["engine_id"] = plane.engine_id
    if name not in (STATOR_CONNECTOR, NIXL_CONNECTOR):
        return ConnectorPlan(name, config)
    config.setdefault("kv_load_failure_policy", "recompute")
    extra = dict(config.get("kv_connector_extra_config") or {})
    config["kv_connector_extra_config"] = extra
    if name == STATOR_CONNECTOR:
        _set_up_stator(config, extra, plane)
        return ConnectorPlan(name, config)
    if not gpu:
        config.setdefault("kv_buffer_device", "cpu")
    # vLLM counts whole seconds, and asks for news every sixth of it.
    extra.setdefault("kv_lease_duration", max(6, round(plane.hold_s)))
    return ConnectorPlan(name, config, _nixl_environment(plane, environment), NIXL_RELEASE)


def read_config(value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """A copy as a dict, older connector names replaced by today's. Raises ConfigError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"kv-transfer-config is not JSON: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"kv-transfer-config is {value!r}; expected a mapping with kv_connector")
    config: dict[str, Any] = {str(key): entry for key, entry in value.items()}
    name = config.get("kv_connector", STATOR_CONNECTOR)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"kv-transfer-config: kv_connector is {name!r}; expected a connector's name")
    if not isinstance(config.get("kv_connector_extra_config") or {}, Mapping):
        raise ConfigError("kv-transfer-config: kv_connector_extra_config is not a mapping")
    if name in _OLDER_NAMES:
        config["kv_connector"] = _OLDER_NAMES[name]
        logger.info("kv-transfer-config: %s is an older name of %s", name, _OLDER_NAMES[name])
    return config


def _set_up_stator(config: dict[str, Any], extra: dict[str, Any], plane: TransferPlane) -> None:
    config["kv_connector_module_path"] = STATOR_CONNECTOR_MODULE
    if "token" in extra:
        raise ConfigError("kv-transfer-config: a token must not be in it, since vLLM logs it; token_file names a file")
    ours = {
        "namespace": plane.namespace,
        "instance_id": plane.instance_id,
        "token_file": str(plane.token_file),
        "host": plane.host,
        "advertise": plane.advertise,
        "port": 0,
        "hold_s": plane.hold_s,
        "timeout_s": plane.timeout_s,
    }
    for key, value in ours.items():
        extra.setdefault(key, value)


def _nixl_environment(plane: TransferPlane, environment: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    host = environment.get(NIXL_HOST)
    if host is None:
        # vLLM binds to what it tells its peers, so a wildcard is of no use.
        host = found[NIXL_HOST] = plane.advertise or plane.host
    port = environment.get(NIXL_PORT)
    if port is None:
        found[NIXL_PORT] = str(free_port(host, plane.num_data_parallel))
    else:
        _check_ports(host, port, plane.num_data_parallel)
    return found


def _check_ports(host: str, port: str, count: int) -> None:
    """vLLM waits for ever if it cannot have one of them: two workers of a node that were given the same, for instance.

    Raises ConfigError."""
    if not port.isdigit() or int(port) + count - 1 > MAX_PORT:
        raise ConfigError(f"{NIXL_PORT} is {port!r}; expected a TCP port, with {count - 1} free ones after it")
    with contextlib.ExitStack() as stack:
        for number in range(int(port), int(port) + count):
            try:
                _bind(stack, host, number)
            except OSError as error:
                raise ConfigError(
                    f"{NIXL_PORT}: port {number} on {host} cannot be listened on ({error.strerror}); each worker of a "
                    f"node needs its own: leave the variable out, and a free one is taken"
                ) from None


def listen_hosts(addresses: tuple[str, ...]) -> tuple[str, str]:
    """(host to listen on, host that peers are told): where the worker itself is reached."""
    for address in addresses:
        if address.startswith("tcp://"):
            host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
            return host, host
    return "127.0.0.1", "127.0.0.1"


def free_port(host: str, count: int = 1) -> int:
    """The first of `count` consecutive TCP ports that are free on host now; vLLM adds its data-parallel rank.

    Raises ConfigError if host is not an address of this machine, or no such ports are found.
    """
    for _ in range(64):
        with contextlib.ExitStack() as stack:
            try:
                first = _bind(stack, host, 0)
            except OSError as error:
                raise ConfigError(f"{host} cannot be listened on for NIXL: {error.strerror}; see --advertise") from None
            if first + count - 1 > MAX_PORT:
                continue
            try:
                for port in range(first + 1, first + count):
                    _bind(stack, host, port)
            except OSError:
                continue
            return first
    raise ConfigError(f"no {count} consecutive free TCP ports were found on {host}; set {NIXL_PORT}")


def _bind(stack: contextlib.ExitStack, host: str, port: int) -> int:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    bound.bind(address)
    return bound.getsockname()[1]


def write_token_file(token: str, directory: Path) -> Path:
    """A file that only this user may read, under a name that nobody can guess; the caller removes it."""
    path = directory / f"kv-{secrets.token_hex(8)}.token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    return path
