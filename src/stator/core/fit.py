"""Can a model run in a worker with these flags on these GPUs, and how much KV cache is left? Pure.

`evaluate` is asked before anything is loaded. What is certain refuses; what rests on the estimate of activations and
workspaces (`fit_memory.overhead`) warns.
"""

from math import ceil

from stator.core import fit_memory, fit_rules
from stator.core.fit_types import Device, EngineFacts, EngineSettings, Finding, FitReport, KvCapacity, StageFit
from stator.core.model_shape import DTYPE_BYTES, ModelShape

GB = 10**9


def evaluate(
    model: ModelShape | None,
    file_bytes: int | None,
    settings: EngineSettings,
    device: Device,
    facts: EngineFacts,
) -> FitReport:
    """file_bytes: of the weights' files together, None if they are not here. model: None if its config is not."""
    if model is None:
        found = [*fit_rules.scheduler_rules(settings, settings.max_model_len)]
        found += fit_rules.connector_rules(settings, device, facts)
        source = None if file_bytes is None else "files"
        return _without_sizes(None, settings, device, settings.max_model_len, found, (file_bytes, source))
    max_len = settings.max_model_len if (settings.max_model_len or 0) > 0 else model.max_position
    found = _rules(model, settings, device, facts, max_len)
    if settings.dtype not in ("auto", *DTYPE_BYTES):
        expected = ", ".join(("auto", *DTYPE_BYTES))
        found.append(Finding("refuse", "dtype", f"is {settings.dtype}; expected one of {expected}"))
        return _without_sizes(model, settings, device, max_len, found)
    weights = fit_memory.model_weights(model, file_bytes, settings, device)
    if weights is None:
        found.append(Finding("note", "model", _no_weights(model)))
    stages = fit_memory.stage_fits(model, weights, settings, device)
    extra = fit_memory.overhead(model, settings, device)
    dtype = fit_memory.kv_dtype(model, settings, device)
    known = not device.is_cpu and device.memory_bytes > 0
    budget = ceil(device.memory_bytes * settings.gpu_memory_utilization) if known else None
    kv = _capacity(model, settings, device, stages, dtype, max_len, extra, found) if weights is not None else None
    if weights is not None:
        found += _memory_findings(settings, device, stages, kv, max_len, extra)
    return FitReport(
        architecture=model.architecture or None,
        parameters=model.parameters,
        weight_bytes=None if weights is None else weights.total_bytes,
        weight_source=None if weights is None else weights.source,
        max_model_len=max_len,
        device=device.name,
        device_bytes=device.memory_bytes or None,
        budget_bytes=budget,
        overhead_bytes=None if device.is_cpu else extra,
        stages=stages if weights is not None else (),
        kv=kv,
        findings=tuple(found),
    )


def _without_sizes(
    model: ModelShape | None,
    settings: EngineSettings,
    device: Device,
    max_len: int | None,
    found: list[Finding],
    files: tuple[int | None, str | None] = (None, None),
) -> FitReport:
    architecture, parameters = (None, None) if model is None else (model.architecture or None, model.parameters)
    memory = device.memory_bytes or None
    return FitReport(
        architecture, parameters, *files, max_len, device.name, memory, None, None, (), None, tuple(found)
    )  # fmt: skip


def _rules(
    model: ModelShape, settings: EngineSettings, device: Device, facts: EngineFacts, max_len: int | None
) -> list[Finding]:
    return [
        *fit_rules.architecture_rules(model, settings, facts),
        *fit_rules.parallel_rules(model, settings),
        *fit_rules.group_rules(model, settings),
        *fit_rules.quantization_rules(model, settings, device, facts),
        *fit_rules.dtype_rules(model, settings, device),
        *fit_rules.cache_rules(model, settings, device),
        *fit_rules.scheduler_rules(settings, max_len),
        *fit_rules.connector_rules(settings, device, facts),
    ]


def _no_weights(model: ModelShape) -> str:
    if not model.counted:
        what = f"the parameters of {model.architecture or 'this architecture'} are not counted here"
    else:
        what = "what its quantization makes of a weight is not known here"
    return f"{what} and its files are not on this machine: memory was not checked"


def _capacity(
    model: ModelShape,
    settings: EngineSettings,
    device: Device,
    stages: tuple[StageFit, ...],
    dtype: str,
    max_len: int | None,
    extra: int,
    found: list[Finding],
) -> KvCapacity | None:
    reason = model.kv_unknown
    if reason is None and fit_memory.kv_bytes_per_token(model, 1, dtype) is None:
        reason = f"kv-cache-dtype {dtype} has a layout of its own"
    if reason is None and settings.decode_context_parallel_size > 1:
        reason = "decode-context-parallel-size spreads it over ranks"
    if reason is not None:
        found.append(Finding("note", None, f"KV cache not estimated: {reason}"))
        return None
    if model.windowed:
        found.append(
            Finding("note", "model", "some layers attend to a window only: the KV cache may hold more than shown")
        )
    if not any(stage.kv_bytes_per_token for stage in stages) or max_len is None:
        return None
    return fit_memory.kv_capacity(stages, settings, device, dtype=dtype, max_model_len=max_len, overhead_bytes=extra)


