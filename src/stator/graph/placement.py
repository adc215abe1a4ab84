"""Which processes a node starts, and which services run together in one. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from stator.config.load import Section
from stator.config.schema import ServiceArgs
from stator.errors import ConfigError
from stator.graph.graph import Graph
from stator.graph.service import ServiceSpec


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """services: consumers before those they call; the first one gives the process its name and `args`.

    index: counts the copies, from 1. stage: processes of a lower stage are drained before those of a higher one.
    """

    services: tuple[str, ...]
    index: int
    stage: int
    args: ServiceArgs

    @property
    def label(self) -> str:
        return f"{self.services[0]}:{self.index}"


def plan_processes(graph: Graph, sections: Mapping[str, Section]) -> list[ProcessPlan]:
    """Consumers before the services they call. Raises ConfigError for arguments that contradict each other."""
    groups: dict[str, list[str]] = {}
    leader_of: dict[str, str] = {}
    for name, spec in graph.services.items():
        consumer = _consumer(graph, spec, leader_of) if _is_colocated(spec, sections[name].args) else None
        leader = leader_of[consumer] if consumer is not None else name
        leader_of[name] = leader
        groups.setdefault(leader, []).append(name)
        if leader != name and sections[name].args.workers != 1:
            raise ConfigError(
                f"{name}.ServiceArgs.workers is {sections[name].args.workers}, but {name} runs in the process of "
                f"{leader}; set {name}.ServiceArgs.colocate to false to give it processes of its own"
            )
    plans: list[ProcessPlan] = []
    for stage, (leader, services) in enumerate(groups.items()):
        args = sections[leader].args
        if graph.services[leader].role == "frontend" and args.workers > 1:
            raise ConfigError(f"{leader}.ServiceArgs.workers is {args.workers}; this version runs one frontend a node")
        plans.extend(ProcessPlan(tuple(services), index, stage, args) for index in range(1, args.workers + 1))
    return plans


def _is_colocated(spec: ServiceSpec, args: ServiceArgs) -> bool:
    return spec.colocate if args.colocate is None else args.colocate


def _consumer(graph: Graph, spec: ServiceSpec, placed: Mapping[str, str]) -> str | None:
    """The first service already placed that links this one."""
    return next((name for name in placed if spec.cls in graph.services[name].links), None)
