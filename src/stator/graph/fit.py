"""Whether each vLLM worker of a node can run its model where it would: `core/fit.py`, asked for a node.

Reads only what is on this machine. What cannot be found is a note: a dry run never fails for it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import psutil

from stator.config.decode import kebab, lookup
from stator.config.load import Configuration, Section
from stator.config.model_facts import ModelFacts, find_facts
from stator.config.schema import SERVICE_ARGS, WorkerConfig
from stator.config.tree import Node as TreeNode
from stator.config.vllm_models import vllm_models
from stator.core.fit import evaluate
from stator.core.fit_types import Device, EngineSettings, Finding, FitReport, Level
from stator.core.model_shape import ModelShape, UnknownShape, read_shape
from stator.errors import ConfigError
from stator.graph.gpu_facts import device_of
from stator.graph.gpus import Gpu
from stator.graph.machine import Inventory, find_gpus
from stator.graph.placement import ProcessPlan

_SIDE_CHANNEL = "VLLM_NIXL_SIDE_CHANNEL_PORT"


class PlacedFinding(msgspec.Struct, frozen=True):
    """where: `VllmWorker.tensor-parallel-size`. origin: the file and line, or the flag, that says so."""

    level: Level
    where: str
    origin: str | None
    message: str

    def text(self) -> str:
        return f"{self.where} {self.message}" + (f" ({self.origin})" if self.origin else "")


class SectionFit(msgspec.Struct, frozen=True):
    """model_source: where the model's facts are from. gpus: of one process; 0 on a CPU. num_nodes: that one engine
    spreads over, with a process on each."""

    section: str
    model: str
    model_source: str
    gpus: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    report: FitReport
    findings: list[PlacedFinding]
    num_nodes: int = 1

    @property
    def refused(self) -> bool:
        return any(finding.level == "refuse" for finding in self.findings)


def fit_sections(
    configuration: Configuration,
    sections: Mapping[str, Section],
    plans: Sequence[ProcessPlan],
    inventory: Inventory | None,
) -> list[SectionFit]:
    """One for each section with `engine: vllm` that runs here, in the order of the processes."""
    copies: dict[str, list[ProcessPlan]] = {}
    for plan in plans:
        copies.setdefault(plan.services[0], []).append(plan)
    return [
        _fit_section(name, config, configuration, own, inventory)
        for name, own in copies.items()
        if isinstance(config := sections[name].config, WorkerConfig) and config.engine == "vllm"
    ]


def refusal_of(fits: Sequence[SectionFit]) -> str | None:
    """Every refusal, one a line: where it was written, what was found, what was expected. None if there is none."""
    lines = [
        f"{f'{finding.origin}: ' if finding.origin else ''}{finding.where} {finding.message}"
        for fit in fits
        for finding in fit.findings
        if finding.level == "refuse"
    ]
    return "\n".join(dict.fromkeys(lines)) or None


def refuse_misfits(fits: Sequence[SectionFit]) -> None:
    """Raises ConfigError with every refusal."""
    refusal = refusal_of(fits)
    if refusal is not None:
        raise ConfigError(refusal)


def warnings_of(fits: Sequence[SectionFit]) -> list[str]:
    """For the log of a start, each once."""
    return list(dict.fromkeys(f.text() for fit in fits for f in fit.findings if f.level == "warn"))


def _fit_section(
    name: str,
    config: WorkerConfig,
    configuration: Configuration,
    plans: Sequence[ProcessPlan],
    inventory: Inventory | None,
) -> SectionFit:
    """plans: the section's processes, each of which runs the same model."""
    plan = plans[0]
    values = config.engine_args
    settings = _settings(config, plan.environment)
    gpus = _gpus(plan, inventory, settings)
    all_gpus = [gpu for other in plans for gpu in other.gpus] or gpus
    device = device_of(all_gpus) if gpus else Device("CPU", _ram(inventory), is_cpu=True)
    found: list[Finding] = []
    facts = _facts(config.model, values.get("revision"), found)
    shape = _shape(facts, config, found)
    report = evaluate(shape, facts.weight_bytes, settings, device, vllm_models())
    found += report.findings
    if facts.approximate is not None:
        found.append(Finding("note", "model", f"is known approximately: {facts.approximate}"))
    found += _port_findings(plan)
    return SectionFit(
        section=name,
        model=config.model,
        model_source=facts.source,
        gpus=len(gpus),
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        report=report,
        findings=[_placed(name, config, configuration, finding) for finding in found],
        num_nodes=settings.nnodes,
    )


