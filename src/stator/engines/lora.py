"""LoRA adapters of engines: the seam of those that have them, and what can be told of an adapter's directory."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from stator.engines.base import Engine
from stator.errors import ErrorCode, StatorError
from stator.messages.lora import LoraAdapter

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")

DEFAULT_MAX_RANK = 16
"""As vLLM has it."""

MAX_CONFIG_BYTES = 1 << 20
NUM_SAMPLES = 64
SAMPLE_BYTES = 4096


@runtime_checkable
class LoraEngine(Engine, Protocol):
    """An engine that can have adapters; requests name one with `EngineRequest.lora_name`.

    A request for an adapter that is not loaded ends with MODEL_NOT_FOUND.
    """

    @property
    def adapters(self) -> Mapping[str, LoraAdapter]:
        """By name, those of its settings too once it has started."""
        ...

    async def load_adapter(self, name: str, path: str) -> LoraAdapter:
        """path: an absolute directory. The name must not be loaded. Raises StatorError: NOT_FOUND if there is no
        adapter at the path, INVALID_REQUEST if it cannot be used, UNSUPPORTED if the engine was started without
        adapters."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """No request may use it any more. Unknown names are ignored."""
        ...


def not_enabled() -> StatorError:
    message = "LoRA adapters are off in this engine; start the worker with enable-lora (and max-lora-rank, max-loras)"
    return StatorError(ErrorCode.UNSUPPORTED, message)


def not_loaded(name: str, known: Collection[str]) -> StatorError:
    loaded = ", ".join(known) or "none"
    return StatorError(
        ErrorCode.MODEL_NOT_FOUND, f"this worker has no LoRA adapter {name!r}; it has {loaded}", param="model"
    )


def read_adapter(name: str, path: str, *, max_rank: int, needs_weights: bool = True) -> LoraAdapter:
    """Looks at an adapter in PEFT's layout, without loading it. Reads some hundred KB. Raises StatorError as
    `LoraEngine.load_adapter`."""
    directory = Path(path)
    if not directory.is_dir():
        raise StatorError(ErrorCode.NOT_FOUND, f"there is no directory {path} on this node")
    try:
        with (directory / CONFIG).open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        config: Any = json.loads(raw) if len(raw) <= MAX_CONFIG_BYTES else None
    except FileNotFoundError:
        raise StatorError(ErrorCode.NOT_FOUND, f"{path} has no {CONFIG}: it is no LoRA adapter") from None
    except (OSError, ValueError) as error:
        raise StatorError(ErrorCode.INVALID_REQUEST, f"{directory / CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise StatorError(ErrorCode.INVALID_REQUEST, f"{directory / CONFIG} is not a JSON object of usual size")
    rank = _rank(cast("dict[str, Any]", config), directory / CONFIG)
    if rank > max_rank:
        raise StatorError(
            ErrorCode.INVALID_REQUEST,
            f"the rank of {path} is {rank}, above max-lora-rank, which is {max_rank} here; start the worker with more",
        )
    weights = next((directory / file for file in WEIGHTS if (directory / file).is_file()), None)
    if weights is None and needs_weights:
        raise StatorError(ErrorCode.NOT_FOUND, f"{path} has no {WEIGHTS[0]}: its weights are missing")
    digest = hashlib.blake2b(raw, digest_size=8)
    try:
        if weights is not None:
            _add_samples(digest, weights)
    except OSError as error:
        raise StatorError(ErrorCode.INVALID_REQUEST, f"{weights} cannot be read: {error}") from None
    return LoraAdapter(name, path, digest.hexdigest())


def on_node(path: str) -> str:
    """A path of the settings, absolute."""
    return str(Path(path).expanduser().absolute())


def _rank(config: Mapping[str, Any], where: Path) -> int:
    pattern = config.get("rank_pattern")
    ranks: list[Any] = [config.get("r")]
    if isinstance(pattern, dict):
        ranks += cast("dict[str, Any]", pattern).values()
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        raise StatorError(ErrorCode.INVALID_REQUEST, f"{where}: r is {ranks[0]!r}; it must be a rank above 0")
    return max(ranks)


def _add_samples(digest: "hashlib.blake2b", weights: Path) -> None:
    """Two trainings differ everywhere, so samples tell them apart."""
    with weights.open("rb") as file:
        size = file.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        for number in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // max(1, NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
