"""Addresses of the request plane: `tcp://host:port`, `unix:///path`, `inproc://name`."""

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True, slots=True)
class InProcessAddress:
    name: str

    def __str__(self) -> str:
        return f"inproc://{self.name}"


Address = TcpAddress | UnixAddress | InProcessAddress


def parse_address(text: str) -> Address:
    """Raises ValueError naming the text and what was expected."""
    scheme, separator, rest = text.partition("://")
    if separator and rest:
        if scheme == "inproc":
            return InProcessAddress(rest)
        if scheme == "unix" and rest.startswith("/"):
            return UnixAddress(rest)
        if scheme == "tcp" and (address := _parse_tcp(rest)) is not None:
            return address
    raise ValueError(f"{text!r} is not an address; expected tcp://host:port, unix:///path or inproc://name")


def _parse_tcp(rest: str) -> TcpAddress | None:
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or not port or parts.path or parts.query or parts.username is not None:
        return None
    return TcpAddress(host, port)
