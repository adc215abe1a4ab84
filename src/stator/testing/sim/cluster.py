"""A deployment: hub, frontend, router and workers as nodes, each running the product's own process.

Processes are the product's `ServiceProcess` with the components of the examples, connected by the product's planes; the
hub is the product's `Hub`. What is this file's own is what a supervisor and a kernel do: start, signal, start again.
"""

import asyncio
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import stator
from stator.config.tree import Node as ConfigNode
from stator.config.tree import parse_yaml
from stator.errors import StatorError
from stator.graph.graph import Graph, build_graph
from stator.graph.planes import Planes, hub_planes
from stator.graph.process import ServiceProcess, describe_failure
from stator.graph.protocol import ChildSpec, ExitCode, Ready, Report
from stator.graph.restart import RestartLimits, RestartPolicy
from stator.graph.targets import load_target
from stator.hub.server import Hub
from stator.ids import InstanceId
from stator.runtime.tasks import TaskOwner
from stator.testing.sim.loop import Node, NodeState, SimLoop, until
from stator.testing.sim.network import Network
from stator.testing.sim.trace import Trace
from stator.testing.sim.workload import BLOCK_SIZE, MAX_MODEL_LEN, NUM_BLOCKS, SERVED_NAME
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen

HEAD = "head"
CLIENTS = "clients"
HUB_PORT = 7440
HTTP_PORT = 8000
NAMESPACE = "sim"
TOKEN = "a token that everybody here knows"
GRACE_S = 30.0
START_WITHIN_S = 60.0
KILLED = -9
TRANSFER_HOLD_S = 6.0


@dataclass(frozen=True, slots=True)
class Layout:
    """router_apart: the Router has a process of its own, as with several frontends; else it shares the frontend's."""

    num_frontends: int = 1
    num_decode: int = 2
    num_prefill: int = 1
    router_apart: bool = False
    remote_from_tokens: int = 48
    num_blocks: int = NUM_BLOCKS
    max_num_seqs: int = 6


class SimClocks:
    """Implements runtime.context.Clocks: people's time is the loop's as well."""

    def __init__(self, loop: SimLoop) -> None:
        self.perf_counter = loop.time

    def time(self) -> float:
        return 1_800_000_000.0 + self.perf_counter()


def sections(layout: Layout) -> dict[str, ConfigNode]:
    engine = f"""
  engine: sim
  model: stator:tiny-llama
  served_model_name: {SERVED_NAME}
  block-size: {BLOCK_SIZE}
  max-model-len: {MAX_MODEL_LEN}
  max-num-seqs: {layout.max_num_seqs}
  max-num-batched-tokens: 128
  num-gpu-blocks-override: {layout.num_blocks}
  transfer-hold-s: {TRANSFER_HOLD_S}
  transfer-timeout-s: 4
  step-times: 405b-h100-fp8"""
    text = f"""
Frontend:
  served_model_name: {SERVED_NAME}
  port: {HTTP_PORT}
Processor:
  model: stator:tiny-llama
  served_model_name: {SERVED_NAME}
  block-size: {BLOCK_SIZE}
  max-model-len: {MAX_MODEL_LEN}
Router:
  block-size: {BLOCK_SIZE}
  mode: kv
VllmWorker:{engine}
  remote-prefill: {"true" if layout.num_prefill else "false"}
  conditional-disagg: true
  max-local-prefill-length: {layout.remote_from_tokens}
  max-prefill-queue-size: 4
PrefillWorker:{engine}
"""
    return parse_yaml(text, "sim.yaml").children or {}


@functools.cache
def _graph(target: str) -> Graph:
    package = Path(stator.__file__).parent
    installed = package / "_examples" / "llm"
    examples = installed if installed.is_dir() else package.parents[1] / "examples" / "llm"
    if str(examples) not in sys.path:
        sys.path.insert(0, str(examples))
    return build_graph(load_target(target, examples))


