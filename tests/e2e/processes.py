"""Runs `stator` as a user does: as a subprocess whose output is read line by line."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "llm"


STARTED: list["Serve"] = []
"""Every command of this test run: what a failing set-up left running is killed at the end (conftest.py)."""


class Serve:
    """One `stator` command, its output and its process tree."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        state_dir: Path,
        namespace: str | None = None,
        cwd: Path = EXAMPLES,
        env: dict[str, str] | None = None,
        output: Path | None = None,
        own_tmp: bool = False,
    ) -> None:
        """namespace: the network namespace it runs in. output: where its output goes, in place of `lines`. own_tmp:
        with a directory for temporary files that no other command sees, as on a host of its own: its Unix sockets lie
        there.
        """
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        if own_tmp:
            # `ip netns exec` has made a mount namespace.
            assert namespace is not None
            inside += ["sh", "-c", 'mount -t tmpfs none "$TMPDIR" && exec "$@"', "sh"]
            tmp = state_dir / "tmp"
            tmp.mkdir(parents=True, exist_ok=True)
            env = {"TMPDIR": str(tmp), **(env or {})}
        command = [*inside, sys.executable, "-m", "stator.cli.main", *arguments]
        environment = {**os.environ, "XDG_STATE_HOME": str(state_dir), "PYTHONUNBUFFERED": "1", **(env or {})}
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._closed = False
        self._may_read = threading.Event()
        self._may_read.set()
        with contextlib.nullcontext(subprocess.PIPE) if output is None else output.open("ab") as stdout:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        STARTED.append(self)

    def _read(self) -> None:
        for line in self.process.stdout or ():
            with self._changed:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self._changed.notify_all()
            self._may_read.wait()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Nobody reads its output, so that the pipe fills."""
        self._may_read.clear()
        try:
            yield
        finally:
            self._may_read.set()

    @property
    def output(self) -> str:
        with self._changed:
            return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 60, start: int = 0) -> re.Match[str]:
        """The first line from index start on that matches. Fails with the whole output."""
        deadline = time.monotonic() + timeout_s
        seen = start
        with self._changed:
            while True:
                while seen < len(self.lines):
                    match = re.search(pattern, self.lines[seen])
                    if match:
                        return match
                    seen += 1
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    why = "the command ended" if self._closed else f"{timeout_s:g} s passed"
                    raise AssertionError(f"no line matches {pattern!r}; {why}. Output:\n" + "\n".join(self.lines))
                self._changed.wait(left)

    def tree(self) -> list[psutil.Process]:
        """This command's processes, itself first."""
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT to the foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill_tree(self) -> None:
        """kill -9 of everything, as when the power of a node goes."""
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait(10)
        self._close()

    def kill(self) -> None:
        """kill -9 of the supervisor alone."""
        self.process.kill()
        self.process.wait(10)

    def _close(self) -> None:
        self._may_read.set()
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self, timeout_s: float = 40) -> int:
        """Ctrl-C, and every process of the tree must be gone. Returns the exit code."""
        tree = self.tree()
        if self.process.poll() is None:
            self.interrupt()
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_tree()
            raise AssertionError(f"still running {timeout_s:g} s after Ctrl-C. Output:\n{self.output}") from None
        _, alive = psutil.wait_procs(tree, timeout=5)
        self._close()
        assert not alive, f"left behind: {alive}. Output:\n{self.output}"
        return code


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
