"""Which token ids a simulated model may say: such as read like text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import xxhash

from stator.errors import DECODE_ERRORS, ConfigError
from stator.messages.tokens import pack

MAX_WORDS = 4096
"""The lowest ids are the most frequent words."""

ENOUGH_WORDS = 64

_SPACES = "\u0120\u2581"
"""How byte-level and sentencepiece tokenizers spell a leading space."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """words: ids that are sampled, in order; none is special. vocab_size: one above the highest id that a prompt may
    have. eos_token_ids: of the model. max_model_len: tokens, as the model's config says."""

    words: tuple[int, ...]
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_model_len: int

    @property
    def fingerprint(self) -> str:
        """Equal for engines that say the same after the same tokens."""
        parts = pack(self.words) + b"," + pack(sorted(self.eos_token_ids))
        return f"words-{xxhash.xxh3_64_hexdigest(parts)}"


def load_vocabulary(model_dir: Path) -> Vocabulary:
    """Reads tokenizer.json, config.json and generation_config.json. Raises ConfigError, naming the file."""
    import tokenizers

    path = model_dir / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path}: not a tokenizer that `tokenizers` can load: {error}") from error
    config = _json(model_dir / "config.json")
    num_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    vocab_size, max_model_len = config.get("vocab_size"), config.get("max_position_embeddings")
    eos = _eos(_json(model_dir / "generation_config.json")) or _eos(config)
    words = _words(tokenizer, num_ids, eos)
    if not words:
        raise ConfigError(f"{path}: none of its {num_ids} tokens is text; the sim engine has nothing to say")
    return Vocabulary(
        words=words,
        vocab_size=max(num_ids, vocab_size) if isinstance(vocab_size, int) else num_ids,
        eos_token_ids=eos,
        max_model_len=max_model_len if isinstance(max_model_len, int) and max_model_len > 0 else 2048,
    )


def _words(tokenizer: Any, num_ids: int, eos: frozenset[int]) -> tuple[int, ...]:
    """Whole lower-case words with the space before them, and full stops; for lack of these whatever is printable."""
    barred = eos | frozenset(tokenizer.get_added_tokens_decoder())
    pieces = ((token_id, tokenizer.id_to_token(token_id)) for token_id in range(num_ids) if token_id not in barred)
    words: list[int] = []
    others: list[int] = []
    for token_id, piece in pieces:
        if piece is None:
            continue
        if piece in {".", ","} or _is_word(piece):
            words.append(token_id)
        elif len(others) < MAX_WORDS and piece.isascii() and piece.isprintable() and piece.strip():
            others.append(token_id)
        if len(words) == MAX_WORDS:
            break
    return tuple(words if len(words) >= ENOUGH_WORDS else words + others)


def _is_word(piece: str) -> bool:
    text = piece[1:]
    return piece[0] in _SPACES and len(text) > 1 and text.isascii() and text.isalpha() and text.islower()


def _eos(config: dict[str, Any]) -> frozenset[int]:
    value = config.get("eos_token_id")
    if isinstance(value, int):
        return frozenset({value})
    return frozenset(cast(list[int], value)) if isinstance(value, list) else frozenset()


def _json(path: Path) -> dict[str, Any]:
    """{} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, *DECODE_ERRORS) as error:
        raise ConfigError(f"{path}: expected a JSON object: {error}") from error
