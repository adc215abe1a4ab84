"""What vLLM's registries say about models, written by tools/vllm_architectures.py: data, so that no vLLM is needed."""

from functools import cache
from importlib.resources import files

import msgspec

from stator.core.fit_types import EngineFacts


class _File(msgspec.Struct, frozen=True):
    vllm: str
    architectures: dict[str, list[str]]
    no_pipeline: list[str]
    dropped: dict[str, str]
    quantization: dict[str, int]
    connectors: list[str]


@cache
def vllm_models() -> EngineFacts:
    data = msgspec.json.decode((files("stator.config") / "vllm_architectures.json").read_bytes(), type=_File)
    return EngineFacts(
        version=data.vllm,
        architectures={kind: frozenset(names) for kind, names in data.architectures.items()},
        no_pipeline=frozenset(data.no_pipeline),
        dropped=data.dropped,
        quantization=data.quantization,
        connectors=frozenset(data.connectors),
    )
