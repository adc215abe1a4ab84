"""What a GPU's name says about its memory and generation; the data is gpu_facts.toml."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from stator.core.fit_types import Capability, Device
from stator.graph.gpus import GB, Gpu

GIB = 1024**3
_TOLERANCE = 0.12


@dataclass(frozen=True, slots=True)
class GpuFacts:
    name: str
    gb: int
    memory_bytes: int
    capability: Capability


@cache
def gpu_facts() -> tuple[GpuFacts, ...]:
    data = tomllib.loads((files("stator.graph") / "gpu_facts.toml").read_text(encoding="utf-8"))
    return tuple(
        GpuFacts(row["name"], row["gb"], int(row["memory_gib"] * GIB), (row["capability"][0], row["capability"][1]))
        for row in data["gpu"]
    )


def device_of(gpus: Sequence[Gpu]) -> Device:
    """The poorest of a worker's GPUs, since all ranks get the same share. gpus: not empty."""
    devices = [_device(gpu) for gpu in gpus]
    capabilities = [device.capability for device in devices]
    known = [capability for capability in capabilities if capability is not None]
    return Device(
        name=devices[0].name,
        memory_bytes=min(device.memory_bytes for device in devices),
        capability=min(known) if len(known) == len(devices) else None,
    )


def _device(gpu: Gpu) -> Device:
    near = find_gpu(gpu.name, gpu.memory_bytes)
    if near is None:
        # A slice of a GPU, or a kind that came later: the name still tells its generation.
        same = find_gpu(gpu.name, 0)
        return Device(gpu.name, gpu.memory_bytes, None if same is None else same.capability)
    measured = gpu.memory_bytes > 0 and gpu.memory_bytes % GB != 0
    memory = min(near.memory_bytes, gpu.memory_bytes) if measured else near.memory_bytes
    return Device(gpu.name, memory, near.capability)


def find_gpu(name: str, memory_bytes: int) -> GpuFacts | None:
    """memory_bytes: 0 for the first of that name. None if no GPU of that name has about as much."""
    matching = [facts for facts in gpu_facts() if re.search(rf"\b{re.escape(facts.name)}\b", name, re.IGNORECASE)]
    if not memory_bytes:
        return matching[0] if matching else None
    near = [facts for facts in matching if abs(memory_bytes - facts.gb * GB) <= _TOLERANCE * facts.gb * GB]
    return min(near, key=lambda facts: abs(memory_bytes - facts.gb * GB), default=None)
