"""What travels between Frontend and Processor, and between Processor and Router."""

import msgspec

from stator.errors import Ending
from stator.ids import InstanceId
from stator.messages.openai import Usage
from stator.messages.tools import ToolCallDelta


class Alternative(msgspec.Struct, frozen=True, array_like=True):
    """A token that was, or might have been. text: decoded by itself. raw: its bytes, which need not be whole
    characters. logprob: natural, of the model's own distribution; None for a prompt's first token. rank: 1 for the
    likeliest."""

    token_id: int
    text: str
    raw: bytes
    logprob: float | None = None
    rank: int = 0


class ScoredToken(msgspec.Struct, frozen=True, array_like=True):
    """top: the likeliest at this place, best first; `token` may be among them. offset: characters of the text (with
    the prompt's, where it is shown) before this token."""

    token: Alternative
    top: list[Alternative]
    offset: int = 0


class TokenDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of the tokens that a delta accounts for, as far as asked."""

    ids: list[int] | None = None
    scores: list[ScoredToken] | None = None


class PromptDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """As far as asked. text: to be shown before the output's (`echo`)."""

    text: str | None = None
    ids: list[int] | None = None
    scores: list[ScoredToken] | None = None


class CompletionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Text that is new since the last delta; never resent, never half a character.

    A Processor stream is: one delta as soon as the request is accepted by an instance and its first tokens came,
    more as tokens come, and a last one with `ending` (stop or length) and `usage`. The text of a delta may be empty.
    num_tokens: output tokens this delta accounts for (text may lag while a character is incomplete).
    instance_id: the decode instance, on the first delta. overlap_blocks, cost_ms: of the route decision, there too, if
    the call's headers ask for it (EXPLAIN_HEADER); with phases_ms, what the time until then went to: `route` (the
    decision, with the wait for a worker with room) and `engine` (the worker's and its engine's, to the first token).

    Of a request for several choices, `choice` says which one a delta belongs to, and each has its `ending`; `usage`, of
    all together, comes with the last of them, or with every delta if asked (`continuous_usage_stats`).
    tokens, prompt: what else was asked for; prompt on the first delta of a choice.

    parsed: on the first delta of a choice: its answer has parts beside its text, or may have: reasoning and tool_calls,
    new since the last delta as text is.

    stop_string: with the ending, if that was one of the request's stop strings: which.
    """

    text: str = ""
    num_tokens: int = 0
    ending: Ending | None = None
    usage: Usage | None = None
    instance_id: InstanceId | None = None
    overlap_blocks: int | None = None
    cost_ms: float | None = None
    phases_ms: dict[str, float] | None = None
    choice: int = 0
    tokens: TokenDetails | None = None
    prompt: PromptDetails | None = None
    parsed: bool = False
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []
    stop_string: str | None = None


EXPLAIN_HEADER = "x-stator-explain"
"""A call's header: "1" asks for the reasons of the routing decision in the answer."""

SESSION_HEADER = "x-session-id"
"""A call's header: requests with the same value prefer the same decode instance."""


class RouteRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks the Router for a decode instance. The booking lives as long as the call: cancel it when the request ends.

    block_hashes: chained hashes of the prompt's full blocks (core.hashing). exclude: instances that just failed it.
    session_id: requests of one session prefer the instance that had the last one. priority: of requests that wait,
    those with a smaller number are first. resumed: an instance had the request already; it goes before new ones.

    The call is unanswered while no instance has room; cancelling it leaves the line. OVERLOADED: the line is full, or
    the wait is longer than allowed; with `retry_after_s`.

    begun: a router has placed requests of this caller before; one that has just started need not wait for min-workers.
    booked_on: the request runs there, and its booking was lost with a router: it is booked anew, and nothing is
    chosen. started: its first token has come, so that no prefill is ahead.
    """

    model: str
    num_prompt_tokens: int
    max_tokens: int
    block_hashes: list[int] = []
    exclude: tuple[InstanceId, ...] = ()
    session_id: str | None = None
    priority: int = 0
    resumed: bool = False
    begun: bool = False
    booked_on: InstanceId | None = None
    started: bool = False


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
