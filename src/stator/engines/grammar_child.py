"""A process that tries grammars for a GrammarGate. Its argument is the path of the model's tokenizer.json."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import msgspec

from stator.runtime import killable_child

killable_child.guard()

from stator.engines.local.grammar import GrammarCompiler  # noqa: E402 - after the guard
from stator.errors import StatorError  # noqa: E402
from stator.messages.grammar import Grammar  # noqa: E402


def main(tokenizer: Path) -> None:
    compiler = GrammarCompiler(tokenizer, None, frozenset())
    compiler.load()
    grammars: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Grammar)

    def compile_one(payload: bytes) -> bytes:
        # One that is refused has ended, too: the engine says why.
        with contextlib.suppress(StatorError):
            compiler.matcher(grammars.decode(payload))
        return b""

    killable_child.serve(compile_one)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
