"""Runs another environment's pip: its many lines become a few, and its failure a sentence."""

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stator.errors import ConfigError

Say = Callable[[str], None]

BIG_BYTES = 20_000_000
PACKAGES_A_LINE = 50
KEPT_LINES = 400
"""Of pip's output, for the explanation of a failure."""

_UNITS = {"bytes": 1, "kB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}
_FILE = re.compile(r"^\s*(Downloading|Using cached|Processing)\s+(\S+)(?:\s+\(([\d.]+) (bytes|kB|MB|GB)\))?")
_NO_NETWORK = (
    "NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "NameResolutionError", "Read timed out",
    "Temporary failure in name resolution", "Connection refused", "Connection reset", "Connection broken", "ProxyError",
    "SSLError", "CERTIFICATE_VERIFY_FAILED", "Max retries exceeded", "HTTP error",
)  # fmt: skip
_NOT_FOUND = re.compile(r"No matching distribution found for (\S+)")
# pip prints addresses as they were given, and a name and password may be in them.
_SECRET = re.compile(r"(?<=://)[^/@\s]+@")


class PipFailed(ConfigError):
    """not_found: pip reached all it was told of, and what it looked for is not there. unreachable: pip did not."""

    def __init__(self, what: str, output: str) -> None:
        super().__init__(f"{what} could not be installed: {explain(output)}")
        self.not_found = is_not_found(output)
        self.unreachable = _is_unreachable(output)


class Progress:
    """Fed pip's lines; says the big files, and every now and then how many there were.

    num_bytes: of what came over the network. num_packages: of what was downloaded or found.
    """

    def __init__(self, say: Say) -> None:
        self.num_bytes = 0
        self.num_packages = 0
        self._say = say

    def feed(self, line: str) -> None:
        if line.startswith("Installing collected packages:"):
            many = "" if self.num_packages == 1 else "s"
            self._say(f"unpacking {self.num_packages} package{many} ({megabytes(self.num_bytes)} downloaded)")
        found = _FILE.match(line)
        if found is None or found[2].endswith(".metadata"):
            return
        size = int(float(found[3]) * _UNITS[found[4]]) if found[3] else 0
        self.num_packages += 1
        self.num_bytes += size if found[1] == "Downloading" else 0
        if size >= BIG_BYTES:
            self._say(f"{found[1].lower()} {found[2].rsplit('/', 1)[-1].split('-')[0]} ({megabytes(size)})")
        elif self.num_packages % PACKAGES_A_LINE == 0:
            self._say(f"{self.num_packages} packages so far ({megabytes(self.num_bytes)} downloaded)")


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1_000_000:.0f} MB"


def install(python: Path, what: str, arguments: Sequence[str], say: Say, *, build: bool = False) -> Progress:
    """`pip install` by that interpreter, of nothing but what is named. Raises PipFailed.

    what: its name in messages. build: from a source distribution where there is no wheel, with the setuptools that the
    environment has; otherwise wheels only.
    """
    how = ("--no-build-isolation",) if build else ("--only-binary", ":all:")
    command = [
        str(python), "-m", "pip", "install", "--no-deps", *how, "--no-input", "--no-color",
        "--progress-bar", "off", "--disable-pip-version-check", *arguments,
    ]  # fmt: skip
    progress = Progress(say)
    kept: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=clean_environment(os.environ),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                progress.feed(line)
                kept.append(line)
                del kept[:-KEPT_LINES]
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise PipFailed(what, "".join(kept))
    return progress


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """For the interpreter of an environment: no packages but its own, and no other place to install them in."""
    left_out = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "STATOR_TOKEN"}
    kept = {key: value for key, value in environ.items() if key not in left_out}
    return {**kept, "PYTHONNOUSERSITE": "1", "PIP_USER": "0"}


def is_not_found(output: str) -> bool:
    return _NOT_FOUND.search(output) is not None and not _is_unreachable(output)


def _is_unreachable(output: str) -> bool:
    return any(sign in output for sign in _NO_NETWORK)


def explain(output: str) -> str:
    """Why pip failed, in a sentence, and what to do."""
    if "No space left on device" in output or "Errno 28" in output:
        return "the disk is full (the environment's, or that of pip's cache or temporary directory)"
    if "DO NOT MATCH THE HASHES" in output:
        return (
            "a file is not the one that was pinned; somebody changed it on the way or at its source. Nothing of it was "
            "installed. If pip's cache is to blame: pip cache purge"
        )
    if _is_unreachable(output):
        return (
            "no package index could be reached. Is there a network, and does it need a proxy? `pip config list` shows "
            "which index pip asks. On a machine without one, let pip find the wheels in a directory (PIP_FIND_LINKS, "
            "PIP_NO_INDEX=1)"
        )
    missing = _NOT_FOUND.search(output)
    if missing is not None:
        return f"{missing[1]} has no wheel for this machine and this Python where pip looked"
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    last = errors or [line for line in output.splitlines() if line.strip()] or ["pip said nothing"]
    return _SECRET.sub("", last[-1].removeprefix("ERROR:").strip())