class SimProcess:
    """One process of the deployment, over its lives. node, services: of the present life."""

    def __init__(self, cluster: "Cluster", label: str, services: tuple[str, ...], host: str) -> None:
        self.label = label
        self.host = host
        self.names = services
        self.node: Node | None = None
        self.process: ServiceProcess | None = None
        self.ready_at: float | None = None
        self.num_lives = 0
        self.fenced_at: list[float] = []
        self.num_disturbed = 0
        self.wanted = True
        self._cluster = cluster
        self._num_stalls = 0
        self._policy = RestartPolicy(RestartLimits())

    @property
    def alive(self) -> bool:
        return self.node is not None and self.node.state is not NodeState.DEAD

    @property
    def ready(self) -> bool:
        return self.alive and self.ready_at is not None

    def component(self, service: str) -> Any:
        """The object of a service that has started; None otherwise."""
        running = None if self.process is None else self.process.running.get(service)
        return None if running is None or not self.ready else running.instance

    def instance_id(self, service: str) -> InstanceId | None:
        running = None if self.process is None else self.process.running.get(service)
        return None if running is None else running.context.instance_id

    def resume(self) -> None:
        """As SIGCONT, whose handler runs before anything that became ready meanwhile."""
        if self.node is not None and self.node.state is NodeState.PAUSED:
            if self.process is not None:
                self.node.context.copy().run(self.process.resumed)
            self.node.resume()

    def terminate(self) -> None:
        """As SIGTERM. A paused process hears it when it goes on."""
        if self.process is not None and self.node is not None:
            self._cluster.loop.call_soon(self.process.request_stop, context=self.node.context)

    async def keep(self) -> None:
        """As the supervisor's keeper."""
        loop = self._cluster.loop
        while self.wanted:
            code = await self._live()
            self._cluster.trace.note(self.label, f"ended: {code}")
            if code == ExitCode.FENCED:
                self.fenced_at.append(loop.time())
            if not self.wanted:
                return
            ready_for_s = None if self.ready_at is None else loop.time() - self.ready_at
            delay_s = self._policy.ended(code, ready_for_s)
            if code == ExitCode.STALLED:
                self._num_stalls += 1
            if delay_s is None:
                self._cluster.problems.append(f"{self.label} failed too often and is given up")
                return
            await asyncio.sleep(delay_s)
            # A machine that is off starts nothing.
            await until(lambda: not self._cluster.network.is_gone(self.host))

    async def _live(self) -> int:
        loop = self._cluster.loop
        self.num_lives += 1
        self.ready_at = None
        node = self.node = loop.node(f"{self.label}.{self.num_lives}", self.host)
        ended: asyncio.Future[int] = loop.create_future()

        def end(code: int) -> None:
            if not ended.done():
                ended.set_result(code)

        node.on_death.append(lambda: end(KILLED))
        self.process = node.context.run(self._make_process, node)
        node.spawn(self._run(self.process, end))
        code = await ended
        node.kill()
        return code

    def _make_process(self, node: Node) -> ServiceProcess:
        cluster = self._cluster
        rng = Random(cluster.rng.getrandbits(64))
        spec = ChildSpec(
            target=cluster.target,
            directory=".",
            services=self.names,
            index=1,
            namespace=NAMESPACE,
            hub=(HEAD, HUB_PORT),
            token=TOKEN,
            host="0.0.0.0",
            advertise=self.host,
            sections=cluster.sections,
            source="sim.yaml",
            supervisor_pid=1,
            status_fd=0,
            grace_s=GRACE_S,
            stalls=self._num_stalls,
        )
        identity = Identity(NAMESPACE, InstanceId(node.name), self.names[0], TOKEN)

        def connect() -> Planes:
            planes = hub_planes(identity, (HEAD, HUB_PORT), rng=rng, bind=cluster.network.bind)
            cluster.on_planes(self, planes)
            return planes

        return ServiceProcess(
            spec, _graph(cluster.target), connect, self._report, rng=rng, clocks=cluster.clocks, pid=4711
        )

    async def _run(self, process: ServiceProcess, end: Callable[[int], None]) -> None:
        try:
            end(await process.run())
        except StatorError as error:
            self._cluster.trace.note(self.label, f"failed: {error.message}")
            end(ExitCode.FAILURE)
        except Exception as error:
            self._cluster.problems.append(f"{self.label} raised {describe_failure(error)}")
            end(ExitCode.FAILURE)

    def _report(self, report: Report) -> None:
        if isinstance(report, Ready):
            self.ready_at = self._cluster.loop.time()
            self._cluster.trace.note(self.label, "ready")


