"""Mutual TLS between Stator's own processes: which files, and how a peer's certificate is checked.

STATOR_TLS_DIR names a directory with `ca.crt`, `tls.crt` and `tls.key`, as a Kubernetes TLS secret has them;
STATOR_TLS_CA, STATOR_TLS_CERT and STATOR_TLS_KEY name files one by one. Child processes inherit them.
"""

import os
import stat
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

from stator.errors import ConfigError

CA_NAME = "ca.crt"
CERT_NAME = "tls.crt"
KEY_NAME = "tls.key"

DIR, CA, CERT, KEY, VERIFY = "STATOR_TLS_DIR", "STATOR_TLS_CA", "STATOR_TLS_CERT", "STATOR_TLS_KEY", "STATOR_TLS_VERIFY"


class TlsVerify(StrEnum):
    """FULL: a server's certificate is of our authority and names the address that was dialled (loopback aside). CA: it
    is of our authority; enough only if that authority signs for nobody but this deployment's nodes."""

    FULL = "full"
    CA = "ca"


class NodeTls(msgspec.Struct, frozen=True, omit_defaults=True):
    """PEM files. ca: of everybody's issuer, one or several. cert: this node's, with what leads to the authority."""

    ca: str
    cert: str
    key: str
    verify: TlsVerify = TlsVerify.FULL

    @property
    def files(self) -> tuple[str, str, str]:
        return (self.ca, self.cert, self.key)


def node_tls(environ: Mapping[str, str]) -> NodeTls | None:
    """What the environment says; None without, which is no TLS.

    Raises ConfigError for a part of the three files, one that is not there, and a key that others may read.
    """
    verify = environ.get(VERIFY) or TlsVerify.FULL.value
    if verify not in (TlsVerify.FULL, TlsVerify.CA):
        raise ConfigError(f"{VERIFY} is {verify!r}: expected full or ca")
    directory, ca, cert, key = (environ.get(name) or None for name in (DIR, CA, CERT, KEY))
    if directory is not None:
        base = Path(directory).expanduser()
        ca, cert, key = ca or str(base / CA_NAME), cert or str(base / CERT_NAME), key or str(base / KEY_NAME)
    parts = {CA: ca, CERT: cert, KEY: key}
    if not any(parts.values()):
        return None
    missing = [name for name, value in parts.items() if not value]
    if missing:
        raise ConfigError(
            f"TLS between nodes needs an authority, a certificate and its key: {' and '.join(missing)} not set. "
            f"`stator certs issue` makes a directory with all three, which {DIR} names"
        )
    ca_file, cert_file, key_file = (_file(name, Path(str(value))) for name, value in parts.items())
    check_private(Path(key_file))
    return NodeTls(ca_file, cert_file, key_file, TlsVerify(verify))


def _file(name: str, path: Path) -> str:
    path = path.expanduser()
    if not path.is_file():
        raise ConfigError(f"{name}: there is no file {path}")
    return str(path.absolute())


def check_private(key: Path) -> None:
    """Raises ConfigError for a key that others may read; the group may if it is root's (a mounted secret)."""
    status = key.stat()
    allowed = 0o740 if status.st_uid == 0 and os.getuid() != 0 else 0o700
    if stat.S_IMODE(status.st_mode) & 0o777 & ~allowed:
        raise ConfigError(f"the key {key} may be read by others; run: chmod 600 {key}")
