"""From a stream of token ids to a stream of text: incremental, exact, never resent.

What every detokenizer here promises: the concatenation of all `push` results and the final `flush` equals the
tokenizer's own decoding of all ids with special tokens skipped; an incomplete character is held back, never shown as
U+FFFD; bytes that cannot become a character are U+FFFD, as in the tokenizer. Its state is a function of the ids
pushed so far, so one that is fed an earlier attempt's ids continues where that one stopped.

Three kinds, because tokenizers compose text in three ways:

- `ByteDetokenizer`: a token is a string of bytes (byte-level BPE: GPT-2, Llama 3, Qwen, DeepSeek).
- `PieceDetokenizer`: a token is a string, or one byte of a character that the vocabulary lacks (SentencePiece:
  Llama 2, Mistral, Gemma), and the text may lose leading spaces.
- `WindowDetokenizer`: anything else, by decoding a small window again and again. Slower; exact wherever a token's text
  depends on its neighbours only.
"""

import codecs
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        ...

    def flush(self) -> str:
        """What was held back. The stream is over: no push follows."""
        ...


_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class ByteDetokenizer:
    """token_bytes: each id's bytes; empty for special and unknown ids.

    token_text: their text, None where the bytes alone are not whole characters. Between whole characters, which is
    nearly always, a token's text is just that; the decoder is for the others.
    """

    __slots__ = ("_decoder", "_token_bytes", "_token_text", "_whole")

    def __init__(self, token_bytes: Mapping[int, bytes], token_text: Mapping[int, str | None] | None = None) -> None:
        self._token_bytes = token_bytes
        self._token_text = token_text
        self._whole = token_text is not None
        self._decoder: codecs.IncrementalDecoder | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        if self._whole and len(token_ids) == 1:
            assert self._token_text is not None
            text = self._token_text[token_ids[0]]
            if text is not None:
                return text
        table = self._token_bytes
        decoder = self._decoder
        if decoder is None:
            # Invalid bytes become one U+FFFD per maximal subpart (Unicode 3.9, table 3-8), as in the Rust decoder.
            decoder = self._decoder = _new_utf8_decoder("replace")
        text = decoder.decode(b"".join([table[token_id] for token_id in token_ids]))
        self._whole = self._token_text is not None and not decoder.getstate()[0]
        return text

    def flush(self) -> str:
        return "" if self._decoder is None else self._decoder.decode(b"", True)


def whole_text(token_bytes: bytes) -> str | None:
    """The text of a token whose bytes are whole characters."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return None


class PieceDetokenizer:
    """pieces: each id's text (str), or its byte (int, a byte-fallback token), or None for special and unknown ids.

    first_pieces: the same for the first piece of a text, where a tokenizer treats that differently; else `pieces`.
    strip_char, strip_chars: how many of which character to drop from the front of the whole text.

    A run of byte tokens is valid or not as a whole (one bad byte turns the entire run into U+FFFDs), so it is held
    until a token of text ends it; `MAX_RUN_BYTES` bounds the wait of scripts that are spelled in bytes throughout.
    """

    MAX_RUN_BYTES = 64

    __slots__ = ("_first_pieces", "_pieces", "_run", "_started", "_strip_char", "_strip_left")

    def __init__(
        self,
        pieces: Mapping[int, str | int | None],
        *,
        first_pieces: Mapping[int, str | int | None] | None = None,
        strip_char: str = " ",
        strip_chars: int = 0,
    ) -> None:
        self._pieces = pieces
        self._first_pieces = pieces if first_pieces is None else first_pieces
        self._run = bytearray()
        self._started = False
        self._strip_char = strip_char
        self._strip_left = strip_chars

    def push(self, token_ids: Sequence[int]) -> str:
        out: list[str] = []
        for token_id in token_ids:
            piece = (self._pieces if self._started else self._first_pieces)[token_id]
            if piece is None:
                continue
            self._started = True
            if isinstance(piece, int):
                self._run.append(piece)
                if len(self._run) >= self.MAX_RUN_BYTES:
                    out.append(self._complete_part_of_run())
                continue
            if self._run:
                out.append(self._end_run())
            out.append(piece)
        return self._strip("".join(out))

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _complete_part_of_run(self) -> str:
        """Text of the run's whole characters, leaving an incomplete last one; an invalid run is given up whole."""
        run = bytes(self._run)
        try:
            text, num_bytes = codecs.utf_8_decode(run, "strict", False)
        except UnicodeDecodeError:
            return self._end_run()
        self._run[:] = run[num_bytes:]
        return text

    def _strip(self, text: str) -> str:
        if not self._strip_left or not text:
            return text
        kept = text.lstrip(self._strip_char)
        dropped = min(len(text) - len(kept), self._strip_left)
        self._strip_left = self._strip_left - dropped if dropped == len(text) else 0
        return text[dropped:]


class WindowDetokenizer:
    """decode: the tokenizer's, with special tokens skipped. skipped: special ids, which must not fill the window.

    The window is the tokens of the last emitted text, which give the new ones their context, and those not emitted
    yet. Text that ends in U+FFFD waits for the rest of its character, at most for `MAX_INCOMPLETE_TOKENS`.
    """

    MAX_INCOMPLETE_TOKENS = 8

    __slots__ = ("_decode", "_num_context", "_shown", "_skipped", "_window")

    def __init__(self, decode: Callable[[list[int]], str], skipped: Collection[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        self._window: list[int] = []
        self._num_context = 0
        self._shown = ""

    def push(self, token_ids: Sequence[int]) -> str:
        fresh = [token_id for token_id in token_ids if token_id not in self._skipped]
        if not fresh:
            return ""
        self._window += fresh
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._num_context <= self.MAX_INCOMPLETE_TOKENS:
            return ""
        new = self._unseen(text)
        if new:
            self._advance()
        return new

    def flush(self) -> str:
        return self._unseen(self._decode(self._window)) if self._window else ""

    def _unseen(self, text: str) -> str:
        return text[len(self._shown) :]

    def _advance(self) -> None:
        context = self._window[self._num_context :]
        shown = self._decode(context)
        if not shown:
            # These tokens show text only next to the old context, so they cannot be the new one alone.
            self._shown = self._decode(self._window)
            self._num_context = len(self._window)
            return
        self._window = context
        self._num_context = len(context)
        self._shown = shown
