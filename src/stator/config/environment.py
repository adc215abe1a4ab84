"""Every environment variable that Stator reads, but for those of logging (observability.logs)."""

import os
from pathlib import Path

from stator.config.external import ExternalPlanes, external_planes
from stator.config.node_tls import NodeTls, node_tls


def token() -> str | None:
    """STATOR_TOKEN: the deployment's secret; wins over the token file."""
    return os.environ.get("STATOR_TOKEN") or None


def tls() -> NodeTls | None:
    """STATOR_TLS_DIR, or STATOR_TLS_CA, STATOR_TLS_CERT and STATOR_TLS_KEY; STATOR_TLS_VERIFY (config.node_tls).

    None without any. Raises ConfigError for what cannot be used."""
    return node_tls(os.environ)


def state_directory() -> Path:
    """XDG_STATE_HOME/stator: what outlives a run (token files)."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "stator"


def data_directory() -> Path:
    """XDG_DATA_HOME/stator: what was installed for this user (engines in environments of their own)."""
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "stator"


def external_control_plane() -> ExternalPlanes | None:
    """NATS_SERVER (queues) and ETCD_ENDPOINTS (discovery), with NATS_AUTH_* and ETCD_AUTH_* (config.external).

    None without either. Raises ConfigError for what cannot be used, among it one of the two alone."""
    return external_planes(os.environ)


def colour() -> bool:
    """NO_COLOR set to anything: no colour, wherever the output goes."""
    return not os.environ.get("NO_COLOR")


def json_logs() -> bool:
    """STATOR_LOG_FORMAT=json (observability.logs): log lines are objects, and must stay whole."""
    return os.environ.get("STATOR_LOG_FORMAT", "").lower() == "json"


def runtime_directory() -> Path | None:
    """XDG_RUNTIME_DIR: where this user's sockets live while the user is logged in."""
    home = os.environ.get("XDG_RUNTIME_DIR")
    return Path(home) if home else None
