"""A process that tries grammars for a GrammarGate. Its argument is the path of the model's tokenizer.json."""

import sys
from pathlib import Path
from typing import Any

import msgspec

from stator.runtime import killable_child

killable_child.guard()

from stator.engines.local.grammar import GrammarCompiler  # noqa: E402 - after the guard
from stator.messages.grammar import Grammar  # noqa: E402


def main(tokenizer: Path) -> None:
    compiler = GrammarCompiler(tokenizer, None, frozenset())
    compiler.load()
    grammars: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Grammar)

    def compile_one(payload: bytes) -> bytes:
        compiler.matcher(grammars.decode(payload))
        return b""

    killable_child.serve(compile_one)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
