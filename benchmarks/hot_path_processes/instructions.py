"""Counts the instructions of a process in user mode, under valgrind: a figure that does not depend on what else the
machine does, to compare two versions of the code. What the kernel does is not in it.
"""

import asyncio
import shutil
import tempfile
from pathlib import Path

TIMEOUT_S = 120


class Counter:
    """python: takes the interpreter's place for the process that is counted. Use as a context manager."""

    def __init__(self, python: str) -> None:
        if shutil.which("callgrind_control") is None:
            raise SystemExit("--instructions needs valgrind: apt install valgrind")
        self._directory = tempfile.TemporaryDirectory(prefix="stator-instructions-")
        self._out = Path(self._directory.name)
        wrapper = self._out / "python"
        options = f"--tool=callgrind --instr-atstart=no --callgrind-out-file={self._out}/out.%p --quiet"
        wrapper.write_text(f'#!/bin/sh\nexec valgrind {options} {python} "$@"\n')
        wrapper.chmod(0o755)
        self.python = str(wrapper)

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    async def start(self, pid: int) -> None:
        await self._control(pid, "--instr=on")
        await self._control(pid, "--zero")

    async def stop(self, pid: int) -> int:
        """Instructions since `start`."""
        await self._control(pid, f"--dump={pid}")
        await self._control(pid, "--instr=off")
        newest = max(self._out.glob(f"out.{pid}.*"), key=lambda path: int(path.suffix[1:]))
        for line in newest.read_text().splitlines():
            if line.startswith(("summary:", "totals:")):
                return int(line.split()[1])
        raise RuntimeError(f"{newest} has no total")

    async def _control(self, pid: int, option: str) -> None:
        process = await asyncio.create_subprocess_exec(
            "callgrind_control", option, str(pid), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"callgrind_control {option} {pid}: {output.decode()}")
