"""Plays the scenes and prints a table of what came of each.

    make chaos                        # the 24 on both planes, about six minutes
    make chaos SCENES='4 killed'      # those with this number, or whose name has this word
    make chaos PLANE=external         # on etcd and NATS only
    make chaos SCENES=24 MINUTES=10

Needs root and network namespaces; etcd-server and nats-server, as Debian has them.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from chaos import suite, table
from chaos.planes import PLANES
from chaos.rows import Row, Scene
from stator.testing.real_servers import end_all, missing_servers

RESULT = "\x1e"
"""Begins a line of the table that a plane's process prints for the one that prints the table."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def play_plane(plane: str, words: list[str]) -> int:
    """In a process of its own, for it lives on a host of the suite's. The number of scenes that failed."""
    bad: list[str] = []

    async def tell(scene: Scene, outcome: suite.Outcome) -> None:
        if isinstance(outcome, Row):
            say(RESULT + table.line(scene, plane, outcome))
            if outcome.faults:
                bad.append(scene.number)
            for note in outcome.notes:
                sys.stderr.write(f"    {plane} {scene.number}: {note}\n")
        else:
            bad.append(scene.number)
            text = "".join(traceback.format_exception(outcome))
            say(f"{RESULT}| {scene.number} | {scene.name} | {plane} | failed |")
            sys.stderr.write(f"    {plane} {scene.number}: {text}\n")

    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        try:
            suite.run(plane, suite.chosen(words, plane), Path(directory), tell)
        finally:
            end_all()
    return len(bad)


def main(words: list[str]) -> int:
    planes = [plane for plane in PLANES if os.environ.get("PLANE") in (None, "", plane)]
    if packages := missing_servers():
        sys.stderr.write(f"needs: apt-get install -y {' '.join(packages)}\n")
        return 2
    begin = time.monotonic()
    say(table.heading())
    running = [
        subprocess.Popen([sys.executable, "-m", "chaos", "--plane", plane, *words], stdout=subprocess.PIPE, text=True)
        for plane in planes
    ]

    async def copy(process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        while text := await asyncio.to_thread(process.stdout.readline):
            say(text.rstrip("\n").removeprefix(RESULT))

    async def copy_all() -> None:
        await asyncio.gather(*(copy(process) for process in running))

    try:
        asyncio.run(copy_all())
    except KeyboardInterrupt:
        pass
    codes = [process.wait() for process in running]
    sys.stderr.write(f"{time.monotonic() - begin:.0f} s\n")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--plane"]:
        sys.exit(1 if play_plane(arguments[1], arguments[2:]) else 0)
    sys.exit(main(arguments))
