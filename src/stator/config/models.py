"""Where a model is: a directory in Hugging Face's layout, a model on the hub, or one of the bundled models."""

import difflib
import re
from pathlib import Path

from stator.errors import ConfigError

BUNDLED_SCHEME = "stator:"
BUNDLED_MODELS = ("tiny-llama", "tiny-decilm")

_BUNDLED_DIRECTORY = Path(__file__).parent.parent / "models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def hub_id(value: str) -> str | None:
    """The value if it names a model on the hub, `org/name`. A directory of that name comes first, as in vLLM."""
    return value if _HUB_ID.fullmatch(value) and not Path(value).exists() else None


def resolve_model(value: str) -> Path:
    """`stator:NAME` or a directory with a config.json; never a hub id, for which see config.hub.

    Raises ConfigError saying what was looked for, and where.
    """
    if value.startswith(BUNDLED_SCHEME):
        return _bundled(value)
    path = Path(value).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    if path.is_dir():
        raise ConfigError(
            f"model {value}: {path.resolve()} has no config.json; expected a model in Hugging Face's layout "
            f"(config.json, tokenizer.json, *.safetensors)"
        )
    known = ", ".join(BUNDLED_SCHEME + name for name in BUNDLED_MODELS)
    raise ConfigError(
        f"model {value}: there is no directory {path.resolve()}; give the directory of a downloaded model "
        f"(config.json, tokenizer.json, *.safetensors), the id of one on the hub (org/name) or a bundled one: {known}"
    )


def _bundled(value: str) -> Path:
    name = value.removeprefix(BUNDLED_SCHEME)
    if name not in BUNDLED_MODELS:
        near = difflib.get_close_matches(name, BUNDLED_MODELS, n=1)
        hint = f"; did you mean {BUNDLED_SCHEME}{near[0]}?" if near else ""
        known = ", ".join(BUNDLED_SCHEME + known for known in BUNDLED_MODELS)
        raise ConfigError(f"model {value}: there is no bundled model {name!r}{hint} (bundled: {known})")
    path = _BUNDLED_DIRECTORY / name
    if not (path / "config.json").is_file():
        raise ConfigError(f"model {value}: {path} is missing from this installation; install stator again")
    return path
