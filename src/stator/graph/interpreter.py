"""`ServiceArgs.python`: whether another interpreter can run our processes, and how it finds Stator."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec

import stator
from stator.errors import ConfigError

PROBE_TIMEOUT_S = 60.0
MIN_PYTHON = (3, 11)

_PROBE = """
import json, sys
found = {"python": list(sys.version_info[:3]), "stator": None, "missing": None}
if sys.version_info >= (3, 11):
    try:
        import stator
        found["stator"] = stator.__version__
        import stator.graph.child
    except ImportError as error:
        found["missing"] = error.name or str(error)
print(json.dumps(found))
"""


class _Found(msgspec.Struct, frozen=True):
    python: tuple[int, int, int]
    stator: str | None
    missing: str | None


def source_for(label: str, python: str, environ: Mapping[str, str], directory: str, links: Path) -> str | None:
    """What to put on the PYTHONPATH of a process that `python` shall run; None if it has Stator of its own.

    links: a directory of ours. Our package is linked into it alone: the directory that holds it may be a
    site-packages, whose other packages must not come before those of the other environment.
    Raises ConfigError if the interpreter does not start, or is not suitable.
    """
    found = _probe(label, python, environ, directory)
    if found.python < MIN_PYTHON:
        version = ".".join(map(str, found.python))
        raise ConfigError(f"{label}: {python} is Python {version}; Stator needs 3.11 or newer")
    if found.stator is None:
        link = links / "stator"
        if not link.exists():
            link.symlink_to(Path(stator.__file__).resolve().parent)
        path = os.pathsep.join(filter(None, [str(links), environ.get("PYTHONPATH")]))
        found = _probe(label, python, {**environ, "PYTHONPATH": path}, directory)
    else:
        path = None
    if found.stator != stator.__version__ and found.stator is not None:
        raise ConfigError(
            f"{label}: {python} has stator {found.stator}, and this is {stator.__version__}; they must be equal: "
            f"{python} -m pip install stator=={stator.__version__}"
        )
    if found.missing is not None:
        raise ConfigError(
            f"{label}: {python} lacks {found.missing}, which Stator needs: "
            f"{python} -m pip install stator=={stator.__version__}"
        )
    return path


def _probe(label: str, python: str, environ: Mapping[str, str], directory: str) -> _Found:
    try:
        done = subprocess.run(
            [python, "-c", _PROBE],
            cwd=directory,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{label} cannot be started with {python}: {error}") from None
    try:
        return msgspec.convert(json.loads(done.stdout.splitlines()[-1]), _Found)
    except (IndexError, ValueError):
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ConfigError(f"{label} cannot be started with {python}: it is no Python that works: {last}") from None
