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
    instance_id: the decode instance, on the first delta. overlap_blocks, cost_ms: of the route decision, there too, if
    the call's headers ask for it (EXPLAIN_HEADER).
    """

    text: str = ""
    num_tokens: int = 0
    ending: Ending | None = None
    usage: Usage | None = None
    instance_id: InstanceId | None = None
    overlap_blocks: int | None = None
    cost_ms: float | None = None


EXPLAIN_HEADER = "x-stator-explain"
"""A call's header: "1" asks for the reasons of the routing decision in the answer."""

SESSION_HEADER = "x-session-id"
"""A call's header: requests with the same value prefer the same decode instance."""


class RouteRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks the Router for a decode instance. The booking lives as long as the call: cancel it when the request ends.

    block_hashes: chained hashes of the prompt's full blocks (core.hashing). exclude: instances that just failed it.
    session_id: requests of one session prefer the instance that had the last one.
    """

    model: str
    num_prompt_tokens: int
    max_tokens: int
    block_hashes: list[int] = []
    exclude: tuple[InstanceId, ...] = ()
    session_id: str | None = None


class RouteDecision(msgspec.Struct, frozen=True, omit_defaults=True):
    """The Router's one item; the call stays open after it, as the booking.

    overlap_blocks: leading blocks of the prompt that the instance holds, by its own events. cost_ms: the predicted cost
    of the request there, 0 in modes that predict none. booking: names the decision in a RouteObservation; 0: none is
    wanted.
    """

    instance_id: InstanceId
    addresses: tuple[str, ...]
    overlap_blocks: int = 0
    cost_ms: float = 0.0
    booking: int = 0
