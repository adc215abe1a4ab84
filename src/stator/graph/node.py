"""One node before anything is started: the graph, the merged configuration, the processes and what each is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from stator.config import environment
from stator.config.decode import Errors, kebab, lookup
from stator.config.external import DEFAULT_ETCD_PORT, ExternalPlanes
from stator.config.load import Configuration, Section, decode_section, ignored_flags, load_configuration, raise_all
from stator.config.schema import SERVICE_ARGS, FrontendConfig, WorkerConfig
from stator.config.tree import Node as TreeNode
from stator.engines.environments import resolve_python
from stator.engines.registry import check_installed
from stator.errors import ConfigError
from stator.graph import banner, network, token
from stator.graph.fit import SectionFit, fit_sections, refuse_misfits, warnings_of
from stator.graph.gpus import parse_assumed
from stator.graph.graph import Graph, build_graph
from stator.graph.machine import Inventory, find_gpus
from stator.graph.placement import FRONTEND, ProcessPlan, equip, plan_processes, wants_gpus
from stator.graph.supervisor import Settings
from stator.graph.targets import load_target

DEFAULT_HUB_PORT = 7440


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says. join_lines: how others join, if not by the graph's own components."""

    target: str
    directory: Path
    config: Path | None = None
    overrides: Sequence[tuple[str, str]] = ()
    namespace: str = banner.DEFAULT_NAMESPACE
    join: str | None = None
    token_file: Path | None = None
    host: str = "0.0.0.0"
    advertise: str | None = None
    port_range: str | None = None
    hub_host: str | None = None
    hub_port: int = DEFAULT_HUB_PORT
    join_lines: tuple[banner.JoinLine, ...] = ()
    settings: Settings = field(default_factory=Settings)
    assume_gpus: str | None = None
    allow_untested_engine: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """Everything that was checked. inventory: None if nobody asks for GPUs. notices: to be told once.

    head: of the deployment that is joined. external: etcd and NATS, in place of any hub.
    refusal: why a start would stop here, though a plan can be made. fits: of the sections with a vLLM worker.
    """

    options: ServeOptions
    graph: Graph
    configuration: Configuration
    sections: dict[str, Section]
    plans: list[ProcessPlan]
    inventory: Inventory | None
    head: tuple[str, int] | None
    external: ExternalPlanes | None
    advertise: str
    port_range: tuple[int, int] | None
    notices: tuple[str, ...]
    refusal: str | None
    fits: tuple[SectionFit, ...] = ()

    @property
    def is_head(self) -> bool:
        return self.head is None and self.external is None and not self.graph.is_component

    def guests(self) -> list[str]:
        """Namespaces that a frontend here serves as well, so that the hub here lets them in."""
        names = (name for config in _frontends(self.sections) for name in config.namespaces)
        return [name for name in dict.fromkeys(names) if name != self.options.namespace]

    def role(self, service: str) -> str:
        return self.graph.services[service].role

    def needs_sockets(self) -> bool:
        """Whether a process of this node is called by others of it over Unix sockets."""
        return any(self.graph.services[plan.services[0]].colocate or plan.args.workers > 1 for plan in self.plans)

    def shared_listeners(self) -> list[str]:
        """Frontends: their processes accept clients from a socket of the supervisor, so that one can take another's
        place, or be away for a moment, with nobody refused."""
        return [
            name
            for name in dict.fromkeys(plan.services[0] for plan in self.plans)
            if self.role(name) == FRONTEND and isinstance(self.sections[name].config, FrontendConfig)
        ]


