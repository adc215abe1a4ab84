"""One child process as the supervisor sees it: started, read, signalled, gone."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping

import msgspec

from stator.config.schema import ServiceArgs
from stator.errors import DECODE_ERRORS, ConfigError
from stator.graph.protocol import Announcing, ChildSpec, Failed, Hung, Ready, Report
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 * 1024
_READ_BYTES = 64 * 1024

LineSink = Callable[[bytes], None]


class LineSplitter:
    """Bytes in, whole lines out without their ends; a line longer than max_bytes comes in pieces."""

    def __init__(self, sink: LineSink, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._sink(line.removesuffix(b"\r"))
        while len(self._rest) > self._max_bytes:
            self._sink(self._rest[: self._max_bytes])
            self._rest = self._rest[self._max_bytes :]

    def end(self) -> None:
        rest, self._rest = self._rest, b""
        if rest:
            self._sink(rest)


class Child:
    """A started process. Its pipes are read until they end; `wait` returns after that.

    failure, hung: what it reported. succeeded: set when another has taken its place.
    """

    def __init__(
        self,
        spec: ChildSpec,
        process: asyncio.subprocess.Process,
        on_report: Callable[["Child", Report], None],
    ) -> None:
        self.spec = spec
        self.failure: Failed | None = None
        self.hung: Hung | None = None
        self.keys: tuple[str, ...] = ()
        self.succeeded = asyncio.Event()
        self._process = process
        self._on_report = on_report
        self._ready_at: float | None = None
        self._decided = asyncio.Event()
        self._tasks = TaskOwner(spec.label)
        self._end = TaskOwner(f"end of {spec.label}")
        self._gone = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready_for_s(self) -> float | None:
        return None if self._ready_at is None else loop_time() - self._ready_at

    def read(self, stdout: LineSink, stderr: LineSink, status: asyncio.StreamReader) -> None:
        assert self._process.stdout is not None and self._process.stderr is not None
        self._pumps = [
            self._tasks.spawn(_pump(self._process.stdout, stdout), "stdout"),
            self._tasks.spawn(_pump(self._process.stderr, stderr), "stderr"),
            self._tasks.spawn(_pump(status, self._report), "status"),
        ]
        self._ended = self._end.spawn(self._finish(), "wait")

    def _report(self, line: bytes) -> None:
        try:
            report = msgspec.json.decode(line, type=Report)
        except DECODE_ERRORS as error:
            logger.warning("%s sent a status that is not understood: %s", self.spec.label, error)
            return
        if isinstance(report, Ready):
            self._ready_at = loop_time()
            self._decided.set()
        elif isinstance(report, Failed):
            self.failure = report
        elif isinstance(report, Hung):
            self.hung = report
        elif isinstance(report, Announcing):
            self.keys = report.keys
        self._on_report(self, report)

    async def ready_within(self, seconds: float) -> bool:
        """False if it ended or took longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._decided.wait()
        except TimeoutError:
            return False
        return self._ready_at is not None and not self._gone

    async def wait(self) -> int:
        """The exit code, negative for a signal; no process of its group is left, and every line was read."""
        return await asyncio.shield(self._ended)

    async def _finish(self) -> int:
        code = await self._process.wait()
        self._gone = True
        self._decided.set()
        self._signal_group(signal.SIGKILL)
        await asyncio.gather(*self._pumps)
        await self._tasks.close()
        # Closing our end of the lifeline: nobody is left to read it.
        if self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def terminate(self) -> None:
        """Ask it to drain."""
        if not self._gone:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all it started, now."""
        if not self._gone:
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        # The child leads its own session, so that its process id names a group of its descendants only.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


async def start_child(
    spec: ChildSpec,
    args: ServiceArgs,
    on_report: Callable[[Child, Report], None],
    stdout: LineSink,
    stderr: LineSink,
    *,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start the process and begin to read it. Raises ConfigError if its interpreter cannot be started.

    environment: added to this process's own; default `args.envs`.
    """
    status_read, status_write = os.pipe()
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                args.python or sys.executable,
                "-m",
                "stator.graph.child",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=spec.directory,
                env=child_environment(os.environ, args.envs if environment is None else environment),
                start_new_session=True,
                pass_fds=(status_write,) if spec.listen_fd is None else (status_write, spec.listen_fd),
            )
        except OSError as error:
            raise ConfigError(f"{spec.label} cannot be started with {args.python or sys.executable}: {error}") from None
        finally:
            os.close(status_write)
        status = await _open_reader(status_read)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(status_read)
        raise
    child = Child(spec, process, on_report)
    child.read(stdout, stderr, status)
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(msgspec.json.encode(msgspec.structs.replace(spec, status_fd=status_write)) + b"\n")
        await process.stdin.drain()
    return child


def child_environment(environ: Mapping[str, str], envs: Mapping[str, str]) -> dict[str, str]:
    """Lines must not wait in a buffer; and the token, which comes with the spec, is not for what an engine starts."""
    inherited = {key: value for key, value in environ.items() if key != "STATOR_TOKEN"}
    return {**inherited, "PYTHONUNBUFFERED": "1", **envs}


async def _open_reader(descriptor: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    return reader


async def _pump(reader: asyncio.StreamReader, sink: LineSink) -> None:
    splitter = LineSplitter(sink)
    while data := await reader.read(_READ_BYTES):
        splitter.feed(data)
    splitter.end()


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was ended by {name}{hint}"
    return f"was ended by signal {-code}"
