"""Grammars on the local engine: which tokens may come next, by llguidance.

A grammar's state is a function of the output alone, so that a sequence which was preempted, or which another engine
began, goes on exactly: what it has already is read first.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import llguidance
import llguidance.numpy
import msgspec
import numpy as np
from numpy.typing import NDArray

from stator.core.tools.grammar import to_lark
from stator.errors import ErrorCode, StatorError
from stator.messages.grammar import Grammar, OwnGrammar

F32 = NDArray[np.float32]


def _limits() -> "llguidance.LLParserLimits":
    """Work, not time: what a grammar may cost at its start (some 20 ms of lexer) and in one step (some 15 ms) is the
    same on every machine, and so is its memory (a lexer state is 1 to 2 KiB). Figures: llguidance's own."""
    return llguidance.LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class TokenGrammar:
    """Of one sequence. Not thread-safe; made on one thread and used on another."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = np.array(sorted(eos_token_ids), np.int64)
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self._num_read = 0

    def restrict(self, row: F32, output_ids: Sequence[int]) -> bool:
        """Make what may not follow the output impossible, in place. row: [vocab_size]. Whether the output may only end.

        The model's ending tokens may come where the output is whole, whichever of them the tokenizer knows as its own.
        """
        self._read(output_ids)
        matcher = self._matcher
        if matcher.is_stopped() or matcher.is_error():
            return self._end(row)
        llguidance.numpy.fill_next_token_bitmask(matcher, self._bits, 0)
        allowed = np.unpackbits(self._bits[0].view(np.uint8), count=self._vocab_size, bitorder="little").astype(bool)
        allowed[self._ends] = matcher.is_accepting()
        if not allowed.any():
            return self._end(row)
        row[: self._vocab_size][~allowed] = -np.inf
        return not np.delete(allowed, self._ends).any()

    def _read(self, output_ids: Sequence[int]) -> None:
        for token_id in output_ids[self._num_read :]:
            self._num_read += 1
            if not self._matcher.is_stopped() and not self._matcher.is_error():
                self._matcher.consume_token(token_id)

    def _end(self, row: F32) -> bool:
        kept = row[self._ends]
        row[:] = -np.inf
        row[self._ends] = kept
        return True


class GrammarCompiler:
    """tokenizer: tokenizer.json's path. Loads it at the first grammar; for one thread at a time. vocab_size: of the
    model, None for the tokenizer's own."""

    def __init__(self, tokenizer: Path, vocab_size: int | None, eos_token_ids: frozenset[int]) -> None:
        self.path = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._loaded: tuple[llguidance.LLTokenizer, dict[str, int]] | None = None

    def compile(self, grammar: Grammar) -> TokenGrammar:
        """Raises StatorError(INVALID_REQUEST), with what the backend says of it; UNSUPPORTED without a tokenizer."""
        matcher = self.matcher(grammar)
        vocab_size = self._vocab_size or self.load()[0].vocab_size
        return TokenGrammar(matcher, vocab_size, self._eos_token_ids)

    def matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """As `compile`."""
        tokenizer, special_tokens = self.load()
        text = grammar.text if isinstance(grammar, OwnGrammar) else to_lark(grammar, special_tokens)
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=_limits())
        if matcher.is_error():
            raise StatorError(
                ErrorCode.INVALID_REQUEST,
                f"the form of the answer that was asked for cannot be used: {_first_line(matcher.get_error())}",
                param="grammar",
            )
        return matcher

    def load(self) -> tuple[llguidance.LLTokenizer, dict[str, int]]:
        """The tokenizer, and its special tokens by their texts. Raises StatorError(UNSUPPORTED) if there is none."""
        if self._loaded is not None:
            return self._loaded
        if not self.path.is_file():
            raise StatorError(
                ErrorCode.UNSUPPORTED,
                f"grammars need the model's fast tokenizer, and {self.path.name} is not beside it",
                param="grammar",
            )
        added = msgspec.json.decode(self.path.read_bytes(), type=_TokenizerFile).added_tokens
        special_tokens = {token.content: token.id for token in added if token.special}
        ends = sorted(self._eos_token_ids) or None
        tokenizer = llguidance.LLTokenizer(str(self.path), n_vocab=self._vocab_size, eos_token=ends)
        self._loaded = (tokenizer, special_tokens)
        return self._loaded


class _AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct, frozen=True):
    added_tokens: list[_AddedToken] = []


_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")


def _first_line(text: str) -> str:
    """Without the place, which is one in a grammar that the client did not write."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _PLACE.sub("", lines[0] if lines else "the backend does not say why")[:300]