def prepare(options: ServeOptions, *, for_start: bool) -> Node:
    """Import, merge, check and plan; starts nothing and writes nothing. Raises ConfigError.

    for_start: what only a start needs (a control plane, the engine) must be there; else it is told as `refusal`.
    """
    token.check_namespace(options.namespace)
    graph = build_graph(load_target(options.target, options.directory))
    external, refusal, told = _control_plane(options, graph)
    if for_start:
        _refuse(refusal)
    configuration, sections, notices = _sections(options, graph)
    for name in (name for config in _frontends(sections) for name in config.namespaces):
        token.check_namespace(name, "Frontend.namespaces:")
    head = None if options.join is None else network.parse_host_port(options.join, DEFAULT_HUB_PORT, "--join")
    advertise = network.advertised_address(options.host, options.advertise, head or _store(external))
    port_range = None if options.port_range is None else network.parse_port_range(options.port_range)
    plans = plan_processes(graph, sections)
    if not plans:
        raise ConfigError(f"{options.target}: every service has ServiceArgs.workers 0; there is nothing to start")
    plans, missing = _interpreters(plans)
    refusal = refusal or missing
    if for_start:
        _refuse(refusal)
        _check_engines(sections, plans, allow_untested=options.allow_untested_engine)
    inventory = _inventory(options, plans)
    if inventory is not None:
        plans = equip(plans, inventory.gpus, inventory.source)
    else:
        plans = equip(plans, ())
    told += [*notices, *_private_routing(graph, plans), *_left_without_gpus(sections, plans)]
    fits = tuple(fit_sections(configuration, sections, plans, inventory))
    if for_start:
        refuse_misfits(fits)
        told += warnings_of(fits)
    return Node(
        options, graph, configuration, sections, plans, inventory, head, external, advertise, port_range, tuple(told),
        refusal, fits,
    )  # fmt: skip


def _frontends(sections: Mapping[str, Section]) -> list[FrontendConfig]:
    return [section.config for section in sections.values() if isinstance(section.config, FrontendConfig)]


def _store(external: ExternalPlanes | None) -> tuple[str, int] | None:
    """Where others are looked for: this node is reached at the address that leads there."""
    if external is None:
        return None
    url = urlsplit(external.etcd.endpoints[0])
    return url.hostname or "", url.port or DEFAULT_ETCD_PORT


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ConfigError(reason)


def _interpreters(plans: Sequence[ProcessPlan]) -> tuple[list[ProcessPlan], str | None]:
    """The plans with `engine:NAME` read as that engine's interpreter, and why one could not be, if so."""
    resolved: list[ProcessPlan] = []
    reason: str | None = None
    for plan in plans:
        python = plan.args.python
        if python is not None:
            try:
                plan = replace(plan, args=msgspec.structs.replace(plan.args, python=resolve_python(python)))
            except ConfigError as error:
                reason = reason or f"{plan.services[0]}.ServiceArgs.python: {error}"
        resolved.append(plan)
    return resolved, reason


def _check_engines(sections: Mapping[str, Section], plans: Sequence[ProcessPlan], *, allow_untested: bool) -> None:
    """What this interpreter lacks is told before anything is started; another's is told by the process it runs."""
    for plan in plans:
        for name in plan.services if plan.args.python is None else ():
            config = sections[name].config
            if isinstance(config, WorkerConfig):
                check_installed(config.engine, allow_untested=allow_untested)


def _inventory(options: ServeOptions, plans: Sequence[ProcessPlan]) -> Inventory | None:
    if options.assume_gpus is not None:
        return Inventory(parse_assumed(options.assume_gpus), "assumed")
    return find_gpus() if wants_gpus(plans) else None


def _sections(options: ServeOptions, graph: Graph) -> tuple[Configuration, dict[str, Section], list[str]]:
    path = None if options.config is None else options.directory / options.config
    configuration = load_configuration(path, options.overrides, list(graph.services), shown_as=str(options.config))
    errors = Errors()
    notices = list(configuration.notices)
    sections: dict[str, Section] = {}
    for name, spec in graph.services.items():
        section = decode_section(name, spec.config_type, configuration, errors, notices)
        if section is not None:
            check_gpus(name, section, configuration, errors)
            sections[name] = _without_simulated_gpus(name, section, notices)
    raise_all(errors)
    if (ignored := ignored_flags(sections)) is not None:
        notices.append(ignored)
    return configuration, sections, list(dict.fromkeys(notices))


