"""A model's tokenizer: `tokenizers` on tokenizer.json, without transformers.

Encoding and decoding release the interpreter lock only in part, so long texts belong on a thread (`Processor` does
that); everything here may be called from any thread.
"""

import os
import re
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tokenizers

from stator.core.detokenize import ByteDetokenizer, Detokenizer, PieceDetokenizer, WindowDetokenizer, whole_text
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.messages.tokens import TokenBuffer, pack
from stator.processor import model_files
from stator.processor.word_cache import WordCache

# One prompt is encoded at a time: handing it to the library's own threads and waiting for them gains nothing.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_T = TypeVar("_T")
_NO_IDS: frozenset[int] = frozenset()


class ModelTokenizer:
    """special_tokens: role to text for chat templates. special_token_ids: text to id, of all. eos_ids: ids that end an
    output. num_ids: one above the highest id. chat_template: source and the file it is from, None for a model without
    one. directory: that it is from, if it is from one."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str],
        eos_ids: tuple[int, ...] = (),
        chat_template: tuple[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        # A tokenizer file may carry the settings of its training run; a server must not cut or fill prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.directory = directory
        self.num_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = tokenizer.get_added_tokens_decoder()
        self.special_token_ids = {token.content: id for id, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_token_ids.values())
        self.eos_ids = frozenset(eos_ids or self._ids_of(special_tokens.get("eos_token")))
        settings: dict[str, Any] = msgspec.json.decode(tokenizer.to_str())
        self._decoder: dict[str, Any] | None = settings["decoder"]
        self._new_detokenizer = _detokenizer_factory(tokenizer, self._decoder, self.special_ids)
        self._new_detokenizers: dict[frozenset[int], Callable[[], Detokenizer]] = {frozenset(): self._new_detokenizer}
        self._token_bytes = _Table(_token_bytes(tokenizer, self._decoder))
        self._words = WordCache.of(settings, self._encode_word)

    @classmethod
    def load(cls, model_dir: Path) -> "ModelTokenizer":
        """Raises ConfigError, naming the file, if one is missing or cannot be used."""
        model_files.require_directory(model_dir)
        path = model_dir / model_files.TOKENIZER
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file; Stator needs the model's fast tokenizer. Save one beside the model with "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`."
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path}: not a tokenizer that `tokenizers` can load: {error}") from error
        template = model_files.read_chat_template(model_dir)
        return cls(
            tokenizer,
            special_tokens=model_files.read_special_tokens(model_dir),
            eos_ids=model_files.read_eos_ids(model_dir),
            chat_template=None if template is None else (template[0], str(template[1])),
            directory=model_dir,
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> TokenBuffer:
        """Raises StatorError(INVALID_REQUEST) for text that is not Unicode (a lone surrogate)."""
        if self._words is not None and not add_special_tokens:
            known = self._words.encode(text)
            if known is not None:
                return TokenBuffer(known)
        try:
            # The batch form computes no character offsets and gives the interpreter lock away while it works.
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except (UnicodeEncodeError, TypeError) as error:
            raise StatorError(
                ErrorCode.INVALID_REQUEST, "the prompt contains an unpaired surrogate and is not valid Unicode text"
            ) from error
        return pack(array("I", encoding.ids))

    def _encode_word(self, word: str) -> bytes:
        tokens = self._tokenizer.model.tokenize(word.translate(_CHAR_OF_ASCII))
        return pack(array("I", [token.id for token in tokens]))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        # The batch form gives the interpreter lock away while it works.
        return self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it, which is not its text: bytes have names there. An id in a gap of the
        vocabulary has none."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def detokenizer(self, *, skip_special_tokens: bool = True, shown_ids: frozenset[int] = _NO_IDS) -> Detokenizer:
        """A new one, for one output. shown_ids: special tokens that are not skipped; of the model, not of a request."""
        if skip_special_tokens and not shown_ids:
            return self._new_detokenizer()
        shown = shown_ids if skip_special_tokens else self.special_ids
        new = self._new_detokenizers.get(shown)
        if new is None:
            new = self._new_detokenizers[shown] = _detokenizer_factory(
                self._tokenizer, self._decoder, self.special_ids - shown
            )
        return new()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for by itself, which need not be whole characters; of a special one its text, of an
        unknown id nothing."""
        return self._token_bytes[token_id]

    def _ids_of(self, token: str | None) -> tuple[int, ...]:
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        return () if token_id is None else (token_id,)


