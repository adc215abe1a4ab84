"""Listening sockets of the request plane."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from typing import Any

from stator.errors import ConfigError
from stator.transport.addresses import TcpAddress
from stator.transport.settings import Listen

BACKLOG = 512

BindTcp = Callable[[Listen, str], Awaitable[tuple[Any, TcpAddress]]]
"""`bind_tcp`, or what a loop without sockets has in its place. The first value is for the loop's `create_server`."""

_WILDCARDS = frozenset({"0.0.0.0", "::", ""})


async def bind_tcp(listen: Listen, host: str) -> tuple[socket.socket, TcpAddress]:
    """A bound socket, and the address that peers are told. Raises ConfigError, naming what is taken or missing."""
    if listen.advertise is None and host in _WILDCARDS:
        raise ConfigError(f"listening on every address ({host!r}): set advertise to the host that peers reach")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host!r}: {error.strerror or error}") from error
    family, _, _, _, where = found[0]
    first, last = listen.port_range if listen.port_range and not listen.port else (listen.port, listen.port)
    for port in range(first, last + 1):
        try:
            bound = _bind(family, (where[0], port, *where[2:]))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
            continue
        return bound, TcpAddress(listen.advertise or host, bound.getsockname()[1])
    ports = f"port {first}" if first == last else f"every port from {first} to {last}"
    raise ConfigError(f"cannot listen on {host}: {ports} is in use; give another port or port range")


def _bind(family: int, where: tuple[object, ...]) -> socket.socket:
    # asyncio turns Nagle's algorithm off only for sockets whose protocol number says TCP.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound.setblocking(False)
        bound.bind(where)
    except BaseException:
        bound.close()
        raise
    return bound


def bind_unix(path: str) -> socket.socket:
    """A bound socket that only this user may connect to. Takes the place of a dead socket; raises ConfigError for
    anything else that is there."""
    if _is_dead_socket(path):
        os.unlink(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.bind(path)
        os.chmod(path, 0o600)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"{path} is in use by another process; give another unix_path") from error
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    return bound


def _is_dead_socket(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
