"""Which address of this host others reach it at."""

import contextlib
import ipaddress
import socket

import psutil

from stator.errors import ConfigError

_ANYWHERE = "192.0.2.1"  # RFC 5737: reserved for documentation, so that only the route to it matters.


def parse_host_port(text: str, default_port: int, option: str) -> tuple[str, int]:
    """`HOST`, `HOST:PORT` or `[V6]:PORT`."""
    host, separator, port = text.rpartition(":")
    if not separator or text.endswith("]") or (":" in host and not host.startswith("[")):
        host, port = text, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{option} {text}: expected HOST or HOST:PORT")
    return host, int(port)


def parse_port_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536):
        raise ConfigError(f"--port-range {text}: expected FIRST-LAST, for instance 20000-20100")
    return int(first), int(last)


def is_wildcard(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def address_towards(host: str, port: int) -> str | None:
    """The local address from which packets to host leave; None without a route. Sends nothing."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def primary_address() -> str:
    """This host's address on its default route, else on its first other interface, else 127.0.0.1."""
    address = address_towards(_ANYWHERE, 9)
    if address is not None and not is_loopback(address):
        return address
    for _, entries in sorted(psutil.net_if_addrs().items()):
        for entry in entries:
            if entry.family is socket.AF_INET and not is_loopback(entry.address):
                return entry.address
    return "127.0.0.1"


def advertised_address(listen: str, advertise: str | None, head: tuple[str, int] | None) -> str:
    """What peers are told: what the user said, else the listen address, else the one that routes to the head."""
    if advertise:
        return advertise
    if not is_wildcard(listen):
        return listen
    if head is not None and not is_loopback(head[0]) and (address := address_towards(*head)) is not None:
        return address
    return primary_address()


def url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