def _facts(model: str, revision: Any, found: list[Finding]) -> ModelFacts:
    """A directory that is no model is left to whoever loads it: here it is only told."""
    try:
        facts = find_facts(model, str(revision) if revision else None)
    except ConfigError as error:
        facts = ModelFacts(None, None, None, "nothing", str(error))
    if facts.missing is not None:
        found.append(Finding("note", None, f"was not checked: {facts.missing}"))
    return facts


def _shape(facts: ModelFacts, config: WorkerConfig, found: list[Finding]) -> ModelShape | None:
    if facts.config is None:
        return None
    overrides = config.engine_args.get("hf_overrides")
    merged = {**facts.config, **cast(dict[str, Any], overrides)} if isinstance(overrides, dict) else facts.config
    try:
        return read_shape(merged, facts.quantization)
    except (UnknownShape, TypeError, ValueError, AttributeError) as error:
        found.append(Finding("note", "model", f"was not checked: {error} ({facts.source})"))
        return None


def _gpus(plan: ProcessPlan, inventory: Inventory | None, settings: EngineSettings) -> list[Gpu]:
    """Of the process, or those that it would find by itself when nobody on the node was given any."""
    if plan.gpus or "CUDA_VISIBLE_DEVICES" in plan.environment:
        return list(plan.gpus)
    needed = settings.tensor_parallel_size * settings.pipeline_parallel_size // settings.nnodes
    return (inventory or find_gpus()).gpus[:needed]


def _ram(inventory: Inventory | None) -> int:
    """0 for a machine that is only described."""
    assumed = inventory is not None and inventory.source == "assumed"
    return 0 if assumed else psutil.virtual_memory().total


def _settings(config: WorkerConfig, environment: Mapping[str, str]) -> EngineSettings:
    values = config.engine_args
    given = {key: values[key] for key in EngineSettings.__dataclass_fields__ if values.get(key) is not None}
    connector = config.kv_transfer_config
    if isinstance(connector, str):
        connector = cast(dict[str, Any], json.loads(connector))
    allow_long = environment.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0").lower() in ("1", "true")
    if given.get("max_model_len") == "auto":
        given["max_model_len"] = -1
    return EngineSettings(**given, connector=connector, allow_long=allow_long)


def _port_findings(plan: ProcessPlan) -> list[Finding]:
    if plan.args.workers < 2 or _SIDE_CHANNEL not in plan.args.envs:
        return []
    port = plan.args.envs[_SIDE_CHANNEL]
    message = (
        f"has {plan.args.workers} workers and gives {_SIDE_CHANNEL}={port} to each: only one of them could listen "
        f"there; expected it left out"
    )
    return [Finding("refuse", SERVICE_ARGS, message)]


def _placed(name: str, config: WorkerConfig, configuration: Configuration, finding: Finding) -> PlacedFinding:
    option = finding.option
    if option is None:
        return PlacedFinding(finding.level, name, None, finding.message)
    section = configuration.sections.get(name) or TreeNode("", children={})
    node = lookup(section.children or {}, option)
    origin = config.engine_arg_origins.get(option) or (node.origin if node is not None else None)
    where = option if option == SERVICE_ARGS else kebab(option)
    return PlacedFinding(finding.level, f"{name}.{where}", origin or None, finding.message)
