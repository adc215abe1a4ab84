"""Which processes a node starts, which services run together in one, and what each process is given. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from stator.config.load import Section
from stator.config.schema import FrontendConfig, Resources, ServiceArgs
from stator.errors import ConfigError
from stator.graph.gpus import Gpu, GpuRequest, allocate
from stator.graph.graph import Graph
from stator.graph.service import ServiceSpec

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
FRONTEND = "frontend"
PROCESSOR = "processor"
ROUTER = "router"


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """services: consumers before those they call; the first one gives the process its name.

    index: counts the copies, from 1. stage: processes of a lower stage are drained before those of a higher one.
    args: of all its services together. gpus, environment: what `equip` gave it, `args.envs` included. overlaps: two
    of them may run side by side while one takes the place of the other.
    """

    services: tuple[str, ...]
    index: int
    stage: int
    args: ServiceArgs
    gpus: tuple[Gpu, ...] = ()
    environment: dict[str, str] = field(default_factory=dict[str, str])
    overlaps: bool = False

    @property
    def label(self) -> str:
        return f"{self.services[0]}:{self.index}"


def plan_processes(graph: Graph, sections: Mapping[str, Section]) -> list[ProcessPlan]:
    """Consumers before the services they call. Raises ConfigError for arguments that contradict each other."""
    groups: dict[str, list[str]] = {}
    leader_of: dict[str, str] = {}
    for name, spec in graph.services.items():
        consumer = _consumer(graph, spec, leader_of) if _is_colocated(spec, sections[name].args) else None
        if consumer is not None and _would_be_copied(spec, sections[name].args, leader_of[consumer], sections):
            consumer = None
        leader = leader_of[consumer] if consumer is not None else name
        leader_of[name] = leader
        groups.setdefault(leader, []).append(name)
        if leader != name and sections[name].args.workers != 1:
            raise ConfigError(
                f"{name}.ServiceArgs.workers is {sections[name].args.workers}, but {name} runs in the process of "
                f"{leader}; set {name}.ServiceArgs.colocate to false to give it processes of its own"
            )
    plans: list[ProcessPlan] = []
    for stage, services in enumerate(groups.values()):
        args = _together(services, sections)
        overlaps = all(_overlaps(graph.services[name], sections[name]) for name in services) and not args.resources.gpu
        plans.extend(
            ProcessPlan(tuple(services), index, stage, args, overlaps=overlaps) for index in range(1, args.workers + 1)
        )
    return plans


def _overlaps(spec: ServiceSpec, section: Section) -> bool:
    """Services that hold little, and no address of their own: a frontend accepts from the supervisor's socket. Of other
    services nobody knows; of workers, a second one has no room."""
    return isinstance(section.config, FrontendConfig) if spec.role == FRONTEND else spec.role in (PROCESSOR, ROUTER)


def equip(plans: Sequence[ProcessPlan], gpus: Sequence[Gpu], source: str = "") -> list[ProcessPlan]:
    """The plans with GPUs and environment. gpus: those of the node; source: who found them. Raises ConfigError if they
    do not suffice.

    Once one process of a node has GPUs of its own, those that asked for none see none; if nobody asks, nothing is set.
    """
    given = allocate([GpuRequest(plan.label, plan.args.resources.gpu) for plan in plans], gpus, source)
    some = any(given.values())
    return [
        ProcessPlan(
            plan.services,
            plan.index,
            plan.stage,
            plan.args,
            given[plan.label],
            _environment(plan.args, given[plan.label] if some else None),
            plan.overlaps,
        )
        for plan in plans
    ]


def wants_gpus(plans: Sequence[ProcessPlan]) -> bool:
    return any(plan.args.resources.gpu > 0 for plan in plans)


def _environment(args: ServiceArgs, gpus: Sequence[Gpu] | None) -> dict[str, str]:
    environment: dict[str, str] = {}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.id for gpu in gpus)
        if any(gpu.id.isdigit() for gpu in gpus):
            # The numbers are NVML's; CUDA's own default order is another on machines with unlike GPUs.
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if args.resources.cpu is not None:
        environment.update(dict.fromkeys(THREAD_VARIABLES, str(max(1, int(args.resources.cpu)))))
    return {**environment, **args.envs}


def _is_colocated(spec: ServiceSpec, args: ServiceArgs) -> bool:
    return spec.colocate if args.colocate is None else args.colocate


def _would_be_copied(spec: ServiceSpec, args: ServiceArgs, leader: str, sections: Mapping[str, Section]) -> bool:
    """A router in each of several processes would know only that process's bookings: several need a common one."""
    copies = sections[leader].args.workers
    if spec.role != ROUTER or copies <= 1:
        return False
    if args.colocate:
        raise ConfigError(
            f"{spec.name}.ServiceArgs.colocate is true, but {leader} has {copies} processes, and each would route "
            f"without knowing what the others do; leave it out, and they share one {spec.name} process"
        )
    return True


def _consumer(graph: Graph, spec: ServiceSpec, placed: Mapping[str, str]) -> str | None:
    """The first service already placed that links this one."""
    return next((name for name in placed if spec.cls in graph.services[name].links), None)


def _together(services: Sequence[str], sections: Mapping[str, Section]) -> ServiceArgs:
    """The arguments of a process: the first service's, with what the others need added."""
    leader, *others = services
    args = sections[leader].args
    for name in others:
        more = sections[name].args
        if more.python is not None and more.python != args.python:
            raise ConfigError(
                f"{name}.ServiceArgs.python is {more.python}, but {name} runs in the process of {leader}; give it to "
                f"{leader}, or set {name}.ServiceArgs.colocate to false"
            )
        for key in args.envs.keys() & more.envs.keys():
            if args.envs[key] != more.envs[key]:
                raise ConfigError(
                    f"{name}.ServiceArgs.envs sets {key}, and so does {leader}, with another value; they run in one "
                    f"process"
                )
        resources = Resources(
            gpu=args.resources.gpu + more.resources.gpu,
            cpu=_sum(args.resources.cpu, more.resources.cpu),
        )
        args = replace(args, envs={**args.envs, **more.envs}, resources=resources)
    return args


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None and other is None else (one or 0.0) + (other or 0.0)
