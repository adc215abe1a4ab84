"""Where a prompt is prefilled: here, or on a prefill instance. Pure.

The rule (DESIGN.md, "One request", step 4): remotely when remote prefill is on, a compatible prefill instance lives,
and, with conditional disaggregation, the part of the prompt that is not cached here is longer than
`max_local_prefill_length` while fewer than `max_prefill_queue_size` jobs wait. With `conditional_disagg` off every
prompt is prefilled remotely as long as somebody is there to do it. While the queue is away, nothing is: finding that
out for each request would cost it a time-out before its first token. Nor is a request for a LoRA adapter that not all
prefill instances have: they share one queue, and one without it could only give the job back.
"""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class DisaggPolicy:
    """max_local_prefill_length: tokens. max_prefill_queue_size: waiting jobs at which prefill goes local."""

    remote_prefill: bool = False
    conditional_disagg: bool = False
    max_local_prefill_length: int = 1000
    max_prefill_queue_size: int = 2


class Reason(StrEnum):
    OFF = "remote-prefill is off"
    NO_PREFILL_INSTANCE = "no prefill instance lives"
    NO_ADAPTER = "a prefill instance does not have the LoRA adapter"
    QUEUE_AWAY = "the prefill queue cannot be reached"
    SHORT = "uncached part is short"
    QUEUE_FULL = "prefill queue is full"
    ALWAYS = "conditional-disagg is off"
    LONG = "uncached part is long"


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    remote: bool
    reason: Reason


def choose_prefill(
    policy: DisaggPolicy,
    *,
    num_prompt_tokens: int,
    num_cached_tokens: int,
    num_waiting_jobs: int,
    num_prefillers: int,
    queue_answers: bool = True,
    adapter_everywhere: bool = True,
) -> PrefillChoice:
    """num_cached_tokens: leading prompt tokens in the decode engine's prefix cache. num_waiting_jobs: in the queue.
    queue_answers: False when a job could not be put there now, or only after a time-out. adapter_everywhere: False when
    the request is for a LoRA adapter that some of the prefill instances lack: any of them may get the job."""
    if not policy.remote_prefill:
        return PrefillChoice(False, Reason.OFF)
    if num_prefillers == 0:
        return PrefillChoice(False, Reason.NO_PREFILL_INSTANCE)
    if not adapter_everywhere:
        return PrefillChoice(False, Reason.NO_ADAPTER)
    if not queue_answers:
        return PrefillChoice(False, Reason.QUEUE_AWAY)
    if not policy.conditional_disagg:
        return PrefillChoice(True, Reason.ALWAYS)
    if num_prompt_tokens - num_cached_tokens <= policy.max_local_prefill_length:
        return PrefillChoice(False, Reason.SHORT)
    if num_waiting_jobs >= policy.max_prefill_queue_size:
        return PrefillChoice(False, Reason.QUEUE_FULL)
    return PrefillChoice(True, Reason.LONG)


@dataclass(frozen=True, slots=True)
class PrefillRoom:
    """What a prefill worker has in hand, for deciding how many more jobs to pull.

    tokens_in_hand: prompt tokens of pulled jobs that are not computed yet.
    """

    jobs_in_hand: int
    tokens_in_hand: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    num_blocks_used: int

    def jobs_to_pull(self) -> int:
        """Enough to fill the next two engine steps, no more: what one worker hoards another cannot start on.

        Nothing while the work in hand fills two steps, or while fewer than an eighth of the blocks are free (held
        blocks wait for their decode workers; more prefills could only queue behind them).
        """
        if self.jobs_in_hand >= self.max_num_seqs:
            return 0
        if self.jobs_in_hand and self.tokens_in_hand >= 2 * self.max_num_batched_tokens:
            return 0
        if self.jobs_in_hand and (self.num_blocks - self.num_blocks_used) * 8 < self.num_blocks:
            return 0
        return min(MAX_JOBS_PER_PULL, self.max_num_seqs - self.jobs_in_hand)


MAX_JOBS_PER_PULL = 4
