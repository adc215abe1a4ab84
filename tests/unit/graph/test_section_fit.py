"""Fits of a node's sections: which GPUs, and where a finding was written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stator.config.vllm_models import vllm_models
from stator.core.fit import evaluate
from stator.core.fit_types import Device, EngineSettings
from stator.core.model_shape import read_shape
from stator.errors import ConfigError
from stator.graph import node
from stator.graph.fit import SectionFit
from stator.graph.fit_text import fit_lines
from stator.graph.gpu_facts import device_of, find_gpu, gpu_facts
from stator.graph.gpus import GB, Gpu, parse_assumed
from stator.graph.machine import MIB
from stator.graph.node import ServeOptions, prepare

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "llm"
MODELS = EXAMPLES.parents[1] / "src" / "stator" / "models"
GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "gib", "capability"),
    [
        ("8xH100-80GB", 79.14, (9, 0)),
        ("H200-141GB", 139.72, (9, 0)),
        ("8xA100-40GB", 39.38, (8, 0)),
        ("8xA100-80GB", 79.14, (8, 0)),
        ("2xL40S-48GB", 44.34, (8, 9)),
        ("1xL4", 21.9, (8, 9)),
        ("1xT4-16GB", 14.56, (7, 5)),
        ("4xV100-32GB", 31.7, (7, 0)),
        ("8xB200-192GB", 178.35, (10, 0)),
    ],
)
def test_assumed_gpus(text: str, gib: float, capability: tuple[int, int]) -> None:
    device = device_of(parse_assumed(text if text[0].isdigit() else f"1x{text}"))
    assert device.memory_bytes == int(gib * GIB) and device.capability == capability


@pytest.mark.parametrize(
    ("name", "mib", "gb"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, 80),
        ("NVIDIA H200", 143771, 141),
        ("NVIDIA A100-SXM4-40GB", 40960, 40),
        ("NVIDIA A100-SXM4-80GB", 81920, 80),
        ("NVIDIA L40S", 46068, 48),
        ("NVIDIA L4", 23034, 24),
        ("Tesla T4", 15360, 16),
    ],
)
def test_names_and_memory_as_nvml_says_them(name: str, mib: int, gb: int) -> None:
    found = find_gpu(name, mib * MIB)
    assert found is not None and found.gb == gb
    device = device_of([Gpu("0", name, mib * MIB)])
    # CUDA's own total is less than NVML's.
    assert device.memory_bytes == min(found.memory_bytes, mib * MIB) and device.capability == found.capability


def test_gpus_that_are_not_known() -> None:
    other = device_of(parse_assumed("2xNoname-48GB"))
    assert (other.memory_bytes, other.capability) == (48 * GB, None)
    # A slice of an A100 has its generation, and its own memory.
    mig = device_of([Gpu("0", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9728 * MIB)])
    assert (mig.memory_bytes, mig.capability) == (9728 * MIB, (8, 0))
    assert find_gpu("NVIDIA L400", 0) is None
    assert all(facts.memory_bytes <= facts.gb * 1.08 * GB for facts in gpu_facts())


def test_the_poorest_gpu_of_a_worker_decides() -> None:
    mixed = device_of([Gpu("0", "H100", 80 * GB), Gpu("1", "A100", 40 * GB)])
    assert mixed.memory_bytes == int(39.38 * GIB) and mixed.capability == (8, 0)


def prepared(tmp_path: Path, text: str, *overrides: tuple[str, str], start: bool = False, gpus: str | None) -> Any:
    (tmp_path / "c.yaml").write_text(text)
    options = ServeOptions(
        target="graphs.agg:Frontend", directory=EXAMPLES, config=tmp_path / "c.yaml", overrides=overrides,
        advertise="127.0.0.1", assume_gpus=gpus,
    )  # fmt: skip
    return prepare(options, for_start=start)


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were installed, so that a start reaches the fit."""
    monkeypatch.setattr(node, "check_installed", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    monkeypatch.setattr("sys.path", [str(EXAMPLES), *__import__("sys").path])


CONFIG = """\
Processor:
  model: nvidia/Llama-3.1-405B-Instruct-FP8
VllmWorker:
  model: nvidia/Llama-3.1-405B-Instruct-FP8
  quantization: modelopt
  tensor-parallel-size: 8
  max-model-len: 8192
  ServiceArgs: {resources: {gpu: 8}}
"""


def only(fits: tuple[SectionFit, ...]) -> SectionFit:
    (fit,) = fits
    return fit


def test_a_start_warns_once_and_goes_on(tmp_path: Path) -> None:
    made = prepared(tmp_path, CONFIG, start=True, gpus="8xA100-80GB")
    (notice,) = [n for n in made.notices if "Marlin" in n]
    assert notice.startswith("VllmWorker.quantization modelopt: A100") and notice.endswith("c.yaml:5)")
    assert not only(made.fits).refused


def test_a_start_is_refused_with_file_and_line(tmp_path: Path) -> None:
    text = CONFIG.replace("quantization: modelopt", "block-size: 24").replace("8192", "200000")
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, text, start=True, gpus="8xH100-80GB")
    lines = str(caught.value).splitlines()
    path = tmp_path / "c.yaml"
    assert lines[0] == (
        f"{path}:5: VllmWorker.block-size is 24; vLLM's attention on GPUs expects a multiple of 16, such as 32"
    )
    assert lines[1].startswith(
        f"{path}:7: VllmWorker.max-model-len is 200000, longer than the model's context of 131072"
    )
    assert len(lines) == 2
    # A dry run tells the same, and goes on.
    made = prepared(tmp_path, text, gpus="8xH100-80GB")
    assert only(made.fits).refused and made.refusal is None


