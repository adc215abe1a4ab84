"""How requests of vLLM end that do not finish, and which of them its core was computing for the first time when it
died.

The adapter does not see vLLM's schedule: a step tells what it did when it is done, and the last one never was. What is
known is the order in which requests were handed over, which is the order in which vLLM starts them, and what a step can
hold. The requests without a token that fit into one step beside those that decode are taken for the ones in it. With a
long prompt that was computed in parts already, the step may have had room for more: those are left out, since a request
that is blamed twice is refused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from stator.errors import ErrorCode, StatorError


class Given(Protocol):
    """A request. core_id: set once vLLM has it. started: it has a token."""

    core_id: str | None
    started: bool


S = TypeVar("S", bound=Given)


@dataclass(frozen=True, slots=True)
class StepRoom:
    """What one step of an engine holds, over all its data-parallel ranks."""

    max_num_seqs: int
    max_num_batched_tokens: int


def in_last_step(streams: Iterable[S], room: StepRoom, to_compute: Callable[[S], int]) -> frozenset[S]:
    """streams: all, in the order in which they were handed over. to_compute: tokens of a prompt that are not cached."""
    given = [stream for stream in streams if stream.core_id is not None]
    first = [stream for stream in given if not stream.started]
    num_decoding = len(given) - len(first)
    tokens = room.max_num_batched_tokens - num_decoding
    suspects: list[S] = []
    for stream in first[: max(0, room.max_num_seqs - num_decoding)]:
        if tokens <= 0:
            break
        suspects.append(stream)
        tokens -= to_compute(stream)
    return frozenset(suspects)


def is_death(error: Exception) -> bool:
    """vLLM's word for the end of its core; its class cannot be imported without vLLM."""
    return type(error).__name__ == "EngineDeadError"


def is_refusal(error: Exception) -> bool:
    """vLLM found a parameter that it does not take, before anything was computed."""
    return isinstance(error, ValueError) or any(base.__name__ == "VLLMClientError" for base in type(error).__mro__)


def no_ending(reason: str, *, fetching: bool) -> StatorError:
    """vLLM's "abort" that nobody asked for, and its "error": KV blocks that did not come, if it may not recompute."""
    if reason == "error" and fetching:
        message = "the prompt's KV blocks could not be fetched, and kv_load_failure_policy forbids computing them here"
        return StatorError(ErrorCode.TRANSFER_FAILED, message)
    return StatorError(ErrorCode.ENGINE_DEAD, f"vLLM ended the request with {reason!r}")
