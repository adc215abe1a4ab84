"""Hosts as network namespaces joined by a bridge, which itself lives in a namespace: nothing touches this machine's
own network."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

SUBNET = "10.77.0"
_CLONE_NEWNET = 0x40000000


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Host:
    name: str
    namespace: str
    address: str


class Hosts:
    """Use as a context manager. Names carry the pid, so that two test runs do not meet."""

    def __init__(self, *names: str) -> None:
        prefix = f"st{os.getpid() % 100000}"
        self._switch = f"{prefix}-sw"
        self.hosts = [
            Host(name, f"{prefix}-{name}", f"{SUBNET}.{number}") for number, name in enumerate(names, start=1)
        ]

    def __enter__(self) -> list[Host]:
        try:
            run("ip", "netns", "add", self._switch)
            run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            run("ip", "-n", self._switch, "link", "set", "br0", "up")
            for number, host in enumerate(self.hosts):
                self._add(host, f"p{number}")
        except BaseException:
            self.__exit__()
            raise
        return self.hosts

    def _add(self, host: Host, port: str) -> None:
        run("ip", "netns", "add", host.namespace)
        run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        run(
            "ip",
            "-n",
            self._switch,
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            host.namespace,
        )
        run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
        # A host without a default route must still find its own address.
        run("ip", "-n", host.namespace, "route", "add", "default", "via", f"{SUBNET}.254", "dev", "eth0")

    def unplug(self, host: Host) -> None:
        """Its cable: what is on its way is lost, and nobody is told."""
        run("ip", "-n", self._switch, "link", "set", self._port(host), "down")

    def plug(self, host: Host) -> None:
        run("ip", "-n", self._switch, "link", "set", self._port(host), "up")

    def _port(self, host: Host) -> str:
        return f"p{self.hosts.index(host)}"

    def __exit__(self, *_: object) -> None:
        for name in [*(host.namespace for host in self.hosts), self._switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)


@contextlib.contextmanager
def on_host(host: Host) -> Iterator[None]:
    """This thread, and those that it starts, are on that host: their sockets and their child processes."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(namespace: int) -> None:
        if libc.setns(namespace, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {host.namespace}")

    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/run/netns/{host.namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            enter(before)
    finally:
        os.close(before)