def _memory_findings(
    settings: EngineSettings,
    device: Device,
    stages: tuple[StageFit, ...],
    kv: KvCapacity | None,
    max_len: int | None,
    extra: int,
) -> list[Finding]:
    total = device.memory_bytes
    if not total:
        return [
            Finding("note", None, f"the memory of {device.name} is not known: whether the weights fit was not checked")
        ]
    if device.is_cpu:
        return _ram_findings(settings, device, stages, kv, max_len)
    offload = round(settings.cpu_offload_gb * fit_memory.GIB)
    weights = max(stage.weight_bytes for stage in stages) - offload
    utilization = settings.gpu_memory_utilization
    fixed = settings.kv_cache_memory_bytes is not None
    budget = total if fixed else ceil(total * utilization)
    of = f"of {device.name}" if fixed else f"that gpu-memory-utilization {utilization:g} gives it on {device.name}"
    option = "model" if weights > total else "gpu_memory_utilization"
    if weights > budget:
        return [Finding("refuse", option, f"the weights take {_gb(weights)} on each GPU, more than the {_gb(budget)} "
                        f"{of}; expected more GPUs a worker (tensor-parallel-size) or a smaller model")]  # fmt: skip
    if fixed or settings.num_gpu_blocks_override is not None:
        return _fixed_findings(settings, kv, weights, total, extra, max_len)
    return _budget_findings(settings, device, stages, kv, max_len, (weights, budget, extra))


def _fixed_findings(
    settings: EngineSettings, kv: KvCapacity | None, weights: int, total: int, extra: int, max_len: int | None
) -> list[Finding]:
    """A cache whose size was given: it must lie beside the weights, and hold one request."""
    if kv is None:
        return []
    option = kv.source.replace("-", "_")
    found = [*_one_request(kv, max_len, option)]
    if weights + kv.bytes_per_gpu > total:
        found.append(Finding("refuse", option, f"asks for {_gb(kv.bytes_per_gpu)} of KV cache on each GPU, and beside "
                     f"{_gb(weights)} of weights {_gb(total - weights)} are left"))  # fmt: skip
    elif weights + kv.bytes_per_gpu + extra > total:
        found.append(Finding("warn", option, f"asks for {_gb(kv.bytes_per_gpu)} of KV cache on each GPU: with "
                     f"{_gb(weights)} of weights and about {_gb(extra)} for activations it may not fit"))  # fmt: skip
    return found + _sequences(settings, kv)


def _budget_findings(
    settings: EngineSettings,
    device: Device,
    stages: tuple[StageFit, ...],
    kv: KvCapacity | None,
    max_len: int | None,
    sizes: tuple[int, int, int],
) -> list[Finding]:
    weights, budget, extra = sizes
    if kv is None or max_len is None:
        if weights + extra <= budget:
            return []
        return [Finding("warn", "gpu_memory_utilization", f"{_gb(weights)} of weights and about {_gb(extra)} for "
                        f"activations may not fit into {_gb(budget)} of {device.name}")]  # fmt: skip
    if settings.max_model_len == -1:
        return []
    # With no overhead at all, a request that does not fit cannot fit: that is certain.
    best = fit_memory.kv_capacity(stages, settings, device, dtype=kv.dtype, max_model_len=max_len, overhead_bytes=0)
    needed = ceil(max_len / kv.block_size)
    if best is not None and best.blocks - 1 < needed:
        return [Finding("refuse", _length_option(settings), f"{_length(settings, max_len)}: a request needs "
                f"{needed * kv.block_size} tokens of KV cache, and at most {max(0, best.blocks - 1) * kv.block_size} "
                f"fit beside the weights; expected a smaller max-model-len, or more memory")]  # fmt: skip
    if kv.blocks - 1 < needed:
        return [Finding("warn", _length_option(settings), f"{_length(settings, max_len)}: a request needs "
                f"{needed * kv.block_size} tokens of KV cache, and about {max(0, kv.blocks - 1) * kv.block_size} "
                f"are left by weights and an estimated {_gb(extra)} for activations: it may not start")]  # fmt: skip
    return _sequences(settings, kv)


def _length_option(settings: EngineSettings) -> str:
    return "model" if settings.max_model_len is None else "max_model_len"


def _length(settings: EngineSettings, max_len: int) -> str:
    """The beginning of a finding about `_length_option`."""
    return f"is {max_len}" if settings.max_model_len is not None else f"has a context of {max_len}"


def _one_request(kv: KvCapacity, max_len: int | None, option: str) -> list[Finding]:
    """kv_cache_utils.py, _check_enough_kv_cache_memory: one block is never given out."""
    needed = 0 if max_len is None else ceil(max_len / kv.block_size)
    if kv.blocks - 1 >= needed:
        return []
    return [Finding("refuse", option, f"makes {kv.blocks} blocks of {kv.block_size} tokens, one of which vLLM keeps; a "
                    f"request of max-model-len {max_len} needs {needed}")]  # fmt: skip


def _sequences(settings: EngineSettings, kv: KvCapacity) -> list[Finding]:
    seqs = settings.max_num_seqs
    if seqs is None or kv.requests >= seqs:
        return []
    return [Finding("note", "max_num_seqs", f"is {seqs}, and {kv.requests:.1f} requests of full length fit at once: "
                    f"when that many are long, some wait or are computed again")]  # fmt: skip


def _ram_findings(
    settings: EngineSettings,
    device: Device,
    stages: tuple[StageFit, ...],
    kv: KvCapacity | None,
    max_len: int | None,
) -> list[Finding]:
    """All ranks of a worker share the machine's memory, or the machines'."""
    tp = settings.tensor_parallel_size
    weights = sum(stage.weight_bytes for stage in stages) * tp // settings.nnodes
    cache = 0 if kv is None else kv.bytes_per_gpu * tp * len(stages) // settings.nnodes
    found = [] if kv is None else [*_one_request(kv, max_len, kv.source.replace("-", "_"))]
    if weights + cache > device.memory_bytes:
        found.append(Finding("refuse", "model", f"{_gb(weights)} of weights and {_gb(cache)} of KV cache do not "
                     f"fit into {_gb(device.memory_bytes)} of memory"))  # fmt: skip
    return found


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
