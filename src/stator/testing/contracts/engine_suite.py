"""What the engine contract's parts share: how a scenario gets its engines and makes its requests."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from stator.engines.base import Engine
from stator.ids import RequestId
from stator.messages.engine import EngineRequest, SamplingParams
from stator.messages.tokens import EMPTY, pack
from stator.testing.clock import run_virtual
from stator.testing.engine_bench import BenchEngine, running_engines, until


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What a scenario needs of an engine. transfer_hold_s: as TRANSFER_HOLD_S."""

    num_blocks: int = 64
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 32
    transfer_hold_s: float = 30.0


def make_request(
    name: str, prompt: list[int], resume: list[int] | None = None, *, salt: str | None = None, **sampling: Any
) -> EngineRequest:
    """Greedy, 12 tokens, eos ignored, unless said otherwise."""
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling}
    params = SamplingParams(**fields)
    resume_ids = pack(resume) if resume else EMPTY
    return EngineRequest(RequestId(name), pack(prompt), params, resume_ids=resume_ids, cache_salt=salt)


def with_transfer(request: EngineRequest, transfer: dict[str, Any], name: str | None = None) -> EngineRequest:
    # As it comes out of a message.
    transfer = msgspec.msgpack.decode(msgspec.msgpack.encode(transfer))
    return msgspec.structs.replace(request, transfer=transfer, request_id=RequestId(name or request.request_id))


Scenario = Callable[[BenchEngine, BenchEngine], Awaitable[None]]


class EngineSuite:
    """block_size: of the engines that make_engine makes. vocab_size: prompts are drawn from 4 to there.

    tcp: whether the engines reach each other over sockets. virtual_time: for engines that use no thread and no socket.
    scenario_s: bound for each, the engines' start included.
    """

    block_size: int
    vocab_size: int
    tcp: bool = False
    virtual_time: bool = False
    scenario_s: float = 50.0

    computes_apart: bool = False
    """The engine computes in another process. What it does there is seen a little later: blocks are free and KV events
    come after the call that caused them, and its block transfers are not the host's."""

    last_block_again: bool = False
    """Of a prompt that is cached to its end the engine computes the last block again, not the last token."""

    def usable(self, num_cached: int, length: int) -> int:
        """Tokens that the engine does not compute of a prompt of that length with so many cached ones."""
        limit = (length - 1) // self.block_size * self.block_size if self.last_block_again else length - 1
        return min(num_cached, limit)

    async def settle(self, engine: Engine) -> None:
        """Until what the engine did so far is in its KV events."""

    async def until_freed(self, one: BenchEngine) -> None:
        """No block is used: at once where the engine computes here."""
        if self.computes_apart:
            await until(lambda: one.engine.load().num_blocks_used == 0)
        assert one.engine.load().num_blocks_used == 0

    async def cut_off(self, one: BenchEngine) -> None:
        """Nobody reaches its blocks any more."""
        if self.computes_apart:
            await one.engine.stop()
        else:
            await one.host.server.close()

    def make_engine(self, settings: EngineSettings) -> Engine:
        """An engine with exactly that many blocks, prefix caching, and a context of at least 24 blocks of tokens, or of
        all blocks if there are fewer."""
        raise NotImplementedError

    def prompt(self, num_tokens: int, seed: int = 0) -> list[int]:
        return random.Random(seed).choices(range(4, self.vocab_size), k=num_tokens)

    def run(self, scenario: Scenario, settings: EngineSettings | None = None, *, ends_engines: bool = False) -> None:
        """Run a scenario on two engines that reach each other; afterwards neither may use a block. A suite whose
        engines are slow to start may use them again, with empty caches, after a scenario that does not end them."""
        chosen = settings or EngineSettings()

        async def main() -> None:
            async with running_engines(self.make_engine(chosen), self.make_engine(chosen), tcp=self.tcp) as (one, two):
                await scenario(one, two)
                await one.until_idle()
                await two.until_idle()

        async def bounded() -> None:
            await asyncio.wait_for(main(), self.scenario_s)

        if self.virtual_time:
            run_virtual(bounded())
        else:
            asyncio.run(bounded())
