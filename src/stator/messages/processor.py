"""What travels between Frontend and Processor, and between Processor and Router."""

import msgspec

from stator.errors import Ending
from stator.ids import InstanceId
from stator.messages.openai import Usage


class CompletionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Text that is new since the last delta; never resent, never half a character.

    A Processor stream is: one delta as soon as the request is accepted by an instance and its first tokens came,
    more as tokens come, and a last one with `ending` (stop or length) and `usage`. The text of a delta may be empty.
    num_tokens: output tokens this delta accounts for (text may lag while a character is incomplete).
    instance_id: the decode instance, on the first delta.
    """

    text: str = ""
    num_tokens: int = 0
    ending: Ending | None = None
    usage: Usage | None = None
    instance_id: InstanceId | None = None


class RouteRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks the Router for a decode instance. The booking lives as long as the call: cancel it when the request ends.

    block_hashes: chained hashes of the prompt's full blocks (core.hashing). exclude: instances that just failed it.
    """

    model: str
    num_prompt_tokens: int
    max_tokens: int
    block_hashes: list[int] = []
    exclude: tuple[InstanceId, ...] = ()


class RouteDecision(msgspec.Struct, frozen=True, omit_defaults=True):
    """The Router's one item; the call stays open after it, as the booking."""

    instance_id: InstanceId
    addresses: tuple[str, ...]
    overlap_blocks: int = 0
