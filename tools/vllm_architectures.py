"""Write src/stator/config/vllm_architectures.json from an installed vLLM: what its registries say about models.

    python tools/vllm_architectures.py

`architectures`: by kind. `no_pipeline`: those whose class lacks vLLM's SupportsPP. `quantization`: the least compute
capability (major * 10 + minor) each method takes. `connectors`: the names of KV connectors.
"""

import json
from pathlib import Path
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.models import registry
from vllm.model_executor.models.interfaces import supports_pp

OUT = Path(__file__).resolve().parent.parent / "src" / "stator" / "config" / "vllm_architectures.json"
KINDS = {
    "text": ("_TEXT_GENERATION_MODELS",),
    "multimodal": ("_MULTIMODAL_MODELS",),
    "pooling": (
        "_EMBEDDING_MODELS",
        "_LATE_INTERACTION_MODELS",
        "_REWARD_MODELS",
        "_TOKEN_CLASSIFICATION_MODELS",
        "_SEQUENCE_CLASSIFICATION_MODELS",
    ),
    "speculative": ("_SPECULATIVE_DECODING_MODELS",),
}


def architectures() -> dict[str, list[str]]:
    return {
        kind: sorted({name for table in tables for name in getattr(registry, table)}) for kind, tables in KINDS.items()
    }


def lacks_pipeline(name: str) -> bool:
    """False if the class cannot be imported here: nothing is claimed about it."""
    try:
        return not supports_pp(registry.ModelRegistry.models[name].load_model_cls())
    except Exception as error:
        print(f"{name}: not inspected: {type(error).__name__}: {error}")
        return False


def minimum_capability(method: str) -> int | None:
    try:
        return get_quantization_config(method).get_min_capability()
    except Exception as error:
        print(f"{method}: not inspected: {type(error).__name__}: {error}")
        return None


def main() -> None:
    kinds = architectures()
    capabilities = {method: minimum_capability(method) for method in sorted(QUANTIZATION_METHODS)}
    document: dict[str, Any] = {
        "vllm": vllm.__version__.split("+")[0],
        "architectures": kinds,
        "no_pipeline": [name for name in (*kinds["text"], *kinds["multimodal"]) if lacks_pipeline(name)],
        "dropped": dict(sorted(registry._PREVIOUSLY_SUPPORTED_MODELS.items())),
        "quantization": {method: value for method, value in capabilities.items() if value is not None},
        "connectors": sorted(KVConnectorFactory._registry),
    }
    OUT.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{OUT.name}: {sum(map(len, kinds.values()))} architectures of vLLM {document['vllm']}")


if __name__ == "__main__":
    main()
