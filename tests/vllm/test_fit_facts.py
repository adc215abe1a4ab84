"""What `stator plan` believes of vLLM, against vLLM itself. Starts no engine."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import vllm

from stator.config.vllm_models import vllm_models
from stator.core.fit_memory import pipeline_stages

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

TOOL = Path(__file__).resolve().parents[2] / "tools" / "vllm_architectures.py"


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_architectures", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layers_are_split_as_vllm_splits_them() -> None:
    from vllm.distributed.utils import get_pp_indices

    for layers in (1, 7, 32, 61, 80, 126):
        for size in range(1, min(layers, 16) + 1):
            assert pipeline_stages(layers, size) == [get_pp_indices(layers, rank, size) for rank in range(size)]


def test_the_committed_facts_are_this_versions() -> None:
    facts, made = vllm_models(), tool()
    assert facts.version == vllm.__version__.split("+")[0]
    assert facts.architectures == {kind: frozenset(names) for kind, names in made.architectures().items()}
    assert all(made.minimum_capability(method) == least for method, least in facts.quantization.items())
