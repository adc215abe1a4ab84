"""External services in place of the hub: where etcd and NATS are, and who we are there. From the environment alone.

Passwords and tokens are never shown: `endpoints` and `servers` are without them, and so is every repr.
"""

import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from stator.errors import ConfigError

NATS_SERVER = "NATS_SERVER"
ETCD_ENDPOINTS = "ETCD_ENDPOINTS"
NATS_REPLICAS = "STATOR_NATS_REPLICAS"
DEFAULT_ETCD_PORT = 2379
DEFAULT_NATS_PORT = 4222


class TlsFiles(msgspec.Struct, frozen=True, omit_defaults=True):
    """ca: who signed the servers' certificates; the system's authorities without it. cert, key: what we show."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def context(self) -> ssl.SSLContext:
        """Raises ConfigError for a file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(file for file in (self.ca, self.cert, self.key) if file)
            raise ConfigError(f"the TLS files {files} cannot be used: {error}") from None
        return context


class EtcdSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """endpoints: `http(s)://host:port` of every member that may be asked."""

    endpoints: tuple[str, ...]
    user: str | None = None
    password: str | None = None
    tls: TlsFiles | None = None

    def __repr__(self) -> str:
        return f"EtcdSettings({', '.join(self.endpoints)})"


class NatsSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """servers: `nats://host:port`, or `tls://`. One way of authentication at most: user and password, token, the seed
    of an nkey in a file, or a credentials file. replicas: on how many servers of a cluster each stream is kept."""

    servers: tuple[str, ...]
    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey_file: str | None = None
    credentials_file: str | None = None
    tls: TlsFiles | None = None
    replicas: int = 1

    def __repr__(self) -> str:
        return f"NatsSettings({', '.join(self.servers)})"


class ExternalPlanes(msgspec.Struct, frozen=True):
    """Discovery in etcd and queues in NATS."""

    etcd: EtcdSettings
    nats: NatsSettings

    @property
    def secured(self) -> bool:
        """Whether there is something that other nodes need beside the addresses."""
        return self != ExternalPlanes(EtcdSettings(self.etcd.endpoints), NatsSettings(self.nats.servers))

    @property
    def shown(self) -> str:
        """For people: without what is secret."""
        return f"etcd at {', '.join(self.etcd.endpoints)}, NATS at {', '.join(self.nats.servers)}"


def external_planes(environ: Mapping[str, str]) -> ExternalPlanes | None:
    """What NATS_SERVER and ETCD_ENDPOINTS say; None without either. Raises ConfigError, also if one is missing."""
    nats, etcd = environ.get(NATS_SERVER), environ.get(ETCD_ENDPOINTS)
    if not nats and not etcd:
        return None
    if not nats or not etcd:
        present, missing, example = (
            (NATS_SERVER, ETCD_ENDPOINTS, "http://HOST:2379")
            if nats
            else (ETCD_ENDPOINTS, NATS_SERVER, "nats://HOST:4222")
        )
        raise ConfigError(
            f"{present} is set, but {missing} is not. Set both (for instance {missing}={example}) to use etcd and "
            f"NATS, or unset {present} to use the hub of a head"
        )
    return ExternalPlanes(etcd_settings(etcd, environ), nats_settings(nats, environ))


def etcd_settings(value: str, environ: Mapping[str, str]) -> EtcdSettings:
    """value: of ETCD_ENDPOINTS, `http://[USER:PASSWORD@]HOST[:PORT]`, several with commas. Raises ConfigError."""
    urls = _urls(ETCD_ENDPOINTS, value, ("http", "https"), "http")
    user, password = _user(ETCD_ENDPOINTS, urls)
    user = environ.get("ETCD_AUTH_USERNAME") or user
    password = environ.get("ETCD_AUTH_PASSWORD") or password
    if user and password is None:
        raise ConfigError(f"{ETCD_ENDPOINTS}: user {user} has no password; set ETCD_AUTH_PASSWORD")
    tls = _tls("ETCD_AUTH", environ)
    if tls is not None and not all(url.scheme == "https" for url in urls):
        raise ConfigError(
            f"ETCD_AUTH_CA or ETCD_AUTH_CLIENT_CERT is set, so every one of {ETCD_ENDPOINTS} must be https://"
        )
    return EtcdSettings(_shown(urls, DEFAULT_ETCD_PORT), user or None, password, tls)


