"""Whether vLLM for CPUs can run on a machine: its system, its processor and the interpreter that shall run it."""

import json
import subprocess
import sys

import msgspec

from stator.errors import ConfigError

MIN_PYTHON = (3, 11)
MAX_PYTHON = (3, 14)
PROBE_TIMEOUT_S = 60.0

_PROBE = """
import json, platform, sys
flags = []
try:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                flags = line.split(":", 1)[1].split()
                break
except OSError:
    pass
import ctypes
missing = []
for library in ("libnuma.so.1", "libstdc++.so.6"):
    try:
        ctypes.CDLL(library)
    except OSError:
        missing.append(library)
print(json.dumps({
    "version": list(sys.version_info[:3]), "implementation": platform.python_implementation(),
    "system": platform.system(), "processor": platform.machine(), "libc": platform.libc_ver()[0], "flags": flags,
    "missing": missing,
}))
"""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """As the interpreter sees it. flags: the processor's abilities, by the kernel's names; empty if it tells none.

    missing: those of the system's libraries that vLLM's kernels are linked with and that are not there.
    """

    version: tuple[int, int, int]
    implementation: str = "CPython"
    system: str = "Linux"
    processor: str = "x86_64"
    libc: str = "glibc"
    flags: list[str] = []
    missing: list[str] = []

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    def __str__(self) -> str:
        return f"Python {self.version[0]}.{self.version[1]} on {self.system} {self.processor}"


def describe(python: str = sys.executable) -> Machine:
    """Raises ConfigError if there is no such interpreter, or it does not work."""
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
        return msgspec.convert(json.loads(done.stdout), Machine)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise ConfigError(f"{python} is no Python that works: {error}") from None


def refusal(machine: Machine, engine: str, version: str) -> str | None:
    """Why the engine cannot run there, and what to do; None if it can."""
    if machine.system != "Linux" or machine.libc != "glibc":
        system = machine.system if machine.system != "Linux" else "a Linux without glibc"
        return f"{engine} {version} has builds for Linux with glibc only, and this is {system}"
    if machine.processor not in ("x86_64", "aarch64"):
        return f"{engine} {version} has builds for x86_64 and aarch64 only, and this processor is {machine.processor}"
    if machine.processor == "x86_64" and machine.flags and "avx2" not in machine.flags:
        return (
            f"{engine} {version} needs a processor with AVX2, and this one has none (a virtual machine may hide it: "
            f"give it the host's CPU type)"
        )
    if machine.implementation != "CPython" or not MIN_PYTHON <= machine.version[:2] <= MAX_PYTHON:
        return (
            f"{engine} {version} has builds for CPython {_text(MIN_PYTHON)} to {_text(MAX_PYTHON)}, and this is "
            f"{machine.implementation} {machine.version_text}; name another with --python PATH"
        )
    if machine.missing:
        libraries = " and ".join(machine.missing)
        return (
            f"{engine} {version} needs {libraries}, which this machine lacks; on Debian and Ubuntu: "
            f"apt install libnuma1 libstdc++6"
        )
    return None


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
