from pathlib import Path

import pytest

from stator.config.models import BUNDLED_MODELS, resolve_model
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
        ("meta-llama/Llama-3.1-8B", "there is no directory .*; give the directory of a downloaded model"),
        ("{tmp}", "has no config.json"),
    ],
)
def test_what_is_not_a_model(value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(value.replace("{tmp}", str(tmp_path)))