class _Table(dict[int, _T]):
    """Fills itself on first use: a vocabulary has 100k entries and an output uses a few hundred."""

    def __init__(self, make: Callable[[int], _T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> _T:
        self[token_id] = entry = self._make(token_id)
        return entry


def _detokenizer_factory(
    tokenizer: tokenizers.Tokenizer, decoder: dict[str, Any] | None, special_ids: frozenset[int]
) -> Callable[[], Detokenizer]:
    """Which kind a tokenizer needs follows from its `decoder`."""

    def token(token_id: int) -> str | None:
        return None if token_id in special_ids else tokenizer.id_to_token(token_id)

    steps = _decoder_steps(decoder)
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        token_bytes = _Table(lambda token_id: _byte_level_bytes(token(token_id)))
        token_text = _Table(lambda token_id: whole_text(token_bytes[token_id]))
        return lambda: ByteDetokenizer(token_bytes, token_text)
    if kinds == ["Metaspace"]:
        return _metaspace_factory(steps[0], token)
    pieces_factory = _sentencepiece_factory(steps, token)
    if pieces_factory is not None:
        return pieces_factory
    skip = bool(special_ids)
    return lambda: WindowDetokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=skip), special_ids)


def _token_bytes(tokenizer: tokenizers.Tokenizer, decoder: dict[str, Any] | None) -> Callable[[int], bytes]:
    """By the same kinds as `_detokenizer_factory`."""
    token = tokenizer.id_to_token
    steps = _decoder_steps(decoder)
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return lambda token_id: _byte_level_bytes(token(token_id))
    if kinds == ["Metaspace"]:
        mark: str = steps[0]["replacement"]
        return lambda token_id: (token(token_id) or "").replace(mark, " ").encode()
    make = _sentencepiece_piece(steps, token)
    if make is None:
        return lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False).encode()

    def of_piece(token_id: int) -> bytes:
        piece = make(token_id)
        return bytes([piece]) if isinstance(piece, int) else (piece or "").encode()

    return of_piece


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]
    return [decoder]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: printable Latin-1 stands for itself, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_level_alphabet()
_CHAR_OF_ASCII = {byte: char for char, byte in BYTE_OF_CHAR.items() if byte < 128}


def _byte_level_bytes(token: str | None) -> bytes:
    """A token with a character outside the alphabet (an added token) is taken literally, as the library does."""
    if token is None:
        return b""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _metaspace_factory(step: dict[str, Any], token: Callable[[int], str | None]) -> Callable[[], Detokenizer]:
    mark: str = step["replacement"]

    def pieces(space: str) -> _Table[str | int | None]:
        def make(token_id: int) -> str | int | None:
            text = token(token_id)
            return None if text is None else text.replace(mark, space)

        return _Table(make)

    later = pieces(" ")
    first = later if step.get("prepend_scheme") == "never" else pieces("")
    return lambda: PieceDetokenizer(later, first_pieces=first)


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _sentencepiece_factory(
    steps: list[dict[str, Any]], token: Callable[[int], str | None]
) -> Callable[[], Detokenizer] | None:
    make = _sentencepiece_piece(steps, token)
    if make is None:
        return None
    strip: dict[str, Any] = steps[-1] if steps[-1]["type"] == "Strip" else {"content": " ", "start": 0}
    pieces: _Table[str | int | None] = _Table(make)
    return lambda: PieceDetokenizer(pieces, strip_char=strip["content"], strip_chars=strip["start"])


def _sentencepiece_piece(
    steps: list[dict[str, Any]], token: Callable[[int], str | None]
) -> Callable[[int], str | int | None] | None:
    """A token's text or byte, for Replace*, ByteFallback, Fuse, and then perhaps Strip at the front; None for any other
    composition."""
    replacements: list[tuple[str, str]] = []
    rest = list(steps)
    while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
        step = rest.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    if [step["type"] for step in rest[:2]] != ["ByteFallback", "Fuse"] or len(rest) > 3:
        return None
    if len(rest) == 3 and (rest[2]["type"] != "Strip" or rest[2]["stop"]):
        return None

    def make(token_id: int) -> str | int | None:
        text = token(token_id)
        if text is None:
            return None
        for pattern, content in replacements:
            text = text.replace(pattern, content)
        as_byte = _BYTE_TOKEN.fullmatch(text)
        return text if as_byte is None else int(as_byte[1], 16)

    return make
