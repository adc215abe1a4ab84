"""Sizes of well-known models, and what vLLM would refuse."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.fit import evaluate
from stator.core.fit_memory import kv_bytes_per_token, pipeline_stages
from stator.core.fit_types import Device, EngineFacts, EngineSettings, FitReport
from stator.core.model_shape import ModelShape, UnknownShape, read_quantization, read_shape

GIB = 1024**3
H100 = Device("H100", int(79.14 * GIB), (9, 0))
A100 = Device("A100", int(79.14 * GIB), (8, 0))
A100_40 = Device("A100", int(39.38 * GIB), (8, 0))
T4 = Device("T4", int(14.56 * GIB), (7, 5))
CPU = Device("CPU", 24 * GIB, is_cpu=True)
FACTS = EngineFacts(
    "0.32.0",
    {"text": frozenset({"LlamaForCausalLM", "DeciLMForCausalLM", "Zamba2ForCausalLM", "DeepseekV3ForCausalLM"}),
     "pooling": frozenset({"BertModel"})},
    no_pipeline=frozenset({"Zamba2ForCausalLM"}),
    dropped={"MotifForCausalLM": "0.10.2"},
    quantization={"modelopt": 80, "modelopt_fp4": 75, "fp8": 75, "awq": 75, "gptq": 60, "fp_quant": 100},
    connectors=frozenset({"NixlConnector"}),
)  # fmt: skip
FP8 = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}


def llama(hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int = 128256, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False, **more,
    }  # fmt: skip


L8B = llama(4096, 32, 32, 8, 14336)
L70B = llama(8192, 80, 64, 8, 28672)
L405B = llama(16384, 126, 128, 8, 53248)


def shape(config: dict[str, Any], quantization: dict[str, Any] | None = None) -> ModelShape:
    return read_shape(config, quantization)


def fit(
    config: dict[str, Any],
    device: Device = H100,
    checkpoint: dict[str, Any] | None = None,
    file_bytes: int | None = None,
    **settings: Any,
) -> FitReport:
    return evaluate(shape(config, checkpoint), file_bytes, EngineSettings(**settings), device, FACTS)


def levels(report: FitReport) -> dict[str | None, str]:
    return {finding.option: finding.level for finding in report.findings}


def refusals(report: FitReport) -> list[tuple[str | None, str]]:
    return [(finding.option, finding.message) for finding in report.findings if finding.level == "refuse"]


# Parameters: as published with the models' safetensors on huggingface.co.
@pytest.mark.parametrize(
    ("config", "parameters", "kv_bytes"),
    [(L8B, 8_030_261_248, 131072), (L70B, 70_553_706_496, 327680), (L405B, 405_853_388_800, 516096)],
)
def test_parameters_and_kv_cache_of_known_models(config: dict[str, Any], parameters: int, kv_bytes: int) -> None:
    model = shape(config)
    assert model.parameters == parameters
    assert kv_bytes_per_token(model, 1, "bfloat16") == kv_bytes
    assert kv_bytes_per_token(model, 8, "bfloat16") == kv_bytes // 8
    assert kv_bytes_per_token(model, 8, "fp8") == kv_bytes // 16
    # Fewer heads than ranks: each rank has one.
    assert kv_bytes_per_token(model, 16, "bfloat16") == kv_bytes // 8


def test_405b_in_fp8_fits_eight_h100_and_in_16_bit_does_not() -> None:
    settings = EngineSettings(
        tensor_parallel_size=8, max_model_len=8192, quantization="modelopt", gpu_memory_utilization=0.95
    )
    report = evaluate(shape(L405B, FP8), None, settings, H100, FACTS)
    assert report.findings == ()
    assert report.weight_bytes is not None and 409e9 < report.weight_bytes < 411e9
    assert report.kv is not None and report.kv.bytes_per_token == 516096 and 40 < report.kv.requests < 60
    (option, message), *others = refusals(fit(L405B, tensor_parallel_size=8, max_model_len=8192))
    assert option == "model" and "101.5 GB on each GPU" in message and others == []


def test_weight_only_fp8_on_a100_warns_and_on_a_t4_is_refused() -> None:
    report = fit(L405B, A100, FP8, tensor_parallel_size=8, max_model_len=8192)
    assert [(f.level, f.option) for f in report.findings] == [("warn", "model")]
    assert "multiplies in 16 bit" in report.findings[0].message and "8.9" in report.findings[0].message
    assert ("model", "modelopt needs compute capability 8.0, and T4 has 7.5") in refusals(fit(L8B, T4, FP8))


def test_nvfp4_runs_weight_only_before_blackwell() -> None:
    fp4 = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    report = fit(L70B, checkpoint=fp4, tensor_parallel_size=2, max_model_len=4096)
    assert [(f.level, f.option) for f in report.findings if f.level != "note"] == [("warn", "model")]
    assert "10.0 (Blackwell)" in report.findings[0].message
    assert report.weight_bytes is not None and 42e9 < report.weight_bytes < 44e9
    b200 = dataclasses.replace(H100, name="B200", capability=(10, 0))
    assert not fit(L70B, b200, fp4, tensor_parallel_size=2, max_model_len=4096).findings


def nas(blocks: list[tuple[int | None, float | None]], **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["DeciLMForCausalLM"], "hidden_size": 8192, "num_hidden_layers": len(blocks),
        "num_attention_heads": 64, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        "block_configs": [
            {"attention": {"no_op": group is None, "n_heads_in_group": group},
             "ffn": {"no_op": mult is None, "ffn_mult": mult}}
            for group, mult in blocks
        ],
        **more,
    }  # fmt: skip


def test_nemotron_nas_layers_differ() -> None:
    model = shape(nas([(8, 5.25), (None, 0.5), (16, None), (None, None)]))
    assert [layer.num_kv_heads for layer in model.layers] == [8, 0, 4, 0]
    assert [layer.widths for layer in model.layers] == [(28672,), (2816,), (), ()]
    assert kv_bytes_per_token(model, 1, "bfloat16") == 2 * (8 + 4) * 128 * 2
    assert kv_bytes_per_token(model, 8, "bfloat16") == 2 * (1 + 1) * 128 * 2
    # A stage without attention needs no cache; the other decides.
    report = fit(nas([(8, 5.25), (None, 0.5)]), pipeline_parallel_size=2, max_model_len=4096)
    assert [stage.kv_bytes_per_token for stage in report.stages] == [4096, 0]
    assert report.kv is not None and report.kv.blocks > 0


def test_nemotron_nas_refusals_name_the_layer() -> None:
    # The first layer's 8 KV heads can be dealt out to 8 ranks, the second's 12 cannot, nor be copied evenly.
    config = {**nas([(12, 5.25), (8, 5.25)]), "num_attention_heads": 96}
    ((option, message),) = refusals(fit(config, tensor_parallel_size=8, max_model_len=1024))
    assert option == "tensor_parallel_size" and "layer 1 has 12 KV heads" in message
    linear = nas([(8, 5.25)])
    linear["block_configs"][0]["attention"]["replace_with_linear"] = True
    assert refusals(fit(linear))[0][0] == "model" and "replace_with_linear" in refusals(fit(linear))[0][1]


def test_mla_and_states_of_other_kinds_are_not_guessed() -> None:
    mla = llama(7168, 61, 128, 128, 18432, kv_lora_rank=512, architectures=["DeepseekV3ForCausalLM"])
    report = fit(mla, file_bytes=200 * 10**9, tensor_parallel_size=8)
    assert report.kv is None and not report.refused
    assert [f.message for f in report.findings if "not estimated" in f.message]
    assert report.stages[0].weight_bytes == 25 * 10**9
    hybrid = llama(4096, 4, 32, 8, 14336, layer_types=["linear_attention", "full_attention"] * 2)
    assert fit(hybrid, file_bytes=10**9).kv is None
    # Neither files nor a count: nothing is claimed.
    unknown = fit(llama(4096, 32, 32, 8, 14336, architectures=["NewForCausalLM"]))
    assert unknown.weight_bytes is None and unknown.kv is None and not unknown.refused
    assert levels(unknown)["model"] in ("warn", "note")


@pytest.mark.parametrize(
    ("settings", "option", "words"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size", "does not divide the model's 32 attention heads"),
        ({"pipeline_parallel_size": 40}, "pipeline_parallel_size", "only 32 layers"),
        ({"block_size": 24}, "block_size", "multiple of 16"),
        ({"max_model_len": 200_000}, "max_model_len", "context of 131072"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 16}, "max_num_batched_tokens", "less than max-num-seqs 16"),
        ({"max_num_batched_tokens": 512, "enable_chunked_prefill": False, "max_model_len": 1024},
         "max_num_batched_tokens", "at least 1024"),
        ({"quantization": "modelopt"}, "quantization", "checkpoint is not quantized"),
        ({"quantization": "bitsandbytes"}, "quantization", "no quantization bitsandbytes"),
        ({"connector": {"kv_connector": "NixlConnector", "kv_role": "both"}}, "kv_transfer_config", "kv_both"),
        ({"num_gpu_blocks_override": 10, "max_model_len": 1024}, "num_gpu_blocks_override", "needs 64"),
        ({"kv_cache_memory_bytes": 80 * 10**9}, "kv_cache_memory_bytes", "are left"),
        ({"gpu_memory_utilization": 0.1}, "gpu_memory_utilization", "more than the 8.5 GB"),
        ({"gpu_memory_utilization": 0.2}, "model", "has a context of 131072"),
        ({"dtype": "int8"}, "dtype", "expected one of auto"),
    ],
)  # fmt: skip
def test_refusals(settings: dict[str, Any], option: str, words: str) -> None:
    found = refusals(fit(L8B, **settings))
    assert [o for o, _ in found] == [option] and words in found[0][1], found


def test_what_runs_is_not_refused() -> None:
    assert fit(L8B).findings == ()
    assert refusals(fit(L8B, max_model_len=200_000, allow_long=True)) == []
    assert levels(fit(L8B, tensor_parallel_size=16, max_model_len=4096)) == {"tensor_parallel_size": "note"}
    # A cache that fits only if activations took nothing may fit: that warns.
    tight = fit(L8B, gpu_memory_utilization=0.24, max_model_len=20_000)
    assert levels(tight) == {"max_model_len": "warn"}
    assert levels(fit(L8B, max_num_seqs=64)) == {"max_num_seqs": "note"}


def test_old_gpus() -> None:
    assert ("dtype", "is bfloat16, which needs 8.0, and T4 has compute capability 7.5; expected float16") in refusals(
        fit(L8B, T4, dtype="bfloat16", tensor_parallel_size=4, max_model_len=1024)
    )
    report = fit(L8B, T4, tensor_parallel_size=4, max_model_len=1024)
    assert levels(report) == {"model": "warn"} and not report.refused
    assert report.kv is not None and report.kv.dtype == "float16"
    assert levels(fit(L8B, A100, kv_cache_dtype="fp8"))["kv_cache_dtype"] == "warn"
    assert (
        levels(fit(L8B, T4, kv_cache_dtype="fp8", tensor_parallel_size=4, max_model_len=1024))["kv_cache_dtype"]
        == "refuse"
    )


def test_on_a_cpu() -> None:
    small = llama(256, 4, 4, 2, 688, vocab=8192)
    connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    report = fit(small, CPU, block_size=16, kv_cache_memory_bytes=2**26, max_model_len=2048, connector=connector)
    assert levels(report) == {"block_size": "refuse", "kv_transfer_config": "note"}
    report = fit(small, CPU, kv_cache_memory_bytes=2**26, max_model_len=2048)
    assert report.findings == () and report.kv is not None and report.kv.block_size == 128
    assert report.kv.blocks == 2**26 // (128 * 4 * 2 * 2 * 64 * 2)
    assert levels(fit(small, CPU)) == {"kv_cache_memory_bytes": "warn"}
    assert refusals(fit(L70B, CPU, kv_cache_memory_bytes=2**30, max_model_len=2048))[0][0] == "model"


def test_groups_must_stay_whole_under_tensor_parallelism() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    config = llama(1024, 2, 8, 8, 1408, quantization_config=gptq)
    ((option, message),) = refusals(fit(config, tensor_parallel_size=2, max_model_len=1024))
    assert option == "tensor_parallel_size" and "704 channels" in message and "groups of 128" in message
    assert refusals(fit(config, max_model_len=1024)) == []


def test_files_say_what_a_quantized_weight_takes() -> None:
    # A method that is not known here, with 4.5 bits a weight.
    model = shape({**L8B, "quantization_config": {"quant_method": "quark"}})
    linear = sum(layer.linear + layer.kv_weights * layer.num_kv_heads for layer in model.layers)
    plain = (model.parameters or 0) - linear
    file_bytes = round(linear * 4.5 / 8 + plain * 2)
    facts = dataclasses.replace(FACTS, quantization={"quark": 70})
    report = evaluate(model, file_bytes, EngineSettings(), H100, facts)
    assert report.weight_bytes == pytest.approx(file_bytes, rel=1e-3) and report.weight_source == "files"
    assert evaluate(model, None, EngineSettings(), H100, facts).weight_bytes is None


@pytest.mark.parametrize(
    ("data", "method", "size"),
    [
        (FP8, "modelopt", 1.0),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "modelopt_fp4", 0.5625),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq", 0.5 + 2.5 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq", 1.0),
        ({"quant_method": "compressed_tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}},
         "compressed-tensors", 1.0),
        ({"quant_method": "quark"}, "quark", None),
    ],
)  # fmt: skip
def test_quantizations(data: dict[str, Any], method: str, size: float | None) -> None:
    found = read_quantization(data)
    assert found is not None and (found.method, found.bytes_per_weight) == (method, size)


def test_a_checkpoint_may_ask_for_an_fp8_cache() -> None:
    quantization = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    }
    report = fit(L70B, checkpoint=quantization, tensor_parallel_size=8, max_model_len=4096)
    assert report.kv is not None and (report.kv.dtype, report.kv.bytes_per_token) == ("fp8_e4m3", 327680 // 2)
    plain = fit(L70B, checkpoint=quantization, tensor_parallel_size=8, max_model_len=4096, kv_cache_dtype="bfloat16")
    assert plain.kv is not None and plain.kv.bytes_per_token == 327680


def test_a_config_without_sizes_is_said() -> None:
    with pytest.raises(UnknownShape, match="num_attention_heads"):
        read_shape({"architectures": ["LlamaForCausalLM"]})


def test_pipeline_stages_as_vllm_makes_them() -> None:
    assert pipeline_stages(126, 4) == [(0, 31), (31, 63), (63, 95), (95, 126)]
    assert pipeline_stages(80, 3) == [(0, 27), (27, 54), (54, 80)]
    assert pipeline_stages(7, 2) == [(0, 4), (4, 7)]


@given(st.integers(1, 200), st.integers(1, 16))
def test_stages_cover_the_layers_evenly(layers: int, size: int) -> None:
    stages = pipeline_stages(layers, size)
    assert [start for start, _ in stages[1:]] == [end for _, end in stages[:-1]]
    assert stages[0][0] == 0 and stages[-1][1] == layers
    counts = [end - start for start, end in stages]
    assert max(counts) - min(counts) <= 1


sizes = st.sampled_from([1, 2, 4, 8])


@given(sizes, st.sampled_from([1, 2, 4]), st.integers(24, 400), st.integers(1024, 100_000), st.sampled_from([16, 64]))
def test_more_memory_and_shorter_requests_never_hurt(tp: int, pp: int, gib: int, length: int, block: int) -> None:
    def made(memory: int, max_len: int, util: float = 0.9) -> FitReport:
        return fit(
            L70B, Device("GPU", memory * GIB, (9, 0)), tensor_parallel_size=tp, pipeline_parallel_size=pp,
            max_model_len=max_len, block_size=block, gpu_memory_utilization=util, max_num_batched_tokens=8192,
            max_num_seqs=256,
        )  # fmt: skip

    report = made(gib, length)
    assert report.kv is not None and report.kv.tokens == report.kv.blocks * block
    for better in (made(gib + 8, length), made(gib, length, 0.95), made(gib, length // 2)):
        assert better.kv is not None and better.kv.blocks >= report.kv.blocks
        assert better.kv.requests >= report.kv.requests
        assert not (better.refused and not report.refused)


@given(sizes, sizes, st.sampled_from([1, 2, 3]))
def test_gpus_share_the_weights(tp: int, more: int, pp: int) -> None:
    few = fit(L70B, tensor_parallel_size=tp, pipeline_parallel_size=pp, max_model_len=1024)
    many = fit(L70B, tensor_parallel_size=tp * more, pipeline_parallel_size=pp, max_model_len=1024)
    assert few.weight_bytes == many.weight_bytes
    total = sum(stage.weight_bytes for stage in few.stages) * tp
    assert few.weight_bytes is not None and few.weight_bytes <= total <= few.weight_bytes * 1.01
    for a, b in zip(few.stages, many.stages, strict=True):
        assert b.weight_bytes <= a.weight_bytes and b.kv_bytes_per_token <= a.kv_bytes_per_token
