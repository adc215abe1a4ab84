from pathlib import Path
from typing import Any

import msgspec
import pytest

from stator.config.decode import Errors
from stator.config.load import Section, decode_section, load_configuration
from stator.config.schema import (
    SECTIONS,
    FrontendConfig,
    PrefillWorkerConfig,
    ProcessorConfig,
    RouterConfig,
    VllmWorkerConfig,
)
from stator.errors import ConfigError

# As the multi-node tutorials of the field write it.
TUTORIAL = """
Common:
  model: some/model
  block-size: 128
  max-model-len: 4096
  kv-transfer-config: '{"kv_connector":"DynamoNixlConnector"}'

Frontend:
  served_model_name: big
  endpoint: dynamo.Processor.chat/completions
  port: 8001

Processor:
  router: kv
  common-configs: [model, block-size, max-model-len]

Router:
  min-workers: 2
  common-configs: [model, block-size]

VllmWorker:
  remote-prefill: true
  conditional-disagg: "true"
  max-local-prefill-length: "10"
  max-prefill-queue-size: 2
  tensor-parallel-size: 8
  enable-prefix-caching: true
  router: kv
  ServiceArgs:
    workers: 1
    resources:
      gpu: '8'
  common-configs: [model, block-size, max-model-len, kv-transfer-config]

PrefillWorker:
  max-num-batched-tokens: 16384
  ServiceArgs:
    workers: 1
    envs:
      - {name: A, value: 1}
  common-configs: [model, kv-transfer-config]

Planner:
  environment: local
"""


def load(
    tmp_path: Path, text: str, *overrides: tuple[str, str], service: str, config: type[Any] | None = None
) -> tuple[Section, list[str]]:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    configuration = load_configuration(path, overrides, [service], shown_as="c.yaml")
    errors, notices = Errors(), list(configuration.notices)
    section = decode_section(service, config, configuration, errors, notices)
    if errors.messages:
        raise ConfigError("\n".join(errors.messages))
    assert section is not None
    return section, notices


def fails(tmp_path: Path, text: str, *overrides: tuple[str, str], service: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides, service=service)
    return str(caught.value)


def test_a_tutorials_file_works_as_it_stands(tmp_path: Path) -> None:
    section, notices = load(tmp_path, TUTORIAL, service="VllmWorker")
    config = section.config
    assert isinstance(config, VllmWorkerConfig)
    assert (config.model, config.engine, config.served_model_name) == ("some/model", "vllm", "big")
    assert (config.remote_prefill, config.conditional_disagg) == (True, True)
    assert (config.max_local_prefill_length, config.max_prefill_queue_size) == (10, 2)
    assert config.kv_transfer_config == {"kv_connector": "NixlConnector"}
    assert config.engine_args == {
        "tensor_parallel_size": 8,
        "enable_prefix_caching": True,
        "block_size": 128,
        "max_model_len": 4096,
    }
    assert config.engine_arg_origins["tensor_parallel_size"] == "c.yaml:26"
    assert config.engine_arg_origins["block_size"] == "c.yaml:4"
    assert section.args.resources.gpu == 8
    assert notices == ["kv-transfer-config: DynamoNixlConnector is an older name; using NixlConnector"]
    assert config.engine_values()["model"] == "some/model"

    section, _ = load(tmp_path, TUTORIAL, service="PrefillWorker")
    assert isinstance(section.config, PrefillWorkerConfig)
    assert section.config.engine_args == {"max_num_batched_tokens": 16384}
    assert section.args.envs == {"A": "1"}

    section, notices = load(tmp_path, TUTORIAL, service="Frontend")
    assert section.config == FrontendConfig(
        served_model_name="big", port=8001, endpoint="dynamo.Processor.chat/completions"
    )
    assert len(notices) == 1 and "c.yaml:10" in notices[0]

    section, notices = load(tmp_path, TUTORIAL, service="Processor")
    assert section.config == ProcessorConfig(
        model="some/model", served_model_name="big", block_size=128, max_model_len=4096, router="kv"
    )
    assert notices == []

    section, _ = load(tmp_path, TUTORIAL, service="Router")
    assert section.config == RouterConfig(model="some/model", block_size=128, min_workers=2, mode="kv")


def test_order_of_sources(tmp_path: Path) -> None:
    section, _ = load(tmp_path, "Frontend: {port: 1}", ("--Frontend.port", "2"), service="Frontend")
    assert section.config.port == 2
    section, _ = load(tmp_path, "Frontend: {port: 1}", service="Frontend")
    assert section.config.port == 1
    section, _ = load(tmp_path, "Frontend:\n", service="Frontend")
    assert section.config.port == 8000
    text = "Common: {model: a}\nProcessor: {common-configs: [model]}"
    section, _ = load(tmp_path, text, ("--Common.model", "b"), service="Processor")
    assert section.config.model == "b"
    section, _ = load(tmp_path, text, ("--Common.model", "b"), ("--Processor.model", "c"), service="Processor")
    assert section.config.model == "c"