def _without_simulated_gpus(name: str, section: Section, notices: list[str]) -> Section:
    """A file for GPU nodes can be simulated on a machine without any."""
    config, resources = section.config, section.args.resources
    if not isinstance(config, WorkerConfig) or config.engine != "sim" or resources.gpu == 0:
        return section
    notices.append(f"{name} is simulated: its ServiceArgs.resources.gpu ({resources.gpu:g}) is ignored")
    args = msgspec.structs.replace(section.args, resources=msgspec.structs.replace(resources, gpu=0))
    return replace(section, args=args)


def check_gpus(name: str, section: Section, configuration: Configuration, errors: Errors) -> None:
    """A number of GPUs that is none, or that is less than what the engine is told to spread over."""
    gpu = section.args.resources.gpu
    node = configuration.sections.get(name, TreeNode("", children={}))
    for key in (SERVICE_ARGS, "resources", "gpu"):
        node = lookup(node.children or {}, key) or node
    if gpu > 1 and gpu != int(gpu):
        errors.add(
            node.origin,
            f"{name}.ServiceArgs.resources.gpu: found {gpu:g}, expected a whole number, or a fraction below 1",
        )
    config = section.config
    if not isinstance(config, WorkerConfig) or config.engine != "vllm" or gpu == 0:
        return
    values, origins = config.engine_args, config.engine_arg_origins
    sizes = {key: int(values.get(key) or 1) for key in ("tensor_parallel_size", "pipeline_parallel_size")}
    needed = prod(sizes.values())
    num_nodes = int(values.get("nnodes") or 1)
    over = f" over {num_nodes} nodes" if num_nodes > 1 else ""
    flags = " and ".join(f"{kebab(key)} {size}" for key, size in sizes.items() if size > 1)
    if needed % num_nodes:
        errors.add(
            origins["nnodes"],
            f"{name}: nnodes is {num_nodes}, and {flags or 'tensor-parallel-size 1'} makes {needed} GPUs: expected a "
            f"number that divides them",
        )
        return
    needed //= num_nodes
    if needed > max(1, gpu):
        origin = next(origins[key] for key, size in sizes.items() if size > 1)
        errors.add(
            origin,
            f"{name}: {flags}{over} needs {needed} GPUs for a process, and ServiceArgs.resources.gpu is {gpu:g} "
            f"({node.origin})",
        )


def _private_routing(graph: Graph, plans: Sequence[ProcessPlan]) -> list[str]:
    roles = {spec.role for spec in graph.services.values()}
    copied = [p for p in plans if p.args.workers > 1 and any(graph.services[s].role == "processor" for s in p.services)]
    if not copied or "router" in roles:
        return []
    label = copied[0].services[0]
    return [
        f"{label} has {copied[0].args.workers} processes and the graph has no Router: each balances by what it knows; "
        f"a graph with one, such as graphs.agg_router, lets them share it"
    ]


def _left_without_gpus(sections: dict[str, Section], plans: Sequence[ProcessPlan]) -> list[str]:
    """vLLM would only say that it finds no GPU."""
    names = dict.fromkeys(plan.services[0] for plan in plans if plan.environment.get("CUDA_VISIBLE_DEVICES") == "")
    return [
        f"{name} asks for no GPU and will see none, since other processes of this node have theirs; set "
        f"{name}.ServiceArgs.resources.gpu"
        for name in names
        if isinstance(config := sections[name].config, WorkerConfig) and config.engine == "vllm"
    ]


def _control_plane(options: ServeOptions, graph: Graph) -> tuple[ExternalPlanes | None, str | None, list[str]]:
    """etcd and NATS, if the node uses them; why it could not be started, if so; and what to tell otherwise."""
    try:
        external = environment.external_control_plane()
    except ConfigError as error:
        return None, None if options.join is not None else str(error), []
    if options.join is not None:
        told = [f"{external.shown} not used: --join names the hub of {options.join}"] if external is not None else []
        return None, None, told
    if external is not None or not graph.is_component:
        return external, None, []
    return (
        None,
        f"{graph.root.name} is a component target: it joins a running deployment and starts only itself. "
        f"Give --join HEAD:{DEFAULT_HUB_PORT} (the head prints the line), or set NATS_SERVER and ETCD_ENDPOINTS; "
        f"to start a deployment here, serve a graph, for instance graphs.agg_router:Frontend",
        [],
    )
