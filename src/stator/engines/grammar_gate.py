"""Grammars are compiled once in a process that can be killed, before an engine compiles them in its own.

A library that compiles what strangers write may run for minutes, or end its process for want of memory, which no
limit on its work foresees: llguidance aborts over `{"type": "array", "minItems": 1000000000}`.
"""

import asyncio
import hashlib
import logging
import sys
from collections import OrderedDict
from pathlib import Path

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.messages.grammar import Grammar
from stator.runtime.killable import JobFailed, JobKilled, JobTooLong, KillablePool, PoolUnavailable

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
MAX_BYTES = 4 << 30
MAX_KNOWN = 4096


class GrammarGate:
    """tokenizer: path of the model's tokenizer.json.

    What a grammar is worth is for the engine to say, which compiles it next: here it only has to end. One that did is
    known and not compiled here again.
    """

    def __init__(self, tokenizer: Path, *, timeout_s: float = TIMEOUT_S, pool: KillablePool | None = None) -> None:
        self._timeout_s = timeout_s
        command = (sys.executable, "-m", "stator.engines.grammar_child", str(tokenizer))
        self._pool = pool or KillablePool("the process for grammars", command, max_bytes=MAX_BYTES)
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._told = False

    async def check(self, grammar: Grammar) -> None:
        """Raises StatorError(INVALID_REQUEST) for one that could not be compiled in its time and memory."""
        payload = msgspec.msgpack.encode(grammar)
        key = hashlib.sha256(payload).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return
        compiled = self._waiting.get(key)
        if compiled is None:
            compiled = self._waiting[key] = self._pool.submit(payload, self._timeout_s)
            compiled.add_done_callback(lambda _: self._waiting.pop(key, None))
        try:
            # Others may wait for the same.
            await asyncio.shield(compiled)
        except JobTooLong:
            raise _refused(f"it takes longer than {self._timeout_s:g} seconds to compile") from None
        except JobKilled:
            raise _refused("compiling it takes more memory than there may be") from None
        except PoolUnavailable as error:
            self._tell(error)
            return
        except JobFailed as error:
            self._tell(error)
        self._known[key] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    async def close(self) -> None:
        """Idempotent."""
        await self._pool.close()

    def _tell(self, error: JobFailed) -> None:
        """The engine's own bounds must do then, as far as it has some."""
        if not self._told and not self._pool.closed:
            self._told = True
            logger.warning("a grammar is compiled without being tried in a process of its own first: %s", error)


def _refused(why: str) -> StatorError:
    message = f"the form of the answer that was asked for cannot be used: {why}; ask for a simpler one"
    return StatorError(ErrorCode.INVALID_REQUEST, message, param="grammar")
