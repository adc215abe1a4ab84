"""etcd, nats-server and Prometheus as real processes on loopback, the first two on another host as well, for contract
suites and tests against them.

Each has a directory of its own for its data and its log, and keeps its port over restarts. A server is ended by its
pid; what a broken test left running is ended by `end_all`.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STARTED: set[int] = set()
START_TIMEOUT_S = 30.0


def missing_servers() -> list[str]:
    """Names of the Debian packages that are not installed here."""
    programs = {"etcd": "etcd-server", "nats-server": "nats-server", "prometheus": "prometheus"}
    return [package for program, package in programs.items() if _find(program) is None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_all() -> None:
    for pid in list(STARTED):
        STARTED.discard(pid)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@dataclass(frozen=True)
class Place:
    """Where a server listens, and what its command is put behind to run there (`ip netns exec NAME`)."""

    address: str = "127.0.0.1"
    inside: tuple[str, ...] = ()


LOOPBACK = Place()


class Server:
    """One process. ready: a line of its output that means that it answers. place: its address, and where it runs."""

    ready = ""

    def __init__(self, directory: Path, place: Place = LOOPBACK) -> None:
        self.directory = directory
        self.place = place
        self.process: asyncio.subprocess.Process | None = None
        self.log: list[str] = []
        self._drain: asyncio.Task[None] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    async def start(self, *, wait: bool = True) -> None:
        """wait False: do not wait until it answers, since it needs others for that."""
        program, *arguments = self.command()
        path = _find(program)
        assert path is not None, f"{program} is not installed"
        self.process = await asyncio.create_subprocess_exec(
            *self.place.inside,
            path,
            *arguments,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=self.directory,
            limit=1 << 20,
        )
        STARTED.add(self.process.pid)
        ready = asyncio.Event()
        self._drain = asyncio.get_running_loop().create_task(self._read(self.process, ready))
        if wait:
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    await ready.wait()
            except TimeoutError:
                raise AssertionError(f"{program} did not start:\n" + "\n".join(self.log[-20:])) from None
            assert self.process.returncode is None, f"{program} ended:\n" + "\n".join(self.log[-20:])

    async def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        process, self.process = self.process, None
        if process is not None:
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(how)
            await process.wait()
            STARTED.discard(process.pid)
        drain, self._drain = self._drain, None
        if drain is not None:
            await drain

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    async def wipe(self) -> None:
        """End it, and delete its data."""
        await self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)

    async def _read(self, process: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self.log.append(line.decode(errors="replace").rstrip())
            del self.log[:-500]
            if self.ready in self.log[-1]:
                ready.set()
        ready.set()


class EtcdServer(Server):
    """peers: peer addresses of all members by name, this one among them; alone without."""

    ready = "serving client traffic"

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "one",
        peers: dict[str, str] | None = None,
        scheme: str = "http",
        options: Sequence[str] = (),
        place: Place = LOOPBACK,
    ) -> None:
        super().__init__(directory, place)
        self.name = name
        self.port = free_port()
        self.scheme = scheme
        self.peers = peers or {name: f"http://{place.address}:{free_port()}"}
        self.options = list(options)

    @property
    def address(self) -> str:
        return f"{self.scheme}://{self.place.address}:{self.port}"

    def command(self) -> Sequence[str]:
        peer = self.peers[self.name]
        cluster = ",".join(f"{name}={address}" for name, address in self.peers.items())
        return [
            *("etcd", "--name", self.name, "--data-dir", str(self.directory / "data")),
            *("--listen-client-urls", self.address, "--advertise-client-urls", self.address),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", cluster),
            *("--heartbeat-interval", "30", "--election-timeout", "300", "--logger", "zap"),
            *self.options,
        ]


class NatsServer(Server):
    """config: lines added to its configuration file, for accounts and TLS."""

    ready = "Server is ready"

    def __init__(self, directory: Path, *, config: str = "", place: Place = LOOPBACK) -> None:
        super().__init__(directory, place)
        self.port = free_port()
        self.config = config

    @property
    def address(self) -> str:
        return f"nats://{self.place.address}:{self.port}"

    def command(self) -> Sequence[str]:
        path = self.directory / "nats.conf"
        store = self.directory / "jetstream"
        listen = f"host: {self.place.address}\nport: {self.port}"
        path.write_text(f'{listen}\njetstream {{ store_dir: "{store}" }}\n{self.config}\n')
        return ["nats-server", "-c", str(path)]


def _find(program: str) -> str | None:
    # nats-server is in a directory for administrators, which not every user's PATH has.
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