def nats_settings(value: str, environ: Mapping[str, str]) -> NatsSettings:
    """value: of NATS_SERVER, `nats://[USER:PASSWORD@|TOKEN@]HOST[:PORT]`, several with commas. Raises ConfigError."""
    urls = _urls(NATS_SERVER, value, ("nats", "tls"), "nats")
    user, password = _user(NATS_SERVER, urls)
    token = environ.get("NATS_AUTH_TOKEN") or None
    if user is not None and password is None:
        user, token = None, token or user
    user = environ.get("NATS_AUTH_USERNAME") or user
    password = environ.get("NATS_AUTH_PASSWORD") or password
    if user and password is None:
        raise ConfigError(f"{NATS_SERVER}: user {user} has no password; set NATS_AUTH_PASSWORD")
    nkey = _file("NATS_AUTH_NKEY", environ)
    credentials = _file("NATS_AUTH_CREDENTIALS_FILE", environ)
    ways = [("a user", user), ("a token", token), ("NATS_AUTH_NKEY", nkey), ("NATS_AUTH_CREDENTIALS_FILE", credentials)]
    given = [name for name, way in ways if way]
    if len(given) > 1:
        raise ConfigError(f"{NATS_SERVER}: {' and '.join(given)} are given; NATS takes one of them")
    tls = _tls("NATS_AUTH", environ)
    if tls is None and any(url.scheme == "tls" for url in urls):
        tls = TlsFiles()
    servers = _shown(urls, DEFAULT_NATS_PORT)
    return NatsSettings(servers, user or None, password, token, nkey, credentials, tls, _replicas(environ))


def _replicas(environ: Mapping[str, str]) -> int:
    value = environ.get(NATS_REPLICAS) or "1"
    if value not in ("1", "3", "5"):
        raise ConfigError(f"{NATS_REPLICAS}={value}: expected 1, 3 or 5, and at most as many as there are NATS servers")
    return int(value)


def _urls(name: str, value: str, schemes: tuple[str, str], default: str) -> list[SplitResult]:
    urls: list[SplitResult] = []
    for text in (part.strip() for part in value.split(",")):
        if not text:
            continue
        url = urlsplit(text if "://" in text else f"{default}://{text}")
        try:
            valid = url.scheme in schemes and bool(url.hostname) and url.path in ("", "/") and not url.query
            _ = url.port
        except ValueError:
            valid = False
        if not valid:
            shown = text.rpartition("@")[2]
            raise ConfigError(
                f"{name}: found {shown!r}, expected {schemes[0]}://HOST:PORT, several with commas between"
            )
        urls.append(url)
    if not urls:
        raise ConfigError(f"{name} is empty; expected {schemes[0]}://HOST:PORT, several with commas between")
    return urls


def _shown(urls: list[SplitResult], port: int) -> tuple[str, ...]:
    hosts = [
        (url.scheme, f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname, url.port) for url in urls
    ]
    return tuple(dict.fromkeys(f"{scheme}://{host}:{given or port}" for scheme, host, given in hosts))


def _user(name: str, urls: list[SplitResult]) -> tuple[str | None, str | None]:
    found = {(url.username, url.password) for url in urls if url.username is not None}
    if len(found) > 1:
        raise ConfigError(f"{name}: its addresses name different users; expected one user for all")
    if not found:
        return None, None
    user, password = found.pop()
    return unquote(user or "") or None, None if password is None else unquote(password)


def _tls(prefix: str, environ: Mapping[str, str]) -> TlsFiles | None:
    names = ("CA", "CLIENT_CERT", "CLIENT_KEY")
    ca, cert, key = (_file(f"{prefix}_{name}", environ) for name in names)
    if (cert is None) != (key is None):
        raise ConfigError(f"{prefix}_CLIENT_CERT and {prefix}_CLIENT_KEY belong together; set both")
    return None if ca is None and cert is None else TlsFiles(ca, cert, key)


def _file(name: str, environ: Mapping[str, str]) -> str | None:
    value = environ.get(name)
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(f"{name}={value}: there is no such file")
    return str(path.absolute())
