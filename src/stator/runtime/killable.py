"""Work that may not end, in processes that can be killed: a thread that runs a library cannot be stopped.

A process gets one job at a time, as bytes, and answers with bytes (`killable_child`). One that has not answered in the
job's time is killed, and another started for the next job. Nothing is unpickled: a child that somebody took over by
what it was given to read has no more to say than an answer. Processes start with the first job that needs them.
"""

import asyncio
import contextlib
import logging
import os
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

LENGTH = struct.Struct("<I")
ANSWERED, FAILED = 0, 1
START_S = 60.0


class JobFailed(Exception):
    """A job that has no answer."""


class JobTooLong(JobFailed):
    """It was not done in its time, and its process was killed."""


class JobKilled(JobFailed):
    """Its process ended over it: by a bound on memory, or a crash."""


class PoolUnavailable(JobFailed):
    """The pool has closed, or its processes do not start."""


@dataclass(slots=True)
class _Job:
    payload: bytes
    timeout_s: float
    wanted: Callable[[], bool]
    answer: "asyncio.Future[bytes]"


class KillablePool:
    """name: for the log. command: of a process that runs `killable_child.serve`. max_bytes: of memory for each.

    max_processes: at once, each for one job. Jobs that find none wait; bounding how many is the caller's, who knows
    what to tell whom. Used from one event loop; owns its processes until `close`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        max_processes: int = 1,
        max_bytes: int | None = None,
        start_s: float = START_S,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._name = name
        self._command = tuple(command)
        self._max_processes = max_processes
        self._start_s = start_s
        # What it has no use for, first of all our token: it reads what strangers wrote.
        self._environ = {name: value for name, value in environ.items() if not name.startswith("STATOR_")}
        if max_bytes is not None:
            self._environ["KILLABLE_MAX_BYTES"] = str(max_bytes)
        self._waiting: deque[_Job] = deque()
        self._idle: deque[asyncio.Event] = deque()
        self._num_processes = 0
        self._tasks = TaskOwner("killable pool")
        self.closed = False

    def submit(
        self, payload: bytes, timeout_s: float, wanted: Callable[[], bool] = lambda: True
    ) -> "asyncio.Future[bytes]":
        """The answer, or JobFailed. timeout_s: for the work, not for the wait before it. wanted: asked before the work
        begins; a job that is not any more is cancelled. One that has begun goes on until its time is over."""
        job = _Job(payload, timeout_s, wanted, asyncio.get_running_loop().create_future())
        if self.closed:
            job.answer.set_exception(PoolUnavailable("the pool has closed"))
            return job.answer
        self._waiting.append(job)
        if self._idle:
            self._idle.popleft().set()
        elif self._num_processes < self._max_processes:
            self._num_processes += 1
            self._tasks.spawn(self._serve(), f"process {self._num_processes}")
        return job.answer

    async def close(self) -> None:
        """End the processes; jobs without an answer fail. Idempotent."""
        self.closed = True
        await self._tasks.close()
        while self._waiting:
            _fail(self._waiting.popleft(), PoolUnavailable("the pool has closed"))

    async def _serve(self) -> None:
        child: _Child | None = None
        try:
            while True:
                job = await self._next()
                try:
                    child = child or await self._start()
                    async with asyncio.timeout(job.timeout_s):
                        kind, answer = await child.ask(job.payload)
                except TimeoutError:
                    child = await _end(child)
                    size, seconds = len(job.payload), job.timeout_s
                    logger.warning("%s: a job of %d bytes was killed after %g seconds", self._name, size, seconds)
                    _fail(job, JobTooLong(f"not done in {seconds:g} seconds"))
                except _Gone as gone:
                    child = await _end(child)
                    logger.warning("%s: over a job of %d bytes %s", self._name, len(job.payload), gone)
                    _fail(job, JobKilled(str(gone)))
                except PoolUnavailable as error:
                    logger.error("%s does not start (%s): %s", self._name, " ".join(self._command), error)
                    _fail(job, error)
                except asyncio.CancelledError:
                    _fail(job, PoolUnavailable("the pool has closed"))
                    raise
                else:
                    if kind == ANSWERED and not job.answer.done():
                        job.answer.set_result(answer)
                    elif kind != ANSWERED:
                        _fail(job, JobFailed(answer.decode(errors="replace")))
        finally:
            await _end(child)

    async def _next(self) -> _Job:
        while True:
            while self._waiting:
                job = self._waiting.popleft()
                if not job.answer.done() and job.wanted():
                    return job
                job.answer.cancel()
            some = asyncio.Event()
            self._idle.append(some)
            await some.wait()

    async def _start(self) -> "_Child":
        child = None
        try:
            child = _Child(
                await asyncio.create_subprocess_exec(
                    *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=self._environ
                )
            )
            async with asyncio.timeout(self._start_s):
                await child.receive()
        except BaseException as error:
            await _end(child)
            if isinstance(error, TimeoutError):
                raise PoolUnavailable(f"not ready in {self._start_s:g} seconds") from None
            if isinstance(error, OSError | _Gone):
                raise PoolUnavailable(str(error)) from None
            raise
        return child


class _Gone(Exception):
    """A process that has ended."""


class _Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process = process
        self._stdin, self._stdout = process.stdin, process.stdout

    async def ask(self, payload: bytes) -> tuple[int, bytes]:
        with contextlib.suppress(ConnectionError):  # then it is gone, and reading says so
            self._stdin.write(LENGTH.pack(len(payload)) + payload)
            await self._stdin.drain()
        return await self.receive()

    async def receive(self) -> tuple[int, bytes]:
        try:
            (size,) = LENGTH.unpack(await self._stdout.readexactly(LENGTH.size))
            answer = await self._stdout.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _Gone(f"the process ended with status {await self.process.wait()}") from None
        return answer[0], answer[1:]


async def _end(child: _Child | None) -> None:
    if child is not None:
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()


def _fail(job: _Job, error: JobFailed) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)
