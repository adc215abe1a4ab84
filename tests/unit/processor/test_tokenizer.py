import json
from pathlib import Path
from typing import Any

import pytest

import stator
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.messages.tokens import unpack
from stator.processor import model_files
from stator.processor.tokenizer import ModelTokenizer
from stator.processor.validation import SamplingDefaults

from . import tokenizers_for_tests as fixtures

BUNDLED = Path(stator.__file__).parent / "models" / "tiny-llama"


def write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    fixtures.byte_level().save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path / "tokenizer_config.json",
        {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "pad_token": None, "chat_template": "in config"},
    )
    return tmp_path


def test_the_bundled_model() -> None:
    tokenizer = ModelTokenizer.load(BUNDLED)
    assert tokenizer.special_tokens["bos_token"] == "<|begin_of_text|>"
    assert tokenizer.eos_ids == {1, 3}
    text = "In the beginning 🙂"
    with_bos = unpack(tokenizer.encode(text, add_special_tokens=True))
    assert with_bos == [0, *unpack(tokenizer.encode(text, add_special_tokens=False))]
    assert tokenizer.decode(with_bos) == text
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.push([each]) for each in with_bos) + detokenizer.flush() == text
    assert model_files.context_length(BUNDLED) == 2048


def test_what_is_read_from_a_directory(model_dir: Path) -> None:
    tokenizer = ModelTokenizer.load(model_dir)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert tokenizer.eos_ids == {3}
    assert tokenizer.chat_template == ("in config", str(model_dir / "tokenizer_config.json"))
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.num_ids == fixtures.byte_level().get_vocab_size()


def test_a_template_file_wins_over_the_config(model_dir: Path) -> None:
    write(model_dir / "chat_template.jinja", "in its own file")
    assert model_files.read_chat_template(model_dir) == ("in its own file", model_dir / "chat_template.jinja")


def test_of_several_templates_the_default_is_taken(model_dir: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(model_dir / "tokenizer_config.json", {"chat_template": named})
    template = model_files.read_chat_template(model_dir)
    assert template is not None and template[0] == "d"


def test_a_base_model_has_no_template(model_dir: Path) -> None:
    write(model_dir / "tokenizer_config.json", {})
    assert ModelTokenizer.load(model_dir).chat_template is None


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({"eos_token_id": [1, 3]}, {"eos_token_id": 2}, (1, 3)), ({}, {"eos_token_id": 2}, (2,)), ({}, {}, ())],
)
def test_where_eos_comes_from(model_dir: Path, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    write(model_dir / "generation_config.json", generation)
    write(model_dir / "config.json", config)
    assert model_files.read_eos_ids(model_dir) == expected


def test_settings_of_the_training_run_do_not_cut_or_fill_prompts() -> None:
    raw = fixtures.byte_level()
    copy = type(raw).from_str(raw.to_str())
    copy.enable_truncation(2)
    copy.enable_padding(length=50)
    ids = unpack(ModelTokenizer(copy, special_tokens={}).encode("In the beginning", add_special_tokens=False))
    assert ids == raw.encode("In the beginning").ids


def test_a_lone_surrogate_is_the_callers_error(model_dir: Path) -> None:
    with pytest.raises(StatorError) as caught:
        ModelTokenizer.load(model_dir).encode("a\ud800", add_special_tokens=False)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_clear_errors_for_what_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        ModelTokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        ModelTokenizer.load(tmp_path)
    write(tmp_path / "tokenizer.json", "{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        ModelTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object, found list"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id: expected an integer"),
    ],
)
def test_broken_files_are_named(model_dir: Path, name: str, content: Any, message: str) -> None:
    write(model_dir / name, content)
    with pytest.raises(ConfigError, match=f"{name}.*{message}"):
        ModelTokenizer.load(model_dir)


def test_a_model_that_does_not_say_its_context(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings.*set max-model-len"):
        model_files.context_length(model_dir)


def test_sampling_defaults(model_dir: Path) -> None:
    assert SamplingDefaults.load(model_dir) == SamplingDefaults()
    path = model_dir / "generation_config.json"
    write(path, {"temperature": 0.6, "top_p": 0.9, "top_k": -1, "max_length": 20})
    assert SamplingDefaults.load(model_dir) == SamplingDefaults(temperature=0.6, top_p=0.9, top_k=0)
    write(path, {"top_p": 1.5})
    with pytest.raises(ConfigError, match="top_p: expected a number above 0 and at most 1, found 1.5"):
        SamplingDefaults.load(model_dir)
