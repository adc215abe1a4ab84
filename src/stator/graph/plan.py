"""`stator serve --dry-run`: what a start would do, as data and as text. Starts nothing and writes nothing."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from stator.config.decode import lookup
from stator.config.external import ExternalPlanes
from stator.config.provenance import DEFAULT, Option, hide, options_of
from stator.config.schema import FrontendConfig, WorkerConfig
from stator.graph import banner, gpus, network
from stator.graph.fit import SectionFit, refusal_of
from stator.graph.fit_text import fit_lines
from stator.graph.node import Node, ServeOptions, prepare
from stator.graph.placement import ProcessPlan
from stator.graph.token import find_given_token, find_token


class ServicePlan(msgspec.Struct, frozen=True):
    """colocated: runs in the process of a service that calls it. calls: services by name, those linked here."""

    name: str
    role: str
    target: str
    colocated: bool
    calls: list[str]
    endpoints: list[str]
    engine: str | None
    model: str | None
    options: list[Option]


class ProcessEntry(msgspec.Struct, frozen=True):
    """gpus: what CUDA_VISIBLE_DEVICES is set to, None if it is left alone. addresses: of services, in words.
    environment: variables that are set for it, those of the GPUs included."""

    label: str
    services: list[str]
    gpus: str | None
    addresses: list[str]
    environment: dict[str, str]
    python: str | None


class Plan(msgspec.Struct, frozen=True):
    """fits: whether the vLLM workers' models fit. refusal: why a real start would stop."""

    target: str
    namespace: str
    control_plane: str
    gpus: str
    processes: list[ProcessEntry]
    services: list[ServicePlan]
    fits: list[SectionFit]
    notices: list[str]
    refusal: str | None


def make_plan(options: ServeOptions) -> Plan:
    """Raises ConfigError for all that would stop a start, but for what only a start can know or needs."""
    node = prepare(options, for_start=False)
    shared = node.shared_listeners()
    return Plan(
        target=options.target,
        namespace=options.namespace,
        control_plane=_control_plane(node),
        gpus=_gpus(node),
        processes=[_process(node, plan, shared) for plan in node.plans],
        services=[_service(node, name) for name in node.graph.services],
        fits=list(node.fits),
        notices=[*node.notices, *_token_notices(options, node.external)],
        refusal=node.refusal or refusal_of(node.fits),
    )


def _control_plane(node: Node) -> str:
    options = node.options
    if node.head is not None:
        return f"joins the head at {network.url_host(node.head[0])}:{node.head[1]}"
    if node.external is not None:
        return f"{node.external.shown} (no hub is started)"
    if not node.is_head:
        return "joins a head, which --join names"
    host = options.hub_host or options.host
    port = "a free port" if options.hub_port == 0 else f"port {options.hub_port}"
    return f"hub of this head on {host}, {port}; other nodes reach it at {node.advertise}"


def _gpus(node: Node) -> str:
    if node.inventory is None:
        return "not asked for"
    return f"{gpus.describe(node.inventory.gpus)} ({node.inventory.source})"


def _token_notices(options: ServeOptions, external: ExternalPlanes | None) -> list[str]:
    if external is not None:
        given = find_given_token(options.token_file) is not None
        return [] if given else ["the token is in etcd; the first node to start makes it"]
    if find_token(options.namespace, options.token_file) is not None:
        return []
    if options.join is not None:
        return ["there is no token here; a start needs the head's"]
    return ["there is no token yet; a start makes one"]


def _process(node: Node, plan: ProcessPlan, shared: Sequence[str]) -> ProcessEntry:
    environment = plan.environment
    return ProcessEntry(
        label=plan.label,
        services=list(plan.services),
        gpus=environment.get("CUDA_VISIBLE_DEVICES"),
        addresses=_addresses(node, plan, shared),
        environment={key: hide(key, value) for key, value in environment.items()},
        python=plan.args.python,
    )


