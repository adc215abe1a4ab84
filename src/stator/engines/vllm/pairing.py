"""What two vLLM engines must have in common before one takes the other's KV blocks.

Every rule is here because vLLM does not check it in time: with other block sizes NIXL transfers without an error and
the text is wrong. Engines pair if their dicts are equal, so each entry is a short string that says what differs.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stator.engines.vllm.connectors import NIXL_CONNECTOR, STATOR_CONNECTOR, STATOR_CONNECTOR_VERSION

SAMPLE_BYTES = 4096
NUM_SAMPLES = 16
"""Of each weights file: enough to tell fine-tunes of one model apart, few enough to read on every start."""

_NOT_IDENTITY = ("_name_or_path", "transformers_version", "auto_map")


def pairing(
    *,
    engine_version: str,
    block_size: int,
    kv_dtype: str,
    kv_layout: str,
    model: str,
    model_digest: str,
    revision: str | None,
    connector: str,
    tp_size: int,
    pp_size: int = 1,
    attention_backend: str = "",
) -> dict[str, str]:
    """`EngineInfo.pairing` of a vLLM engine.

    engine_version: vLLM's. kv_dtype: as stored, with "auto" resolved to the model's. model: as the engine was told, a
    directory or a hub id; it counts for NIXL only, whose own handshake compares it. model_digest: `model_identity`.
    """
    found = {
        "block_size": str(block_size),
        "kv_dtype": kv_dtype,
        "kv_layout": f"{kv_layout} {attention_backend}".strip(),
        "model": f"{model_digest} {revision}" if revision else model_digest,
        "engine": f"vllm {engine_version}",
        "connector": _connector(connector),
        "workers": f"tp {tp_size} pp {pp_size}",
    }
    if connector == NIXL_CONNECTOR:
        found["model_path"] = model
    return found


def engine_pairing(vllm_config: Any, connector: str, *, engine_version: str) -> dict[str, str]:
    """`pairing` from a started engine's `AsyncLLM.vllm_config`. Reads samples of the model's files."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    # Set only if the user chose one; what vLLM chooses follows from the rest, and NIXL compares it too.
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    kv_dtype = str(cache.cache_dtype)
    if kv_dtype == "auto":
        kv_dtype = str(model.dtype).removeprefix("torch.")
    return pairing(
        engine_version=engine_version,
        block_size=cache.block_size,
        kv_dtype=kv_dtype,
        kv_layout=str(getattr(cache, "kv_cache_layout", None) or "default"),
        model=model.model,
        model_digest=model_identity(model.model, model.hf_config.to_dict()),
        revision=model.revision,
        connector=connector,
        tp_size=parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
        attention_backend="" if backend is None else str(getattr(backend, "name", backend)),
    )


def model_identity(model: str, config: Mapping[str, Any]) -> str:
    """Differs for models whose KV differs: by configuration, and by weights.

    model: a directory, whose weights files are sampled, or a hub id, which then stands for its weights.
    config: the model's, as loaded.
    """
    digest = hashlib.blake2b(digest_size=16)
    known = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    directory = Path(model)
    if not directory.is_dir():
        digest.update(model.encode())
        return digest.hexdigest()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.name.encode())
        _sample(path, digest)
    return digest.hexdigest()


def _sample(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def _connector(name: str) -> str:
    return f"{name} {STATOR_CONNECTOR_VERSION}" if name == STATOR_CONNECTOR else name
