from pathlib import Path

import pytest

from stator.config.models import BUNDLED_MODELS, hub_id, resolve_model
from stator.errors import ConfigError


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_bundled_models_are_there(name: str) -> None:
    path = resolve_model(f"stator:{name}")
    assert (path / "config.json").is_file() and (path / "tokenizer.json").is_file()


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("stator:tiny-lama", "no bundled model 'tiny-lama'; did you mean stator:tiny-llama?"),
        ("models/of/mine", "there is no directory .*; give the directory of a downloaded model .*org/name"),
        ("{tmp}", "has no config.json"),
    ],
)
def test_what_is_not_a_model(value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(value.replace("{tmp}", str(tmp_path)))


@pytest.mark.parametrize(
    ("value", "is_id"),
    [
        ("meta-llama/Llama-3.1-8B", True),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", True),
        ("stator:tiny-llama", False),
        ("./meta-llama/Llama-3.1-8B", False),
        ("~/Llama", False),
        ("/models/llama", False),
        ("llama", False),
        ("a/b/c", False),
        ("meta-llama/", False),
        ("org/name?x", False),
    ],
)
def test_ids_of_the_hub(value: str, is_id: bool) -> None:
    assert hub_id(value) == (value if is_id else None)


def test_a_directory_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("acme/tiny") is None