def _addresses(node: Node, plan: ProcessPlan, shared: Sequence[str]) -> list[str]:
    addresses: list[str] = []
    leader = plan.services[0]
    for name in plan.services:
        config = node.sections[name].config
        if isinstance(config, FrontendConfig):
            port = "a free port" if config.port == 0 else str(config.port)
            note = (
                f" (one socket for {plan.args.workers} processes)" if name in shared and plan.args.workers > 1 else ""
            )
            addresses.append(f"HTTP on {network.url_host(config.host)}:{port}{note}")
    if len(plan.services) > 1:
        addresses.append(f"in process: {', '.join(plan.services)}")
    if node.graph.services[leader].colocate or plan.args.workers > 1:
        addresses.append("Unix socket for this node's processes")
    ports = "free ports" if node.port_range is None else f"ports {node.port_range[0]} to {node.port_range[1]}"
    addresses.append(f"request plane on {node.options.host}, {ports}, advertised as {node.advertise}")
    return addresses


def _service(node: Node, name: str) -> ServicePlan:
    spec = node.graph.services[name]
    section = node.sections[name]
    config = section.config
    return ServicePlan(
        name=name,
        role=spec.role,
        target=banner.component_target(spec, node.options.directory),
        colocated=any(name in plan.services[1:] for plan in node.plans),
        calls=[other.name for other, linked in node.graph.resolve(spec).values() if linked],
        endpoints=[endpoint.name for endpoint in spec.endpoints],
        engine=config.engine if isinstance(config, WorkerConfig) else None,
        model=_model(node, name, config),
        options=options_of(name, section, node.configuration),
    )


def _model(node: Node, name: str, config: Any) -> str | None:
    if isinstance(config, WorkerConfig):
        return config.model
    section = node.configuration.sections.get(name)
    value = lookup(section.children or {}, "model") if section is not None else None
    return None if value is None else str(value.value)


def format_json(plan: Plan) -> str:
    return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode()


def format_text(plan: Plan) -> str:
    lines = [
        f"Plan of {plan.target} (dry run: nothing was started)",
        "",
        f"  namespace      {plan.namespace}",
        f"  control plane  {plan.control_plane}",
        f"  GPUs           {plan.gpus}",
        "",
        "Processes",
    ]
    for process in plan.processes:
        lines += _process_lines(process)
    lines += ["", "Services"]
    for service in plan.services:
        lines += _service_lines(service)
    if plan.fits:
        lines += ["", "Fit"]
        lines += [line for fit in plan.fits for line in fit_lines(fit)]
    lines += ["", *(f"Note: {notice}" for notice in plan.notices)] if plan.notices else []
    if plan.refusal is not None:
        lines += ["", f"A start would stop here: {plan.refusal}"]
    return "\n".join(lines)


def _process_lines(process: ProcessEntry) -> list[str]:
    given = process.gpus
    shown = "as this shell sees them" if given is None else f"CUDA_VISIBLE_DEVICES={given}" if given else "none"
    lines = [f"  {process.label}", f"    services     {' + '.join(process.services)}", f"    GPUs         {shown}"]
    lines += [f"    address      {address}" for address in process.addresses]
    others = {key: value for key, value in process.environment.items() if key != "CUDA_VISIBLE_DEVICES"}
    if others:
        lines.append(f"    environment  {' '.join(f'{key}={value}' for key, value in others.items())}")
    if process.python is not None:
        lines.append(f"    interpreter  {process.python}")
    return lines


def _service_lines(service: ServicePlan) -> list[str]:
    about = [service.target, f"role {service.role}"]
    about += [f"engine {service.engine}"] if service.engine else []
    about += [f"calls {', '.join(service.calls)}"] if service.calls else []
    lines = [f"  {service.name}  ({'; '.join(about)})"]
    rows = [(option.key, _shown(option.value), option.origin) for option in service.options if _worth(option)]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    widths = [min(width, limit) for width, limit in zip(widths, (36, 44), strict=True)]
    lines += [f"    {key:<{widths[0]}}  {value:<{widths[1]}}  {origin}".rstrip() for key, value, origin in rows]
    return lines


def _worth(option: Option) -> bool:
    """Whether a line says something: options that are unset and have no default do not."""
    return option.origin != DEFAULT or option.value not in (None, {}, [])


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False, default=str)
