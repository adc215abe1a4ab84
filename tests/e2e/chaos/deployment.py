"""A deployment of real processes on several hosts, which scenes break and look into from outside."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import aiohttp
import psutil
from hosts import Host, Hosts
from metrics import Sample, parse
from processes import EXAMPLES, Serve

from chaos.load import Body, Load, Stream, key_of, story
from chaos.planes import ControlPlane, Embedded, External
from stator.ids import InstanceId, RequestId
from stator.messages.instances import DRAIN_ENDPOINT, INSTANCES_PREFIX, DrainProgress, DrainRequest, InstanceInfo
from stator.messages.reports import ReportRequest, WorkerReport
from stator.runtime.context import CallContext
from stator.transport import calls
from stator.transport.base import Target
from stator.transport.settings import Identity

TOKEN = "chaos-suite-token-0123456789abcdef"
LOOK_EVERY_S = 0.02
PORT = 8000
CLIENT = "client"

NO_WORKERS = ("--VllmWorker.ServiceArgs.workers=0", "--PrefillWorker.ServiceArgs.workers=0")
NO_ROUTER = ("--Router.ServiceArgs.colocate=false", "--Router.ServiceArgs.workers=0")


@dataclass(frozen=True)
class Lane:
    """A deployment of its own that plays its scenes one after another, beside the other lanes.

    num_etcd: members, on the external plane. flags: of every node.
    """

    name: str
    num_etcd: int
    flags: tuple[str, ...] = ()

    @property
    def host_names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{role}" for role in ("store", "head", "decode", "prefill1", "prefill2"))


class Deployment:
    """`start` before use, `close` after. Hosts: one for the control plane, a head (Frontend and Processor in a process,
    Router in another), one with two decode workers, two with a prefill worker each.

    roles: how many workers there are when all is well. client: the host that this runs on.
    """

    def __init__(self, plane: str, lane: Lane, network: Hosts, state_dir: Path) -> None:
        self.plane, self.lane, self.network, self.state_dir = plane, lane, network, state_dir
        by_name = {host.name: host for host in network.hosts}
        self.client = by_name[CLIENT]
        self.hosts = {name.removeprefix(f"{lane.name}-"): by_name[name] for name in lane.host_names}
        self.namespace = f"chaos-{lane.name}"
        self.nodes: dict[str, Serve] = {}
        self.roles = {"decode": 2, "prefill": 2}
        self.directory = state_dir / "graph"
        self.orders = self.directory / "orders"
        self.loads: list[Load] = []
        self._guests: set[str] = set()
        self._texts: dict[str, tuple[str, int]] = {}
        self._salt = 0
        self.control: ControlPlane = (
            Embedded(self.hosts["store"], self.namespace, self._command)
            if plane == "embedded"
            else External(self.hosts["store"], state_dir / "store", num_members=lane.num_etcd)
        )

    async def start(self) -> None:
        self.orders.mkdir(parents=True)
        for name in ("components", "configs"):
            (self.directory / name).symlink_to(EXAMPLES / name)
        shutil.copy(Path(__file__).with_name("faulty.py"), self.directory)
        await self.control.start()
        self.node("head", "head", "faulty.py", *NO_WORKERS, "--Router.ServiceArgs.colocate=false")
        self.node("decode", "decode", "faulty.py:VllmWorker", "--VllmWorker.ServiceArgs.workers=2")
        for name in ("prefill1", "prefill2"):
            self.node_of_prefill(name)
        identity = Identity(self.namespace, InstanceId(f"observer-{uuid4().hex[:8]}"), "observer", TOKEN)
        self.planes = self.control.planes(identity)
        await self.planes.start()
        self.load = self.load_at(PORT)
        await self.whole(120)
        await self.until_served()
        self.num_processes = self.count_processes()

    def load_at(self, port: int, host: str = "head") -> Load:
        self.loads.append(Load(f"http://{self.hosts[host].address}:{port}"))
        return self.loads[-1]

    def node_of_prefill(self, name: str) -> Serve:
        return self.node(name, name, "faulty.py:PrefillWorker")

    def node(
        self,
        name: str,
        host: str,
        target: str,
        *more: str,
        env: dict[str, str] | None = None,
        output: Path | None = None,
    ) -> Serve:
        """A `stator serve` on that host, under a name of the test's."""
        where = ["-f", "configs/tiny.yaml", "--namespace", self.namespace, *self.control.flags]
        # A worker's target starts what it is linked to.
        alone = NO_WORKERS[1:] if target.endswith(":VllmWorker") else ()
        command = ["serve", target, *where, "--VllmWorker.progress-timeout=2", *alone, *self.lane.flags, *more]
        return self._command(name, self.hosts[host], command, env=env, output=output)

    def _command(
        self,
        name: str,
        host: Host,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        output: Path | None = None,
    ) -> Serve:
        both = {**self.control.env, "STATOR_TOKEN": TOKEN, **(env or {})} if name != "hub" else {"STATOR_TOKEN": TOKEN}
        state = self.state_dir / f"state-{name}"
        self.nodes[name] = Serve(
            command,
            state_dir=state,
            env=both,
            cwd=self.directory,
            namespace=host.namespace,
            output=output,
            own_tmp=True,
        )
        return self.nodes[name]

    @contextlib.asynccontextmanager
    async def joined(self, name: str, host: str, target: str, *more: str, **options: object) -> AsyncIterator[Serve]:
        """A node for the length of one scene; it is not waited for. Nothing of it is left when it has stopped."""
        self._guests.add(name)
        node = self.node(name, host, target, *more, **options)  # type: ignore[arg-type]
        try:
            yield node
        except BaseException as error:
            error.add_note(f"{name}:\n    " + "\n    ".join(node.lines[-60:]))
            raise
        finally:
            del self.nodes[name]
            await asyncio.to_thread(node.stop)
            self._guests.discard(name)

    # What is there

    def instances(self, role: str) -> list[InstanceInfo]:
        return self.planes.directory.instances(role=role)

    def instances_of(self, node: Serve, role: str) -> list[InstanceInfo]:
        pids = {process.pid for process in node.tree()}
        return [instance for instance in self.instances(role) if instance.pid in pids]

    async def whole(self, timeout_s: float = 60) -> None:
        """Until every worker is there and ready."""
        try:
            await self.planes.directory.wait_for(
                lambda _: all(len(self.instances(role)) == n for role, n in self.roles.items()), timeout_s
            )
        except Exception as error:
            there = {role: [i.instance_id for i in self.instances(role)] for role in self.roles}
            raise AssertionError(f"not whole again after {timeout_s:g} s: {there}") from error

    async def until(self, holds: Callable[[], bool], timeout_s: float, what: str) -> float:
        """Seconds until it held. Fails with `what`."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while not holds():
            assert loop.time() - begin < timeout_s, f"still not so after {timeout_s:g} s: {what}"
            await tick()
        return loop.time() - begin

    async def report(self, instance: InstanceInfo) -> WorkerReport:
        """What this worker says now."""
        context = CallContext(RequestId(uuid4().hex), asyncio.get_running_loop().time() + 10)
        target = Target(instance.addresses, "report", instance.instance_id)
        lists = calls.stream(self.planes.client, target, ReportRequest(), context=context, item_type=WorkerReport)
        async with contextlib.aclosing(lists):
            async for items in lists:
                return items[0]
        raise AssertionError(f"{instance.instance_id} ended its reports")

    async def reports(self, *roles: str) -> dict[str, WorkerReport]:
        found: dict[str, WorkerReport] = {}
        for role in roles or tuple(self.roles):
            for instance in self.instances(role):
                found[instance.instance_id] = await self.report(instance)
        return found

    async def busiest(self, role: str) -> InstanceInfo:
        by_load = [(await self.report(i), i) for i in self.instances(role)]
        return max(by_load, key=lambda pair: pair[0].load.num_running + pair[0].load.num_waiting)[1]

    async def until_served(self, load: Load | None = None) -> float:
        """Seconds until a request is answered."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        async with asyncio.timeout(60):
            while not (await (load or self.load).send([story(0, max_tokens=1)]))[0].completed:
                await tick()
        return loop.time() - begin

    async def until_busy(self, role: str) -> None:
        """Until a worker of that role computes."""
        async with asyncio.timeout(30):
            while not any(report.load.num_running for report in (await self.reports(role)).values()):
                await tick()

    async def transferring(self) -> InstanceInfo:
        """A prefill worker whose finished blocks wait to be fetched, or are being fetched."""
        async with asyncio.timeout(30):
            while True:
                for instance in self.instances("prefill"):
                    if (await self.report(instance)).load.num_blocks_held:
                        return instance
                await tick()

    async def until_registered(self, instance_ids: set[str]) -> float:
        """Seconds until the store, not only our view of it, has these instances."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        async with asyncio.timeout(40):
            while True:
                found = await self.planes.discovery.get_prefix(INSTANCES_PREFIX)
                if instance_ids <= {entry.key.rpartition("/")[2] for entry in found}:
                    return loop.time() - begin
                await tick()

    async def all_ended(self) -> None:
        """Until every request of this load has ended."""
        await self.until(lambda: not self.load.num_open, 90, "all requests have ended")

    async def blocks_used(self) -> int:
        return sum(r.load.num_blocks_used for r in (await self.reports()).values())

    async def until_free(self, timeout_s: float) -> float | None:
        """Seconds until no worker has a block in use; None if that took longer."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while await self.blocks_used():
            if loop.time() - begin > timeout_s:
                return None
            await tick()
        return loop.time() - begin

    async def metrics(self, port: int = PORT) -> list[Sample]:
        url = f"http://{self.hosts['head'].address}:{port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return parse(await response.text())

    def count_processes(self) -> int:
        """Of all nodes but those that are here for one scene."""
        nodes = [serve for name, serve in self.nodes.items() if name not in self._guests]
        return sum(_is_there(process) for serve in nodes for process in serve.tree())

    # What is done to it

    def order(self, name: str, what: str = "") -> None:
        """See faulty.py."""
        (self.orders / name).write_text(what)

    def revoke(self, name: str) -> None:
        (self.orders / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def ordered(self, name: str, what: str = "") -> Iterator[None]:
        self.order(name, what)
        try:
            yield
        finally:
            self.revoke(name)

    def num_exported(self, instance: InstanceInfo) -> int:
        """KV blocks that this prefill worker has handed over."""
        try:
            return (self.orders / f"exported-{instance.pid}").stat().st_size
        except FileNotFoundError:
            return 0

    def kill(self, instance: InstanceInfo) -> None:
        os.kill(instance.pid, signal.SIGKILL)

    def freeze(self, instance: InstanceInfo) -> None:
        os.kill(instance.pid, signal.SIGSTOP)

    def thaw(self, instance: InstanceInfo) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(instance.pid, signal.SIGCONT)

    def terminate(self, instance: InstanceInfo) -> None:
        os.kill(instance.pid, signal.SIGTERM)

    async def drain(self, instance: InstanceInfo, *, restart: bool) -> None:
        """What `stator drain` does."""
        context = CallContext(RequestId(uuid4().hex), asyncio.get_running_loop().time() + 120)
        target = Target(instance.addresses, DRAIN_ENDPOINT, instance.instance_id)
        request = DrainRequest(restart=restart)
        lists = calls.stream(self.planes.client, target, request, context=context, item_type=DrainProgress)
        async with contextlib.aclosing(lists):
            async for items in lists:
                if items[-1].phase.is_last:
                    return
        raise AssertionError(f"the drain of {instance.instance_id} ended too soon")

    # What it should answer

    def salt(self) -> str:
        """For prompts whose blocks no worker has: the text of an answer does not depend on it."""
        self._salt += 1
        return f"salt {self._salt}"

    async def learn(self, bodies: list[Body]) -> None:
        """What is answered to these while nothing is broken."""
        new = list({key_of(body): body for body in bodies if key_of(body) not in self._texts}.values())
        while new:
            batch, new = new[:8], new[8:]
            for stream in await self.load.send(batch):
                assert stream.completed, (stream.status, stream.errors)
                self._texts[key_of(stream.body)] = stream.text, stream.num_tokens

    def expected(self, stream: Stream) -> str:
        return self._texts[key_of(stream.body)][0]

    def expected_tokens(self, stream: Stream) -> int:
        return self._texts[key_of(stream.body)][1]

    async def close(self) -> None:
        for load in self.loads:
            await load.close()
        if hasattr(self, "planes"):
            await self.planes.close()
        nodes = [serve for name, serve in self.nodes.items() if name != "hub" and serve.process.poll() is None]
        await asyncio.gather(*(asyncio.to_thread(serve.stop, 60) for serve in reversed(nodes)))
        await self.control.close()


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def tick() -> None:
    turn = asyncio.Event()
    asyncio.get_running_loop().call_later(LOOK_EVERY_S, turn.set)
    await turn.wait()


async def pause(seconds: float) -> None:
    """For faults that last: not to wait for something."""
    turn = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, turn.set)
    await turn.wait()