class SimHub:
    """The hub on the head, which comes back empty when it was killed."""

    def __init__(self, cluster: "Cluster") -> None:
        self.node: Node | None = None
        self.hub: Hub | None = None
        self.num_lives = 0
        self._cluster = cluster

    @property
    def alive(self) -> bool:
        return self.node is not None and self.node.state is not NodeState.DEAD

    async def start(self) -> None:
        self.num_lives += 1
        self.node = self._cluster.loop.node(f"hub.{self.num_lives}", HEAD)
        started: asyncio.Future[None] = self._cluster.loop.create_future()
        self.node.spawn(self._serve(started))
        await started

    def kill(self) -> None:
        if self.node is not None:
            self.node.kill()

    async def _serve(self, started: "asyncio.Future[None]") -> None:
        rng = Random(self._cluster.rng.getrandbits(64))
        identity = Identity(NAMESPACE, InstanceId(f"hub-{rng.getrandbits(48):012x}"), "hub", TOKEN)
        listen = Listen(host="0.0.0.0", port=HUB_PORT, advertise=HEAD)
        server = RequestPlaneServer(identity, listen, bind=self._cluster.network.bind)
        self.hub = Hub(server, random_source=rng)
        await server.start()
        self._cluster.trace.note("hub", f"up, life {self.num_lives}")
        started.set_result(None)


class Cluster:
    """`start` to `close`. problems: what no deployment may do. on_planes: sees each process's planes as they open."""

    def __init__(self, loop: SimLoop, rng: Random, network: Network, trace: Trace, layout: Layout) -> None:
        self.loop = loop
        self.rng = rng
        self.network = network
        self.trace = trace
        self.layout = layout
        self.target = "graphs.disagg_router:Frontend"
        self.sections = sections(layout)
        self.clocks = SimClocks(loop)
        self.problems: list[str] = []
        self.on_planes: Callable[[SimProcess, Planes], None] = lambda process, planes: None
        self.hub = SimHub(self)
        self.client_node = loop.node(CLIENTS, CLIENTS)
        self._tasks = TaskOwner("simulated supervisor")
        self.processes: list[SimProcess] = []
        front = ("Frontend", "Processor") if layout.router_apart else ("Frontend", "Processor", "Router")
        if layout.router_apart:
            self._add("router", ("Router",), "router")
        for number in range(1, layout.num_frontends + 1):
            self._add(f"frontend-{number}", front, HEAD if number == 1 else f"front{number}")
        for number in range(1, layout.num_decode + 1):
            self._add(f"decode-{number}", ("VllmWorker",), f"d{number}")
        for number in range(1, layout.num_prefill + 1):
            self._add(f"prefill-{number}", ("PrefillWorker",), f"p{number}")

    def of_kind(self, service: str) -> list[SimProcess]:
        return [process for process in self.processes if service in process.names]

    async def start(self) -> None:
        """Returns when every process is ready. Raises TimeoutError."""
        await self.hub.start()
        for process in self.processes:
            self._tasks.spawn(process.keep(), process.label)
        if not await until(lambda: all(process.ready for process in self.processes), START_WITHIN_S):
            late = ", ".join(process.label for process in self.processes if not process.ready)
            raise TimeoutError(f"not ready within {START_WITHIN_S:g} s: {late}")

    def join(self, service: str) -> SimProcess:
        """One more worker, on a host of its own."""
        kind = {"VllmWorker": "decode", "PrefillWorker": "prefill"}[service]
        number = len(self.of_kind(service)) + 1
        process = self._add(f"{kind}-{number}", (service,), f"{kind[0]}{number}")
        self._tasks.spawn(process.keep(), process.label)
        return process

    async def restart(self, process: SimProcess) -> None:
        """SIGTERM, and SIGKILL after the supervisor's grace; the keeper starts it again."""
        node = process.node
        process.terminate()
        await asyncio.sleep(GRACE_S)
        if node is not None and node.state is not NodeState.DEAD:
            self.trace.note(process.label, "did not stop within the grace: killed")
            node.kill()

    async def restart_hub(self, down_s: float) -> None:
        """Nothing, if it is being restarted already."""
        if not self.hub.alive:
            return
        self.hub.kill()
        await asyncio.sleep(down_s)
        await self.hub.start()

    async def pause_hub(self, for_s: float) -> None:
        """It stands still; nothing, if it is being restarted."""
        node = self.hub.node
        if node is None or not self.hub.alive:
            return
        node.pause()
        await asyncio.sleep(for_s)
        node.resume()

    async def close(self) -> None:
        for process in self.processes:
            process.wanted = False
            if process.node is not None:
                process.node.kill()
        self.hub.kill()
        self.client_node.kill()
        await self._tasks.close()

    def _add(self, label: str, services: tuple[str, ...], host: str) -> SimProcess:
        process = SimProcess(self, label, services, host)
        self.processes.append(process)
        return process
