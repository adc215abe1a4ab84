"""Reading the tokenizer's files of a Hugging Face model directory. Missing and broken ones are ConfigErrors by path."""

from pathlib import Path
from typing import Any

import msgspec

from stator.errors import DECODE_ERRORS, ConfigError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATE_JSON = "chat_template.json"

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def require_directory(model_dir: Path) -> None:
    if not model_dir.is_dir():
        raise ConfigError(
            f"model: {model_dir} is not a directory; expected a local Hugging Face model directory with {TOKENIZER}"
        )


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value: Any = msgspec.json.decode(read_text(path))
    except DECODE_ERRORS as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_special_tokens(model_dir: Path) -> dict[str, str]:
    """Role to text, e.g. {"bos_token": "<s>"}: what a chat template finds under these names."""
    merged = read_json(model_dir / SPECIAL_TOKENS_MAP) | read_json(model_dir / TOKENIZER_CONFIG)
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = merged.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def read_chat_template(model_dir: Path) -> tuple[str, Path] | None:
    """The template's source and the file it is from; None if the model has none (a base model).

    A file of its own wins over tokenizer_config.json, as in Hugging Face. Of several named templates the one called
    "default" is taken.
    """
    own = model_dir / CHAT_TEMPLATE
    if own.is_file():
        return read_text(own), own
    for path in (model_dir / CHAT_TEMPLATE_JSON, model_dir / TOKENIZER_CONFIG):
        value = read_json(path).get("chat_template")
        if isinstance(value, list):
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get("default")
        if isinstance(value, str):
            return value, path
    return None


def read_eos_ids(model_dir: Path) -> tuple[int, ...]:
    """Token ids that end the model's output: generation_config.json's, else config.json's; () if neither says."""
    for path in (model_dir / GENERATION_CONFIG, model_dir / MODEL_CONFIG):
        value = read_json(path).get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            return tuple(value)
        if value is not None:
            raise ConfigError(f"{path}: eos_token_id: expected an integer or a list of integers, found {value!r}")
    return ()


def model_type(model_dir: Path) -> str:
    """Of config.json; "" if it does not say."""
    value = read_json(model_dir / MODEL_CONFIG).get("model_type")
    return value if isinstance(value, str) else ""


def context_length(model_dir: Path) -> int:
    """The most tokens, prompt and output together, that the model was made for. Raises ConfigError if unsaid."""
    path = model_dir / MODEL_CONFIG
    value = read_json(path).get("max_position_embeddings")
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{path}: max_position_embeddings: expected a number of tokens, found {value!r}; set max-model-len"
        )
    return value
