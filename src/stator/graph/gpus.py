"""Which GPUs each process of a node gets. Pure.

Whole GPUs first, in the order of the processes; then fractions, each on the first GPU that is already shared and has
room, else on the first that is free. What is left over stays unused: nobody gets a GPU that was not asked for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from stator.errors import ConfigError

_ASSUMED = re.compile(r"(?P<count>\d{1,4})(?:x(?P<name>[A-Za-z0-9][\w .+-]*?)(?:-(?P<gb>\d{1,5})(?:GB|G))?)?", re.I)
GB = 10**9


@dataclass(frozen=True, slots=True)
class Gpu:
    """id: what CUDA_VISIBLE_DEVICES calls it. memory_bytes: 0 if that is not known."""

    id: str
    name: str = "GPU"
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """label: of the process. gpus: a whole number, or a fraction below 1."""

    label: str
    gpus: float


def parse_assumed(text: str) -> list[Gpu]:
    """`8xH100-80GB`, `8xH100` or `8`. Raises ConfigError."""
    match = _ASSUMED.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--assume-gpus {text}: expected COUNTxNAME-MEMORY, for instance 8xH100-80GB")
    name = match["name"] or "GPU"
    return [Gpu(str(index), name, int(match["gb"] or 0) * GB) for index in range(int(match["count"]))]


def visible(gpus: Sequence[Gpu], outer: str | None) -> list[Gpu]:
    """Those of the machine that an outer CUDA_VISIBLE_DEVICES leaves, in its order.

    As for CUDA itself, the first entry that names none ends the list. Entries are indices, or the beginning of a UUID.
    With no `gpus` at all (nothing could be asked) the entries are taken for what they say.
    """
    if outer is None:
        return list(gpus)
    entries = [entry.strip() for entry in outer.split(",") if entry.strip()]
    if not gpus:
        return [Gpu(entry) for entry in entries if not entry.startswith("-")]
    found: list[Gpu] = []
    for entry in entries:
        if entry.isdigit() and int(entry) < len(gpus):
            found.append(Gpu(entry, gpus[int(entry)].name, gpus[int(entry)].memory_bytes))
        elif entry.upper().startswith(("GPU-", "MIG-")):
            found.append(Gpu(entry, gpus[0].name, gpus[0].memory_bytes))
        else:
            break
    return found


def allocate(requests: Sequence[GpuRequest], gpus: Sequence[Gpu], source: str = "") -> dict[str, tuple[Gpu, ...]]:
    """GPUs for each label; empty for those who asked for none. Raises ConfigError, with the numbers, if they do not
    suffice. source: who found the GPUs."""
    amounts = {request.label: Fraction(request.gpus).limit_denominator(1000) for request in requests}
    given: dict[str, tuple[Gpu, ...]] = dict.fromkeys(amounts, ())
    free = list(gpus)
    shared: list[tuple[Gpu, Fraction]] = []
    for label, amount in amounts.items():
        if amount >= 1:
            number = int(amount)
            if number > len(free):
                raise ConfigError(_shortage(requests, gpus, source))
            given[label], free = tuple(free[:number]), free[number:]
    for label, amount in amounts.items():
        if not 0 < amount < 1:
            continue
        place = next((index for index, (_, left) in enumerate(shared) if left >= amount), None)
        if place is None:
            if not free:
                raise ConfigError(_shortage(requests, gpus, source))
            shared.append((free.pop(0), Fraction(1)))
            place = len(shared) - 1
        gpu, left = shared[place]
        shared[place] = (gpu, left - amount)
        given[label] = (gpu,)
    return given


def describe(gpus: Sequence[Gpu]) -> str:
    """`8 x H100, 80 GB`."""
    if not gpus:
        return "none"
    kinds: dict[str, int] = {}
    for gpu in gpus:
        memory = f", {gpu.memory_bytes / GB:.0f} GB" if gpu.memory_bytes else ""
        kinds[gpu.name + memory] = kinds.get(gpu.name + memory, 0) + 1
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _shortage(requests: Sequence[GpuRequest], gpus: Sequence[Gpu], source: str) -> str:
    asking = [request for request in requests if request.gpus > 0]
    who = ", ".join(f"{request.label} {request.gpus:g}" for request in asking)
    total = sum(Fraction(request.gpus).limit_denominator(1000) for request in asking)
    ids = f" ({', '.join(gpu.id for gpu in gpus)})" if 0 < len(gpus) <= 16 else ""
    note = f" ({source})" if source and not gpus else ""
    if total <= len(gpus):
        note = "; a process with a fraction cannot share a GPU that another has whole"
    return (
        f"not enough GPUs on this node: {float(total):g} asked ({who}), {len(gpus)} there{ids}{note}. Lower "
        f"ServiceArgs.workers or ServiceArgs.resources.gpu, or run a service on another node with --join"
    )
