"""What is known of a model on this machine, without loading or downloading it: its config and the size of its weights.

Looked for in this order: a directory, a bundled model, the local Hugging Face cache, and for planning only the models
whose dimensions come with Stator (`known_models`).
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import msgspec

from stator.config.models import BUNDLED_SCHEME, resolve_model
from stator.errors import ConfigError

_CONFIG = "config.json"
_QUANTIZATION = "hf_quant_config.json"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000

Find = Callable[[str], Path | None]
"""Where a file of the model is; None if it is not on this machine."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """config: None if nothing is known. weight_bytes: of the files, None if they are not here. source: where the facts
    are from, in words. missing: what could not be found, and why that matters. approximate: what of it is a guess."""

    config: dict[str, Any] | None
    quantization: dict[str, Any] | None
    weight_bytes: int | None
    source: str
    missing: str | None = None
    approximate: str | None = None


class _Known(msgspec.Struct, frozen=True):
    """blocks: runs of equal Nemotron-NAS layers: how many, query heads to a KV head (null: no attention), FFN multiple.
    parameters: published, a check of the rest."""

    model: str
    source: str
    parameters: int
    config: dict[str, Any]
    quantization: dict[str, Any] | None = None
    blocks: list[tuple[int, int | None, float]] = []
    approximate: str | None = None

    def full_config(self) -> dict[str, Any]:
        if not self.blocks:
            return self.config
        layers = [_block(group, multiple) for count, group, multiple in self.blocks for _ in range(count)]
        return {**self.config, "block_configs": layers}


def _block(group: int | None, multiple: float) -> dict[str, Any]:
    return {
        "attention": {"no_op": group is None, "n_heads_in_group": group},
        "ffn": {"no_op": False, "ffn_mult": multiple},
    }


def find_facts(model: str, revision: str | None = None) -> ModelFacts:
    """Never downloads. Raises ConfigError for a directory or a bundled model that is none."""
    path = Path(model).expanduser()
    if model.startswith(BUNDLED_SCHEME) or path.exists() or _is_path(model):
        directory = resolve_model(model)
        return _read(lambda name: _existing(directory / name), str(directory))
    facts = _read(_cached(model, revision), "the local Hugging Face cache")
    if facts.config is not None:
        return facts
    known = _known_model(model)
    if known is not None:
        return ModelFacts(
            known.full_config(), known.quantization, None, "dimensions that come with Stator", None, known.approximate
        )
    return ModelFacts(
        None, None, None, "nothing",
        f"{model} is not on this machine and its dimensions are not among those that come with Stator: architecture, "
        f"memory and parallel sizes were not checked (download it, or give its directory)",
    )  # fmt: skip


def known_models() -> list[str]:
    return sorted(item.model for item in _all_known())


def _all_known() -> list[_Known]:
    folder = files("stator.config") / "known_models"
    return [msgspec.json.decode(file.read_bytes(), type=_Known) for file in folder.iterdir()]


def _known_model(model: str) -> _Known | None:
    return next((known for known in _all_known() if known.model == model), None)


def _is_path(model: str) -> bool:
    """A hub id is NAME or OWNER/NAME; all else can only be a path."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _cached(model: str, revision: str | None) -> Find:
    def find(name: str) -> Path | None:
        # Imported here: it takes a while, and only hub ids need it.
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(model, name, revision=revision)
        except HFValidationError:
            return None
        return Path(found) if isinstance(found, str) else None

    return find


def _read(find: Find, source: str) -> ModelFacts:
    config = _json(find(_CONFIG))
    if config is None:
        return ModelFacts(None, None, None, source)
    return ModelFacts(config, _json(find(_QUANTIZATION)), _weight_bytes(find), source)


def _json(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return cast(dict[str, Any], value)


def _weight_bytes(find: Find) -> int | None:
    """From the index; else from the header of a lone file, which tells the whole size before all of it is there."""
    index = find(_INDEX)
    if index is not None:
        total = ((_json(index) or {}).get("metadata") or {}).get("total_size")
        if isinstance(total, (int, float)):
            return int(total)
    single = find("model.safetensors")
    return None if single is None else _tensor_bytes(single)


def _tensor_bytes(path: Path) -> int | None:
    """Of all tensors of a safetensors file: 8 bytes of header length, the header, data (the format's README)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER_BYTES, os.path.getsize(path)):
                return None
            header = json.loads(file.read(length))
    except (OSError, ValueError):
        return None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return max(ends, default=None)
