"""Sockets that a supervisor makes for its processes: the one for clients that copies share, and a directory for Unix
sockets, with which the processes of a node call each other."""

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Generator
from pathlib import Path

from stator.config import environment
from stator.errors import ConfigError
from stator.ids import InstanceId

MAX_UNIX_PATH_BYTES = 107
"""Of sun_path on Linux, without its end."""

_LONGEST_NAME = "0123456789ab.sock"


def socket_path(directory: str, instance_id: InstanceId) -> str:
    """An instance id ends in a part that is unique by itself, so that a long service name does not matter."""
    return f"{directory}/{instance_id.rpartition('-')[2][:12]}.sock"


@contextlib.contextmanager
def socket_directory() -> Generator[str | None]:
    """A directory that only this user may enter, gone at the end; None where its paths would be too long."""
    runtime = environment.runtime_directory()
    base = runtime if runtime is not None and os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())
    try:
        made = tempfile.TemporaryDirectory(prefix="stator-", dir=base, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(f"a directory for sockets cannot be made in {base}: {error.strerror}; set TMPDIR") from None
    with made as directory:
        fits = len(os.fsencode(f"{directory}/{_LONGEST_NAME}")) <= MAX_UNIX_PATH_BYTES
        yield directory if fits else None


def open_listener(service: str, host: str, port: int) -> socket.socket:
    """A bound TCP socket for the processes of a frontend to accept from. Raises ConfigError if it cannot be had.

    A name with addresses of both families gets its IPv4 one, which is what clients try who know no other.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] is not socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{service}: cannot listen on {host}: {error.strerror}; set --{service}.host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{host} port {port} is in use by another process; stop it or choose another port with --{service}.port"
            ) from None
        raise ConfigError(f"{service}: cannot listen on {host} port {port}: {error.strerror}") from None
    return listener
