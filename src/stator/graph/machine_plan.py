"""`stator plan`: how the worker sections of a configuration fit a machine, each on one of its own."""

from collections.abc import Iterator

import msgspec
from msgspec.structs import replace

from stator.config.decode import Errors
from stator.config.load import Configuration, Section, decode_section, load_configuration, raise_all
from stator.config.schema import SECTIONS, SERVICE_ARGS, WorkerConfig
from stator.errors import ConfigError
from stator.graph import gpus
from stator.graph.fit import PlacedFinding, SectionFit, fit_sections
from stator.graph.fit_text import fit_lines
from stator.graph.graph import Graph, build_graph
from stator.graph.machine import Inventory, find_gpus
from stator.graph.node import ServeOptions, check_gpus
from stator.graph.placement import ProcessPlan, equip
from stator.graph.targets import load_target


class MachinePlan(msgspec.Struct, frozen=True):
    """gpus: of the machine, in words. others: worker sections whose engine is not vLLM, with the engine."""

    target: str
    gpus: str
    fits: list[SectionFit]
    others: dict[str, str]
    notices: list[str]

    @property
    def refused(self) -> bool:
        return any(fit.refused for fit in self.fits)


def plan_machine(options: ServeOptions, *, all_services: bool) -> MachinePlan:
    """all_services: also the target's workers without a section in the file. Raises ConfigError."""
    graph = build_graph(load_target(options.target, options.directory))
    path = None if options.config is None else options.directory / options.config
    configuration = load_configuration(path, options.overrides, list(graph.services), shown_as=str(options.config))
    notices = list(configuration.notices)
    sections = _worker_sections(graph, configuration, notices, all_services)
    assumed = options.assume_gpus
    inventory = find_gpus() if assumed is None else Inventory(gpus.parse_assumed(assumed), "assumed")
    fits: list[SectionFit] = []
    for name, section in sections.items():
        fits += _fits(name, section, configuration, inventory)
    return MachinePlan(
        target=options.target,
        gpus=f"{gpus.describe(inventory.gpus)} ({inventory.source})",
        fits=fits,
        others={name: s.config.engine for name, s in sections.items() if s.config.engine != "vllm"},
        notices=list(dict.fromkeys(notices)),
    )


def _worker_sections(
    graph: Graph, configuration: Configuration, notices: list[str], all_services: bool
) -> dict[str, Section]:
    errors = Errors()
    sections: dict[str, Section] = {}
    for name, spec in graph.services.items():
        struct = spec.config_type or SECTIONS.get(name)
        if struct is None or not issubclass(struct, WorkerConfig):
            continue
        if not all_services and name not in configuration.sections:
            continue
        section = decode_section(name, spec.config_type, configuration, errors, notices)
        if section is not None:
            sections[name] = section
            check_gpus(name, section, configuration, errors)
    raise_all(errors)
    if not sections:
        raise ConfigError(f"{configuration.source}: found no worker's section, expected VllmWorker or PrefillWorker")
    return sections


def _fits(name: str, section: Section, configuration: Configuration, inventory: Inventory) -> Iterator[SectionFit]:
    """The section's processes have the machine to themselves."""
    plans = [ProcessPlan((name,), index, 0, section.args) for index in range(1, max(1, section.args.workers) + 1)]
    refusal = None
    try:
        plans = equip(plans, inventory.gpus, inventory.source)
    except ConfigError as error:
        refusal = PlacedFinding(
            "refuse", f"{name}.{SERVICE_ARGS}", _origin(name, configuration), f"does not fit: {error}"
        )
        # The others are told as if there were enough of the machine's first kind.
        wanted = int(section.args.resources.gpu)
        plans = [_with_gpus(plan, (inventory.gpus[:1] or [gpus.Gpu("0")]) * wanted) for plan in plans]
    for fit in fit_sections(configuration, {name: section}, plans, inventory):
        yield fit if refusal is None else replace(fit, findings=[refusal, *fit.findings])


def _with_gpus(plan: ProcessPlan, given: list[gpus.Gpu]) -> ProcessPlan:
    return ProcessPlan(plan.services, plan.index, plan.stage, plan.args, tuple(given), plan.environment)


def _origin(name: str, configuration: Configuration) -> str | None:
    children = configuration.sections[name].children or {} if name in configuration.sections else {}
    return children[SERVICE_ARGS].origin if SERVICE_ARGS in children else None


def format_json(plan: MachinePlan) -> str:
    return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode()


def format_text(plan: MachinePlan) -> str:
    lines = [f"GPUs  {plan.gpus}; each section on such a machine of its own", ""]
    for fit in plan.fits:
        lines += [*fit_lines(fit), ""]
    lines += [f"  {name}: engine {engine}, nothing to check" for name, engine in plan.others.items()]
    lines += [f"Note: {notice}" for notice in plan.notices]
    refused = [fit.section for fit in plan.fits if fit.refused]
    if refused:
        lines.append(f"Would not start: {', '.join(refused)}")
    return "\n".join(lines).rstrip()
