"""A child process: `python -m stator.graph.child`, started by the supervisor only.

It dies with the supervisor, however that ends: the kernel kills it when its parent dies (PR_SET_PDEATHSIG), and a
thread that waits on the inherited pipe kills its whole process group when the supervisor's end closes.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import msgspec

from stator.config import environment
from stator.errors import ConfigError
from stator.graph.graph import build_graph
from stator.graph.planes import Planes, open_planes
from stator.graph.process import ServiceProcess, describe_failure
from stator.graph.protocol import ChildSpec, ExitCode, Failed, Report
from stator.graph.targets import load_target
from stator.ids import InstanceId
from stator.observability.logs import BackgroundHandler, setup_logging, write_to_stderr
from stator.runtime.loop import run_loop
from stator.transport.settings import Identity

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def read_spec(fd: int) -> ChildSpec:
    """Read one line byte-exactly: what follows on the pipe is only its end."""
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = os.read(fd, 65536)
        if not chunk:
            raise EOFError("the supervisor closed the pipe before it sent a spec")
        line += chunk
    return msgspec.json.decode(bytes(line), type=ChildSpec)


def die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(ExitCode.FAILURE)


def show_name(label: str) -> None:
    """In `ps` and `top`, as far as its 15 characters go."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_NAME, label.encode()[:15], 0, 0, 0)


def watch_lifeline(fd: int) -> None:
    """Kill this process group when the supervisor's end of the pipe is closed, even if the event loop is stuck."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 4096):
                pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


class StatusPipe:
    """Reports to the supervisor. A full or closed pipe loses the report: nothing here may wait for it."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        self._fd = fd

    def __call__(self, report: Report) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fd, msgspec.json.encode(report) + b"\n")


async def _run(spec: ChildSpec, report: StatusPipe) -> ExitCode:
    graph = build_graph(load_target(spec.target, Path(spec.directory)))
    instance_id = InstanceId(f"{spec.label}-{uuid4().hex[:12]}")
    identity = Identity(spec.namespace, instance_id, spec.services[0], spec.token, environment.tls())

    def connect() -> Planes:
        return open_planes(identity, spec.hub, spec.external)

    process = ServiceProcess(spec, graph, connect, report, clock=time.monotonic)

    def go_on(_signal: int, _frame: object) -> None:
        process.resumed()

    # Not a handler of the loop: this one runs before any callback that has become ready meanwhile.
    signal.signal(signal.SIGCONT, go_on)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, process.request_stop)
    code = await process.run()
    if process.left_behind:
        _exit_now(code)
    return code


def _exit_now(code: ExitCode) -> NoReturn:
    """Without waiting for threads: one of them is in a computation that may never end."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> ExitCode:
    lifeline = os.dup(0)
    spec = read_spec(lifeline)
    die_with_parent(spec.supervisor_pid)
    show_name(spec.label)
    watch_lifeline(lifeline)
    # Nobody else may hold the lifeline's end, and nothing here reads a terminal.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report = StatusPipe(spec.status_fd)
    setup_logging(spec.services[0], str(spec.index), prefixed=True, handler=BackgroundHandler(write_to_stderr))
    try:
        return run_loop(_run(spec, report))
    except ConfigError as error:
        report(Failed(str(error), config=True))
        return ExitCode.CONFIG
    except Exception as error:
        logger.exception("%s failed", spec.label)
        report(Failed(describe_failure(error)))
        return ExitCode.FAILURE


if __name__ == "__main__":
    sys.exit(main())
