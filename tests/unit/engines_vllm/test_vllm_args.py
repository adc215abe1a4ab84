"""From a worker's section to vLLM's command line, sampling parameters and load."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from stator.engines.vllm.args import command_line, cpu_flags, set_environment, settings_from_section
from stator.engines.vllm.load import LoadCounter
from stator.engines.vllm.sampling import prefill_arguments, sampling_arguments
from stator.errors import ConfigError
from stator.testing.contracts.engine_suite import make_request


def _flags(section: dict[str, Any], **added: Any) -> list[str]:
    settings = settings_from_section({"model": "some/model", **section})
    return command_line(settings, model="some/model", kv_transfer={"kv_connector": "X"}, **added)


def test_every_key_is_a_flag_of_vllms() -> None:
    found = _flags(
        {
            "tensor-parallel-size": 8,
            "enable_prefix_caching": True,
            "enforce-eager": False,
            "hf-overrides": {"a": 1},
            "allowed_local_media_path": "",
            "quantization": None,
            "served_model_name": ["named", "other"],
        },
        worker_extension_cls=None,
        revision="abc",
    )
    assert found[:5] == ["--model", "some/model", "--served-model-name", "named", "--disable-log-stats"]
    assert found[5:7] == ["--kv-transfer-config", json.dumps({"kv_connector": "X"})]
    assert found[7:] == [
        *("--tensor-parallel-size", "8", "--enable-prefix-caching", "--no-enforce-eager"),
        *("--hf-overrides", '{"a": 1}', "--allowed-local-media-path", "", "--revision", "abc"),
    ]


def test_flags_that_stator_sets_are_refused_by_name() -> None:
    for key in ("kv-events-config", "disable-log-stats"):
        with pytest.raises(ConfigError, match=f"{key} cannot be set"):
            settings_from_section({"model": "m", key: {"a": 1}})
    with pytest.raises(ConfigError, match="needs a model"):
        settings_from_section({})


def test_what_the_engine_is_asked_about_its_settings() -> None:
    section = {"model": "m", "tensor-parallel-size": "2", "pipeline_parallel_size": 3, "data-parallel-size": 4}
    settings = settings_from_section({**section, "enable-prefix-caching": False, "lora_modules": {"a": "/a"}})
    assert (settings.num_workers, settings.dp_ranks, settings.prefix_caching) == (6, 4, False)
    assert (settings.name, settings.lora_modules) == ("m", {"a": "/a"})
    assert settings_from_section({"model": "m"}).prefix_caching


def test_cpu_defaults_do_not_overrule_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING", "X"):
        monkeypatch.delenv(key, raising=False)
    assert cpu_flags(settings_from_section({"model": "m"})) == {"kv_cache_memory_bytes": 1 << 30}
    assert cpu_flags(settings_from_section({"model": "m", "num-gpu-blocks-override": 9})) == {}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert cpu_flags(settings_from_section({"model": "m"})) == {}
    environment: dict[str, str] = {"VLLM_CPU_OMP_THREADS_BIND": "0-3"}
    monkeypatch.setattr("stator.engines.vllm.args.os.environ", environment)
    set_environment({"X": "1"}, gpu=False, num_workers=1)
    assert environment == {"VLLM_CPU_OMP_THREADS_BIND": "0-3", "X": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment.clear()
    set_environment({}, gpu=False, num_workers=2)
    assert environment == {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment.clear()
    set_environment({}, gpu=True, num_workers=1)
    assert environment == {}


def test_resumed_output_counts_as_output() -> None:
    request = make_request("r", [1, 2], [3, 4, 5], max_tokens=10, min_tokens=4, seed=7, stop_token_ids=(9,))
    found = sampling_arguments(request)
    assert (found["max_tokens"], found["min_tokens"], found["seed"], found["stop_token_ids"]) == (7, 1, 7, [9])
    assert found["detokenize"] is False
    assert sampling_arguments(make_request("r", [1], [2, 3], min_tokens=1))["min_tokens"] == 0


def test_a_seed_that_nobody_asked_for_is_passed_over() -> None:
    assert sampling_arguments(make_request("r", [1], temperature=1.0, seed=7, seed_drawn=True))["seed"] is None


def test_a_prefill_makes_one_token_and_carries_the_transfer() -> None:
    found = prefill_arguments({"do_remote_decode": True})
    assert (found["max_tokens"], found["temperature"]) == (1, 0.0)
    assert found["extra_args"] == {"kv_transfer_params": {"do_remote_decode": True}}


def _scheduler(running: int, waiting: int, usage: float, counts: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_skipped_waiting_reqs=1,
        kv_cache_usage=usage,
        kv_connector_stats=counts,
    )


def _iteration(total: int, cached: int, external: int, generated: int) -> Any:
    prompt = SimpleNamespace(
        total=total, local_cache_hit=cached, external_kv_transfer=external, computed=total - cached - external
    )
    return SimpleNamespace(prompt_token_stats=prompt, num_generation_tokens=generated, num_preempted_reqs=1)


def test_load_is_the_sum_of_the_ranks_and_counters_grow() -> None:
    counter = LoadCounter(100)
    counter.record(_scheduler(2, 3, 0.5, {"num_blocks_held": 7}), _iteration(10, 4, 3, 2), 0)
    counter.record(_scheduler(1, 0, 0.25), None, 1)
    counter.record(None, _iteration(5, 0, 0, 1), 0)
    load = counter.load(10)
    assert (load.num_running, load.num_waiting, load.num_blocks, load.num_blocks_used) == (3, 7, 200, 75)
    assert (load.num_blocks_held, load.num_fetching) == (7, 2)
    # All but one were aborted; vLLM, idle, has not said so. Without any, nothing runs.
    assert (counter.load(1).num_running, counter.load(1).num_waiting) == (1, 0)
    assert (counter.load(0).num_running, counter.load(0).num_waiting, counter.load(0).num_fetching) == (0, 0, 0)
    assert (load.prompt_tokens_total, load.prompt_tokens_cached_total) == (15, 4)
    assert (load.prompt_tokens_computed_total, load.prompt_tokens_transferred_total) == (8, 3)
    assert (load.generation_tokens_total, load.preemptions_total, load.steps_total) == (3, 2, 3)


def test_a_connector_counts_only_when_something_changed() -> None:
    counter = LoadCounter(100)
    counter.record(_scheduler(0, 0, 0.1, {"num_blocks_held": 10}), None, 0)
    counter.record(_scheduler(1, 0, 0.2), None, 0)
    assert counter.load(1).num_blocks_held == 10
    counter.record(_scheduler(0, 0, 0.0, {"num_blocks_held": 0}), None, 0)
    assert counter.load(0).num_blocks_held == 0


def test_without_a_count_what_nobody_runs_on_is_held() -> None:
    counter = LoadCounter(100)
    idle = _scheduler(0, 0, 0.1)
    idle.num_skipped_waiting_reqs = 0
    counter.record(idle, None, 0)
    assert counter.load(0).num_blocks_held == 10
    counter.record(_scheduler(1, 0, 0.1), None, 0)
    assert counter.load(1).num_blocks_held == 0
