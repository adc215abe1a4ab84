"""Output of a node: the children's lines with a prefix, and what the supervisor itself says."""

import os
import queue
import sys
import threading
from typing import BinaryIO

from stator.config import environment
from stator.observability.logs import LineHandler, setup_logging

MAX_QUEUED_LINES = 10_000
CLOSE_TIMEOUT_S = 2.0

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


class Terminal:
    """Writes lines to stdout and stderr from a thread: a terminal that is held (Ctrl-S) must not hold the hub.

    Lines beyond MAX_QUEUED_LINES are dropped and counted, and so are those for a closed pipe. Colour only on a
    terminal; JSON log lines pass unchanged, for those who parse them.
    """

    def __init__(self, stdout: BinaryIO | None = None, stderr: BinaryIO | None = None) -> None:
        self._stdout = stdout or sys.stdout.buffer
        self._stderr = stderr or sys.stderr.buffer
        self._colours: dict[str, int] = {}
        self._json = environment.json_logs()
        self._num_dropped = 0
        self._closed = False
        self._queue: queue.Queue[tuple[BinaryIO, bytes] | None] = queue.Queue(MAX_QUEUED_LINES)
        self._writer = threading.Thread(target=self._write, name="terminal", daemon=True)
        self._writer.start()

    def child_line(self, label: str, line: bytes, *, error: bool) -> None:
        out = self._stderr if error else self._stdout
        if self._json and line.startswith(b"{"):
            self._put(out, line)
            return
        prefix = f"[{label}]"
        if environment.colour() and out.isatty():
            colour = self._colours.setdefault(label, _COLOURS[len(self._colours) % len(_COLOURS)])
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        self._put(out, prefix.encode() + b" " + line)

    def say(self, text: str) -> None:
        self._put(self._stdout, text.encode())

    def complain(self, text: str) -> None:
        self._put(self._stderr, text.encode())

    def close(self) -> None:
        """Write what is queued, if it can be written soon. What comes later is written at once."""
        try:
            self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._writer.join(CLOSE_TIMEOUT_S)
        self._closed = not self._writer.is_alive()

    def _put(self, out: BinaryIO, line: bytes) -> None:
        if self._closed:
            self._write_line(out, line, flush=True)
            return
        if self._num_dropped:
            note = f"stator: {self._num_dropped} lines were dropped: nobody read the output".encode()
            try:
                self._queue.put_nowait((self._stderr, note))
                self._num_dropped = 0
            except queue.Full:
                pass
        try:
            self._queue.put_nowait((out, line))
        except queue.Full:
            self._num_dropped += 1

    def _write(self) -> None:
        while (entry := self._queue.get()) is not None:
            out, line = entry
            self._write_line(out, line, flush=self._queue.empty() or out is self._stderr)
        for out in (self._stdout, self._stderr):
            try:
                out.flush()
            except (OSError, ValueError):
                continue

    def _write_line(self, out: BinaryIO, line: bytes, *, flush: bool) -> None:
        try:
            out.write(line + b"\n")
            if flush:
                out.flush()
        except (OSError, ValueError):
            pass


def log_to(terminal: Terminal, namespace: str) -> None:
    """What this process itself logs: warnings, for what a hub has to say about its leases is not for the terminal of a
    node unless it is asked for. Not straight to stderr, which may be a pipe that nobody reads. Raises ConfigError."""
    level = {"STATOR_LOG_LEVEL": "WARNING", **os.environ}
    setup_logging("stator", namespace, environ=level, handler=LineHandler(terminal.complain))