def test_text_stays_as_it_was_written(tmp_path: Path) -> None:
    section, _ = load(tmp_path, "Frontend: {served_model_name: 1.10}", service="Frontend")
    assert section.config.served_model_name == "1.10"


def test_every_error_names_its_place_what_was_found_and_what_was_expected(tmp_path: Path) -> None:
    text = "Processor:\n  model: m\n  blok-size: 1\n  migration-limit: -1\n  router: kw\n  max-model-len: true\n"
    assert fails(tmp_path, text, service="Processor").splitlines() == [
        "c.yaml:3: Processor.blok-size: unknown key (did you mean block-size?); known: model, revision, "
        "served-model-name, block-size, max-model-len, migration-limit, migration-wait-s, tool-call-parser, "
        "reasoning-parser, router, trust-remote-code, max-queued-requests, max-queued-tokens, max-queue-wait",
        "c.yaml:4: Processor.migration-limit: found -1, expected a whole number, at least 0",
        'c.yaml:5: Processor.router: found "kw", expected one of kv, round-robin, random, least-loaded',
        "c.yaml:6: Processor.max-model-len: found true, expected a whole number, at least 2",
    ]


@pytest.mark.parametrize(
    ("text", "flags", "service", "message"),
    [
        ("Processor: {}", [], "Processor", "c.yaml:1: Processor.model is required; expected text"),
        ("", [], "VllmWorker", "c.yaml: VllmWorker.model is required"),
        ("Frontend: 5", [], "Frontend", "c.yaml:1: Frontend: found 5, expected a section"),
        ("", [("--Frontend.port", "x")], "Frontend", '--Frontend.port=x: Frontend.port: found "x", expected a whole'),
        ("", [("--Fronted.port", "1")], "Frontend", "there is no service Fronted (did you mean Frontend?)"),
        ("Common: {modell: a}\nRouter: {common-configs: [model]}", [], "Router", "Common has no 'model' (did you mean"),
        ("VllmWorker: {model: m, kv-transfer-config: '{'}", [], "VllmWorker", "expected a JSON object"),
        (
            "Router: {ServiceArgs: {worker: 1}}",
            [],
            "Router",
            "Router.ServiceArgs.worker: unknown key (did you mean ",
        ),
        ("Router: {ServiceArgs: {resources: {gpus: 1}}}", [], "Router", "ServiceArgs.resources.gpus: unknown key"),
        ("Router: {ServiceArgs: 3}", [], "Router", "Router.ServiceArgs: found 3, expected a mapping"),
    ],
)
def test_wrong_configuration(
    tmp_path: Path, text: str, flags: list[tuple[str, str]], service: str, message: str
) -> None:
    assert message in fails(tmp_path, text, *flags, service=service)


def test_a_section_nobody_uses_is_ignored_and_a_likely_slip_is_told(tmp_path: Path) -> None:
    _, notices = load(tmp_path, "Planner: {x: 1}\nFrontent: {port: 1}", service="Frontend")
    assert notices == ["c.yaml:2: no service is named Frontent (did you mean Frontend?); the section is ignored"]


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: the configuration file cannot be read: No such file"):
        load_configuration(Path("nowhere.yaml"), [], [])


class Inner(msgspec.Struct, frozen=True):
    some_name: int = 1


class Own(msgspec.Struct, frozen=True):
    inner: Inner = Inner()
    tags: list[str] = []


def test_a_services_own_options(tmp_path: Path) -> None:
    text = "Mine: {inner: {some-name: '5'}, tags: [a], ServiceArgs: {envs: {A: true, B: 010}}}"
    section, _ = load(tmp_path, text, service="Mine", config=Own)
    assert section.config == Own(Inner(5), ["a"])
    assert section.args.envs == {"A": "true", "B": "010"}
    section, _ = load(tmp_path, "Mine: {a-b: {c-d: 1}}", service="Mine")
    assert section.config == {"a_b": {"c-d": 1}}


def test_an_engines_error_names_the_place(tmp_path: Path) -> None:
    section, _ = load(tmp_path, "VllmWorker:\n  model: m\n  max-num-seqs: -1\n", service="VllmWorker")
    with (
        pytest.raises(ConfigError, match=r"^c\.yaml:3: max-num-seqs is -1; it must be above 0$"),
        section.config.located(),
    ):
        raise ConfigError("max-num-seqs is -1; it must be above 0")


def test_every_option_has_a_help() -> None:
    for struct in SECTIONS.values():
        for field in msgspec.structs.fields(struct):
            if not field.name.startswith("engine_arg"):
                assert "description=" in repr(field.type), f"{struct.__name__}.{field.name}"
