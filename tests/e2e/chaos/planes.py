"""The control planes that the suite runs on: a hub of its own, or real etcd and NATS."""

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hosts import Host
from processes import Serve

from stator.config.external import EtcdSettings, ExternalPlanes, NatsSettings
from stator.graph.planes import Planes, external_planes, hub_planes
from stator.testing.real_servers import EtcdServer, NatsServer, Place, free_port
from stator.transport.settings import Identity

HUB_PORT = 7440
PLANES = ("embedded", "external")

StartCommand = Callable[[str, Host, Sequence[str]], Serve]
"""A `stator` command of the deployment: its name, where it runs, its arguments."""


class ControlPlane(Protocol):
    """env, flags: of every node. store, bus: what scenes break; the same thing on the embedded plane."""

    env: Mapping[str, str]
    flags: Sequence[str]

    async def start(self) -> None: ...

    def planes(self, identity: Identity) -> Planes: ...

    async def kill(self, *, store: bool = True, bus: bool = True) -> None: ...

    def hold(self, held: bool) -> None:
        """Store and bus stand still (SIGSTOP), or go on: what comes meanwhile is answered late."""
        ...

    async def come_back(self, *, wiped: bool = False) -> None:
        """What was killed. wiped: without what it had."""
        ...

    async def close(self) -> None: ...


class Embedded:
    """`stator hub` on a host of its own, so that the head's death is not the hub's. What it had is in its memory: it
    always comes back empty."""

    env: Mapping[str, str] = {}

    def __init__(self, host: Host, namespace: str, start: StartCommand) -> None:
        self.flags: Sequence[str] = ("--join", f"{host.address}:{HUB_PORT}")
        self._host = host
        self._namespace = namespace
        self._start = start
        self._hub: Serve | None = None

    async def start(self) -> None:
        where = ("--hub-host", self._host.address, "--hub-port", str(HUB_PORT))
        self._hub = self._start("hub", self._host, ("hub", "--namespace", self._namespace, *where))
        await asyncio.to_thread(self._hub.wait_for, "The hub is ready", 60)

    def planes(self, identity: Identity) -> Planes:
        return hub_planes(identity, (self._host.address, HUB_PORT))

    async def kill(self, *, store: bool = True, bus: bool = True) -> None:
        if self._hub is not None:
            await asyncio.to_thread(self._hub.kill_tree)
            self._hub = None

    def hold(self, held: bool) -> None:
        assert self._hub is not None
        for process in self._hub.tree():
            process.send_signal(signal.SIGSTOP if held else signal.SIGCONT)

    async def come_back(self, *, wiped: bool = False) -> None:
        if self._hub is None:
            await self.start()

    async def close(self) -> None:
        await self.kill()


ETCD_TIMING = ("--heartbeat-interval", "100", "--election-timeout", "1000")


class External:
    """etcd, of one member or three, and NATS with JetStream on a host of their own."""

    flags: Sequence[str] = ()

    def __init__(self, host: Host, directory: Path, *, num_members: int, nats_store: Path | None = None) -> None:
        place = Place(host.address, ("ip", "netns", "exec", host.namespace))
        names = [f"etcd{number}" for number in range(num_members)]
        peers = {name: f"http://{host.address}:{free_port()}" for name in names}
        self.members = [
            EtcdServer(directory / name, name=name, peers=peers, options=ETCD_TIMING, place=place) for name in names
        ]
        self.nats = NatsServer(nats_store or directory / "nats", place=place)
        self.env: Mapping[str, str] = {
            "ETCD_ENDPOINTS": ",".join(member.address for member in self.members),
            "NATS_SERVER": self.nats.address,
        }

    async def start(self) -> None:
        await asyncio.gather(*(member.start() for member in self.members), self.nats.start())

    def planes(self, identity: Identity) -> Planes:
        etcd = EtcdSettings(tuple(member.address for member in self.members))
        return external_planes(identity, ExternalPlanes(etcd, NatsSettings((self.nats.address,))))

    async def kill(self, *, store: bool = True, bus: bool = True) -> None:
        servers = [*(self.members if store else ()), *((self.nats,) if bus else ())]
        await asyncio.gather(*(server.kill() for server in servers))

    def hold(self, held: bool) -> None:
        for server in (*self.members, self.nats):
            if held:
                server.pause()
            else:
                server.resume()

    async def come_back(self, *, wiped: bool = False) -> None:
        dead = [server for server in (*self.members, self.nats) if server.process is None]
        if wiped:
            await asyncio.gather(*(server.wipe() for server in dead))
        await asyncio.gather(*(server.start() for server in dead))

    async def close(self) -> None:
        await self.kill()


class Tmpfs:
    """A small disk that can be filled. From `mount` to `unmount`."""

    def __init__(self, directory: Path, size: str) -> None:
        self.directory = directory
        self._size = size
        directory.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], check=True, timeout=30)

    def fill(self) -> None:
        with (self.directory / "ballast").open("wb", buffering=0) as ballast:
            for chunk in (1 << 16, 1 << 9):
                with contextlib.suppress(OSError):
                    while ballast.write(bytes(chunk)) == chunk:
                        pass

    def free(self) -> None:
        (self.directory / "ballast").unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.directory], check=True, timeout=30)
