"""A fit as text: for `stator serve --dry-run` and `stator plan`."""

from collections.abc import Sequence

from stator.core.fit_types import FitReport, KvCapacity, StageFit
from stator.graph.fit import SectionFit

GB = 10**9
_LABEL = 14


def fit_lines(fit: SectionFit) -> list[str]:
    """A paragraph, indented by two."""
    report = fit.report
    lines = [f"  {fit.section}  ({fit.model})"]
    rows = [("model", _model(fit)), ("weights", _weights(report)), ("each process", _split(fit))]
    rows += [("nodes", text) for text in _nodes(fit)]
    rows += [(label, _stage(report, stage)) for label, stage in _stages(report.stages)]
    rows += [("KV cache", text) for text in _kv(report.kv, report.max_model_len)]
    lines += [f"    {label:<{_LABEL}}{text}" for label, text in rows if text]
    for finding in fit.findings:
        lines.append(f"    {finding.level:<{_LABEL}}{finding.text()}")
    return lines


def _model(fit: SectionFit) -> str:
    parts = [fit.report.architecture or "not known", f"from {fit.model_source}"]
    if fit.report.parameters is not None:
        parts.insert(1, f"{fit.report.parameters / 1e9:.1f} B parameters")
    return ", ".join(parts)


def _weights(report: FitReport) -> str:
    if report.weight_bytes is None:
        return "not known"
    source = "of the files" if report.weight_source == "files" else "computed from the config"
    return f"{report.weight_bytes / GB:.1f} GB, {source}"


def _split(fit: SectionFit) -> str:
    parallel = f"tensor-parallel-size {fit.tensor_parallel_size}, pipeline-parallel-size {fit.pipeline_parallel_size}"
    if not fit.gpus:
        return f"{parallel} on CPUs"
    memory = fit.report.device_bytes
    shown = f"{memory / GB:.1f} GB usable" if memory else "memory not known"
    return f"{parallel}; {fit.gpus} x {fit.report.device}, {shown}"


def _nodes(fit: SectionFit) -> list[str]:
    if fit.num_nodes == 1:
        return []
    ranks = fit.tensor_parallel_size * fit.pipeline_parallel_size // fit.num_nodes
    return [
        f"{fit.num_nodes} nodes run one engine, {ranks} {'GPUs' if fit.gpus else 'ranks'} on each; it loads when all "
        f"have come",
        f"one command per node: this one here, `stator serve` of {fit.section}'s component with --join on each other",
    ]


def _stages(stages: Sequence[StageFit]) -> list[tuple[str, StageFit]]:
    if len(stages) == 1:
        return [("each GPU", stages[0])]
    return [(f"GPU, stage {index}", stage) for index, stage in enumerate(stages, 1)]


def _stage(report: FitReport, stage: StageFit) -> str:
    first, end = stage.layers
    text = f"{stage.weight_bytes / GB:.1f} GB of weights (layers {first} to {end - 1})"
    if report.budget_bytes is None or report.overhead_bytes is None:
        return text
    left = report.budget_bytes - stage.weight_bytes - report.overhead_bytes
    return (
        f"{text}, about {report.overhead_bytes / GB:.1f} GB for activations and buffers (estimate), "
        f"{max(0, left) / GB:.1f} of {report.budget_bytes / GB:.1f} GB left"
    )


def _kv(kv: KvCapacity | None, max_model_len: int | None) -> list[str]:
    if kv is None:
        return []
    return [
        f"{kv.tokens:,} tokens: {kv.blocks:,} blocks of {kv.block_size} ({kv.source}), {kv.dtype}, "
        f"{kv.bytes_per_token / 1024:.1f} KiB a token on all GPUs together",
        f"{kv.requests:.1f} requests of {max_model_len:,} tokens at the same time" if max_model_len else "",
    ]