def test_overrides_are_named_by_their_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--VllmWorker.max-model-len=9999999: VllmWorker.max-model-len is 9999999"):
        prepared(tmp_path, CONFIG, ("--VllmWorker.max-model-len", "9999999"), start=True, gpus="8xH100-80GB")
    allowed = ("--VllmWorker.ServiceArgs.envs", "{VLLM_ALLOW_LONG_MAX_MODEL_LEN: 1}")
    made = prepared(tmp_path, CONFIG.replace("8192", "140000"), allowed, start=True, gpus="8xH200-141GB")
    assert any("VLLM_ALLOW_LONG_MAX_MODEL_LEN lets it pass" in notice for notice in made.notices)


def test_one_side_channel_port_for_several_workers(tmp_path: Path) -> None:
    flags = (
        ("--VllmWorker.ServiceArgs.workers", "2"),
        ("--VllmWorker.ServiceArgs.envs", "{VLLM_NIXL_SIDE_CHANNEL_PORT: 5600}"),
    )
    with pytest.raises(ConfigError, match="gives VLLM_NIXL_SIDE_CHANNEL_PORT=5600 to each"):
        prepared(tmp_path, CONFIG, *flags, start=True, gpus="16xH100-80GB")


def test_a_model_that_is_not_here_is_a_note(tmp_path: Path) -> None:
    text = CONFIG.replace("nvidia/Llama-3.1-405B-Instruct-FP8", "someone/else")
    fit = only(prepared(tmp_path, text, start=True, gpus="8xH100-80GB").fits)
    assert [(f.level, f.where, f.origin) for f in fit.findings] == [("note", "VllmWorker", None)]
    assert "someone/else is not on this machine" in fit.findings[0].message
    fit = only(prepared(tmp_path, CONFIG.replace("nvidia/Llama-3.1-405B-Instruct-FP8", "./m"), gpus="8xH100-80GB").fits)
    assert [f.level for f in fit.findings] == ["note"]


SEVERAL_NODES = CONFIG.replace("tensor-parallel-size: 8", "tensor-parallel-size: 16\n  nnodes: 2")


def test_an_engine_over_several_nodes_is_fitted_to_the_gpus_of_one(tmp_path: Path) -> None:
    fit = only(prepared(tmp_path, SEVERAL_NODES, gpus="8xH100-80GB").fits)
    assert (fit.num_nodes, fit.gpus, fit.tensor_parallel_size) == (2, 8, 16)
    one = only(prepared(tmp_path, CONFIG, gpus="8xH100-80GB").fits)
    (half,), (whole,) = fit.report.stages, one.report.stages
    assert 0.49 < half.weight_bytes / whole.weight_bytes < 0.52
    text = "\n".join(fit_lines(fit))
    assert "tensor-parallel-size 16, pipeline-parallel-size 1; 8 x H100" in text
    assert "2 nodes run one engine, 8 GPUs on each; it loads when all have come" in text
    assert "one command per node: this one here, `stator serve` of VllmWorker's component with --join" in text
    assert "one command per node" not in "\n".join(fit_lines(one))
    staged = SEVERAL_NODES.replace("size: 16", "size: 8\n  pipeline-parallel-size: 2")
    assert len(only(prepared(tmp_path, staged, gpus="8xH100-80GB").fits).report.stages) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("nnodes: 2", "nnodes: 3"), r"c.yaml:7: VllmWorker: nnodes is 3, and tensor-parallel-size 16 makes 16 GPUs"),
        (
            ("gpu: 8", "gpu: 4"),
            r"c.yaml:6: VllmWorker: tensor-parallel-size 16 over 2 nodes needs 8 GPUs for a process",
        ),
        (("  nnodes: 2\n", ""), r"tensor-parallel-size 16 needs 16 GPUs for a process"),
    ],
)
def test_nodes_that_do_not_divide_the_ranks_are_refused(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(tmp_path, SEVERAL_NODES.replace(*change), gpus="8xH100-80GB")


def test_machines_without_gpus_share_the_weights() -> None:
    settings = EngineSettings(tensor_parallel_size=2, nnodes=2, num_gpu_blocks_override=2, max_model_len=64)
    model = read_shape(json.loads((MODELS / "tiny-llama" / "config.json").read_text()), None)

    def refused(settings: EngineSettings, memory: int) -> list[str]:
        report = evaluate(model, None, settings, Device("CPU", memory, is_cpu=True), vllm_models())
        return [f.message for f in report.findings if f.level == "refuse" and "do not fit into" in f.message]

    one = replace(settings, nnodes=1)
    enough = next(size for size in range(10**6, 10**9, 10**6) if not refused(one, size))
    assert refused(one, enough * 3 // 4) and not refused(settings, enough * 3 // 4)
    assert refused(settings, enough // 3)


def test_other_engines_are_not_asked(tmp_path: Path) -> None:
    text = "Processor: {model: 'stator:tiny-llama'}\nVllmWorker: {model: 'stator:tiny-llama', engine: local}\n"
    assert prepared(tmp_path, text, gpus=None).fits == ()


def test_the_bundled_model_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = (
        "Processor: {model: 'stator:tiny-decilm'}\n"
        "VllmWorker: {model: 'stator:tiny-decilm', block-size: 32, max-model-len: 512, kv-cache-memory-bytes: 16M}\n"
    )
    fit = only(prepared(tmp_path, text, start=True, gpus=None).fits)
    assert fit.report.device == "CPU" and fit.report.weight_source == "files" and fit.findings == []
    # Five of six layers have attention: 2, 1, 2, 1 and 2 KV heads of 64 channels.
    assert fit.report.kv is not None and fit.report.kv.bytes_per_token == 2 * (2 + 1 + 2 + 1 + 2) * 64 * 2
