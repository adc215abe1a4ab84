"""The GPUs of this machine: asked from NVML if nvidia-ml-py is installed, else from nvidia-smi."""

import importlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stator.graph.gpus import Gpu, visible

NVIDIA_SMI_TIMEOUT_S = 20.0
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Inventory:
    """gpus: those that this process may use. source: who said so."""

    gpus: list[Gpu]
    source: str


def find_gpus(environ: Mapping[str, str] | None = None) -> Inventory:
    """Never raises: a machine without a driver has no GPUs. May take seconds (nvidia-smi)."""
    outer = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    found = _from_nvml() or _from_nvidia_smi() or Inventory([], "neither nvidia-ml-py nor nvidia-smi found a GPU")
    if outer is None:
        return found
    return Inventory(visible(found.gpus, outer), f"{found.source}; CUDA_VISIBLE_DEVICES={outer}")


def _from_nvml() -> Inventory | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:
        # Not installed, or no driver: both mean that NVML has nothing to say here.
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        gpus = [
            Gpu(str(index), _text(nvml.nvmlDeviceGetName(handle)), int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
            for index, handle in enumerate(handles)
        ]
    except Exception:
        return None
    finally:
        nvml.nvmlShutdown()
    return Inventory(gpus, "NVML")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _from_nvidia_smi() -> Inventory | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=True,
        )
        return Inventory(parse_nvidia_smi(done.stdout), "nvidia-smi")
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """Lines `0, NVIDIA H100 80GB HBM3, 81559` (MiB). Raises ValueError."""
    gpus: list[Gpu] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        index, name, memory = (part.strip() for part in line.split(","))
        gpus.append(Gpu(str(int(index)), name, int(memory) * MIB if memory.isdigit() else 0))
    return gpus
