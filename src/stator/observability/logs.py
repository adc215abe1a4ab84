"""Logging setup of every Stator process, and the line a worker writes about its engine."""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TextIO

import msgspec

from stator.errors import ConfigError
from stator.messages.engine import EngineLoad
from stator.messages.reports import RouterStats
from stator.observability.stats import worker_rates

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
FORMATS = ("text", "json")


MAX_QUEUED_LINES = 10_000
MAX_LINES_AT_ONCE = 100
GATHER_S = 0.01
FLUSH_TIMEOUT_S = 2.0
_DROPPED = "%d lines of this log were dropped: nobody read it"


def _timestamp(created: float) -> str:
    """UTC, milliseconds, sortable as text."""
    return f"{_second(int(created))}.{int(created * 1000) % 1000:03d}Z"


@lru_cache(maxsize=8)
def _second(created: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z LEVEL source message`, without source if that is empty; a traceback follows on its own
    lines."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = f"{source} " if source else ""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record.created)} {record.levelname} {self._source}{record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, component, instance, logger, message, and traceback if there is one."""

    def __init__(self, component: str, instance: str) -> None:
        super().__init__()
        self._component = component
        self._instance = instance
        self._encoder = msgspec.json.Encoder()

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _timestamp(record.created),
            "level": record.levelname,
            "component": self._component,
            "instance": self._instance,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return self._encoder.encode(fields).decode()


class BackgroundHandler(logging.Handler):
    """Gives formatted lines to `write` on a thread of its own: a log that nobody reads, or whose disk is full, must not
    hold the event loop that logs.

    A line after a pause is written at once. Those that follow are gathered for GATHER_S and given to `write` together,
    up to MAX_LINES_AT_ONCE with line breaks between them: waking the thread for each would cost a busy process more
    than all else about a line.

    Lines beyond MAX_QUEUED_LINES are dropped and counted. `flush` and `close` wait until what is queued is written, for
    FLUSH_TIMEOUT_S at most.
    """

    def __init__(self, write: Callable[[str], None], max_lines: int = MAX_QUEUED_LINES) -> None:
        super().__init__()
        self._write_lines = write
        self._max_lines = max_lines
        self._num_dropped = 0
        self._begin()
        _restart_after_fork(self)
        # dictConfig also takes it from those that logging flushes at the end.
        atexit.register(_flush_if_alive, weakref.ref(self))

    def _begin(self) -> None:
        self._lines = _Lines()
        self._writer: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines.waiting) >= self._max_lines:
            self._num_dropped += 1
            return
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._num_dropped:
            self._put(self.format(_lines_dropped(self._num_dropped)))
            self._num_dropped = 0
        self._put(line)

    def _put(self, line: str) -> None:
        self._lines.put(line)
        if self._writer is None:
            self._writer = threading.Thread(
                target=_write_all, args=(self._lines, self._write_lines), name="log", daemon=True
            )
            self._writer.start()

    def flush(self) -> None:
        if self._writer is not None and threading.current_thread() is not self._writer:
            written = threading.Event()
            self._lines.put(written)
            written.wait(FLUSH_TIMEOUT_S)

    def close(self) -> None:
        """What is logged later is written all the same: `logging.config.dictConfig`, which libraries call when they are
        imported, closes every handler that there is, also those that stay in use."""
        self.flush()
        self._lines.put(None)
        self._begin()
        super().close()


class _Lines:
    """From the threads that log to the one that writes. An event is set when what came before it is written; None
    ends the writer."""

    def __init__(self) -> None:
        self.waiting: deque[str | threading.Event | None] = deque()
        self.some = threading.Event()

    def put(self, item: str | threading.Event | None) -> None:
        self.waiting.append(item)
        if not self.some.is_set():
            self.some.set()


def _write_all(lines: _Lines, write: Callable[[str], None]) -> None:
    ended = False
    while not ended:
        lines.some.wait()
        lines.some.clear()
        ended = _write_waiting(lines.waiting, write)
        if not ended:
            time.sleep(GATHER_S)


def _write_waiting(waiting: "deque[str | threading.Event | None]", write: Callable[[str], None]) -> bool:
    """Whether the writer is to end."""
    while waiting:
        batch: list[str] = []
        item = waiting.popleft()
        while isinstance(item, str):
            batch.append(item)
            if len(batch) == MAX_LINES_AT_ONCE or not waiting:
                break
            item = waiting.popleft()
        if batch:
            with contextlib.suppress(OSError, ValueError):
                write("\n".join(batch))
        if item is None:
            return True
        if isinstance(item, threading.Event):
            item.set()
    return False


def _flush_if_alive(handler: "weakref.ref[BackgroundHandler]") -> None:
    if (alive := handler()) is not None:
        alive.flush()


def _lines_dropped(count: int) -> logging.LogRecord:
    fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": _DROPPED, "args": (count,)}
    return logging.makeLogRecord(fields)


class LineHandler(logging.Handler):
    """Gives formatted lines to `write`, which must not wait."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write_line = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write_line(self.format(record))
        except Exception:
            self.handleError(record)


def _restart_after_fork(handler: BackgroundHandler) -> None:
    """A forked process has the handler, but not its thread."""
    found = weakref.ref(handler)

    def restart() -> None:
        if (alive := found()) is not None:
            alive._begin()  # pyright: ignore[reportPrivateUsage]

    os.register_at_fork(after_in_child=restart)


def write_to_stderr(lines: str) -> None:
    sys.stderr.write(lines + "\n")
    sys.stderr.flush()


def setup_logging(
    component: str,
    instance: str,
    *,
    environ: Mapping[str, str] = os.environ,
    stream: TextIO | None = None,
    handler: logging.Handler | None = None,
    prefixed: bool = False,
) -> None:
    """Send the root logger's records to handler, or to stream (default stderr), replacing handlers it had.

    prefixed: whoever reads the stream puts the source before each line of text, as the supervisor does.

    STATOR_LOG_LEVEL (default INFO) and STATOR_LOG_FORMAT (text or json) come from environ. Raises ConfigError for
    other values.
    """
    level = environ.get("STATOR_LOG_LEVEL", "INFO").upper()
    if level not in LEVELS:
        raise ConfigError(f"STATOR_LOG_LEVEL is {environ['STATOR_LOG_LEVEL']!r}; expected one of {', '.join(LEVELS)}")
    form = environ.get("STATOR_LOG_FORMAT", "text").lower()
    if form not in FORMATS:
        raise ConfigError(f"STATOR_LOG_FORMAT is {form!r}; expected one of {', '.join(FORMATS)}")
    source = "" if prefixed else f"{component}[{instance}]"
    formatter = JsonFormatter(component, instance) if form == "json" else TextFormatter(source)
    if handler is None:
        handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def format_worker_stats(before: EngineLoad, after: EngineLoad, seconds: float) -> str:
    """The line a worker logs every five seconds, from two readings that are `seconds` apart."""
    rates = worker_rates(before, after, seconds)
    return (
        f"Avg prompt throughput: {rates.prompt_tokens_per_s:.1f} tokens/s, "
        f"Avg generation throughput: {rates.generation_tokens_per_s:.1f} tokens/s, "
        f"Running: {after.num_running} reqs, Waiting: {after.num_waiting} reqs, "
        f"KV cache usage: {rates.kv_usage:.1%}, Prefix cache hit rate: {rates.prefix_hit_rate:.1%}"
    )


def format_router_stats(before: RouterStats, after: RouterStats, seconds: float) -> str:
    """The line a router logs every five seconds while workers are full, from two readings so far apart."""
    refused = sum(after.refusals.values()) - sum(before.refusals.values())
    return (
        f"Waiting for a worker with room: {after.num_waiting} reqs, {after.num_waiting_tokens} prompt tokens, "
        f"Refused: {refused} reqs in {seconds:.0f} s, Running: {after.num_bookings} reqs"
    )
