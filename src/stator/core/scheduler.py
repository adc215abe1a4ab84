"""Continuous batching: which tokens of which sequences are computed next, and where their KV goes.

One step is `plan() -> a runner computes -> apply(plan, sampled)`. Requests may be added, aborted, and their transfers
answered between the two; a token sampled for a sequence that has ended meanwhile is dropped.

A sequence's phases:

- WAITING: no blocks. In line by (priority, arrival); the line is never overtaken.
- FETCHING: has blocks for all its tokens, which a prefill engine's KV is being copied into. Not computed.
- RUNNING: has blocks for all its tokens. Computed in chunks until its end is reached, then one token a step.
- HELD: a finished prefill whose blocks wait to be fetched; known by its TransferId from then on.
- FINISHED: no blocks.

Rules:

- A step computes at most `max_num_batched_tokens`: running decodes first, then running prefills, then newcomers,
  each in line order. So a long prompt never delays a decode by more than one budget's worth.
- A newcomer gets blocks for all its tokens at once, cached ones first, or it waits: computing a prompt never preempts.
- When a decode needs a block and none is free, the last in line among the running loses its blocks and goes back to
  WAITING, to be computed again (most of it is still in the prefix cache then). The first in line is never preempted
  for another, hence always advances: any set of requests that fit one by one completes.
- A sequence whose tokens are all cached computes its last one again, for its logits. That writes the values that are
  there already.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from stator.core.blocks import BlockManager, BlockTable
from stator.core.sequence_limits import computes_whole_prompt, resumed_finish, stop_reason, validate
from stator.ids import RequestId, TransferId
from stator.messages.engine import EngineLoad, EngineRequest, FinishReason
from stator.messages.tokens import BYTES_PER_TOKEN, TokenBuffer, unpack

RESERVE_DIVISOR = 100
"""While others run, a newcomer must leave 1/100 of the blocks (at least one) free for their growth."""


class Phase(StrEnum):
    WAITING = "waiting"
    FETCHING = "fetching"
    RUNNING = "running"
    HELD = "held"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """eos_token_ids: of the model. vocab_size: ids from there on are refused."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence needs one token a step"
            )


@dataclass(slots=True, eq=False)
class LiveSequence:
    """One request in the engine.

    tokens: packed ids of prompt and output so far. output_ids: output so far, resumed ones included.
    num_computed: leading tokens whose KV is in the blocks. num_to_prefill: tokens there were at the last admission;
    computing those is prompt work. num_fetchable: leading tokens whose KV a prefill engine offers.
    num_cached: leading tokens found in the prefix cache at the first admission. num_transferred: fetched.
    hold_as: a prefill, whose blocks are held under that id at its end.
    """

    request: EngineRequest
    seed: int
    arrival: int
    table: BlockTable
    tokens: bytearray
    output_ids: list[int]
    hold_as: TransferId | None = None
    num_fetchable: int = 0
    phase: Phase = Phase.WAITING
    num_computed: int = 0
    num_to_prefill: int = 0
    num_cached: int = 0
    num_transferred: int = 0
    admitted: bool = False

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // BYTES_PER_TOKEN

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    def token_ids(self, start: int, stop: int) -> list[int]:
        return unpack(TokenBuffer(bytes(self.tokens[start * BYTES_PER_TOKEN : stop * BYTES_PER_TOKEN])))


def _line_order(sequence: LiveSequence) -> tuple[int, int]:
    return (sequence.request.priority, sequence.arrival)


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens start .. start + num_tokens - 1 of a sequence. samples: the token after them is wanted."""

    sequence: LiveSequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(slots=True)
class Plan:
    """fetches: sequences that entered FETCHING; answer each with `fetched` or `fetch_failed`."""

    chunks: list[ScheduledChunk] = field(default_factory=list[ScheduledChunk])
    fetches: list[LiveSequence] = field(default_factory=list[LiveSequence])


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step did for one sequence: a token, the end of its output, or a prefill that is held now."""

    sequence: LiveSequence
    token_id: int | None
    finish_reason: FinishReason | None = None


class Scheduler:
    """Owns every sequence of an engine and the BlockManager's tables."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self._config = config
        self._blocks = blocks
        self._waiting: list[LiveSequence] = []
        self._fetching: list[LiveSequence] = []
        self._running: list[LiveSequence] = []
        self._held: dict[TransferId, LiveSequence] = {}
        self._by_id: dict[RequestId, LiveSequence] = {}
        self._num_arrivals = 0
        self._totals = _Totals()

    def check(self, request: EngineRequest) -> None:
        """Raises StatorError(INVALID_REQUEST) for a request that can never run here, naming the field and limit."""
        config = self._config
        validate(request, config.vocab_size, config.max_model_len, self._blocks.num_blocks, self._blocks.block_size)

    def finished_on_arrival(self, request: EngineRequest) -> FinishReason | None:
        """Set when resume_ids already are the whole output."""
        return resumed_finish(request, self._config.eos_token_ids)

    def add(
        self, request: EngineRequest, *, seed: int, hold_as: TransferId | None = None, num_fetchable: int = 0
    ) -> LiveSequence:
        """Put a checked request in line. Its id must not be in use (`get`)."""
        assert request.request_id not in self._by_id, "request id is in use"
        self._num_arrivals += 1
        sequence = LiveSequence(
            request=request,
            seed=seed,
            arrival=self._num_arrivals,
            table=self._blocks.new_table(request.lora_name, request.cache_salt),
            tokens=bytearray(request.prompt_ids + request.resume_ids),
            output_ids=unpack(request.resume_ids),
            hold_as=hold_as,
            num_fetchable=num_fetchable,
        )
        self._by_id[request.request_id] = sequence
        insort(self._waiting, sequence, key=_line_order)
        return sequence

    def get(self, request_id: RequestId) -> LiveSequence | None:
        return self._by_id.get(request_id)

    def plan(self) -> Plan:
        """Decide the next step and reserve its blocks. The plan must be applied before the next one is made."""
        plan = Plan()
        budget = self._config.max_num_batched_tokens
        num_preemptions = self._totals.preemptions
        budget -= self._plan_decodes(plan)
        budget -= self._plan_prefills(plan, budget)
        if self._totals.preemptions == num_preemptions:
            self._admit(plan, budget)
        return plan

    def apply(self, plan: Plan, sampled: Sequence[int | None]) -> list[StepOutcome]:
        """Take in what a runner computed for `plan`, in the order of its chunks."""
        self._totals.steps += 1
        outcomes: list[StepOutcome] = []
        for chunk, token_id in zip(plan.chunks, sampled, strict=True):
            sequence = chunk.sequence
            if sequence.phase is not Phase.RUNNING:
                continue
            self._advance(sequence, chunk)
            if token_id is not None:
                outcomes.append(self._append(sequence, token_id))
            elif sequence.hold_as is not None and not sequence.num_uncomputed:
                self._hold(sequence, sequence.hold_as)
                outcomes.append(StepOutcome(sequence, None))
        return outcomes

    def fetch_range(self, sequence: LiveSequence) -> range:
        """Indexes into the table of the blocks that a FETCHING sequence lacks. The last one may be partly filled."""
        num_wanted = min(sequence.num_fetchable, sequence.num_tokens - 1)
        return range(sequence.num_computed // self._blocks.block_size, self._blocks.blocks_for(num_wanted))

    def fetched(self, sequence: LiveSequence) -> None:
        """The blocks of `fetch_range` were filled. Ignored for a sequence that has ended."""
        if sequence.phase is not Phase.FETCHING:
            return
        num_tokens = min(sequence.num_fetchable, sequence.num_tokens - 1)
        sequence.num_transferred = num_tokens - sequence.num_computed
        self._totals.transferred += sequence.num_transferred
        sequence.num_computed = num_tokens
        self._blocks.commit(sequence.table, sequence.tokens, num_tokens)
        self._run_fetching(sequence)

    def fetch_failed(self, sequence: LiveSequence) -> None:
        """Its missing tokens are computed here instead. Ignored for a sequence that has ended."""
        if sequence.phase is Phase.FETCHING:
            self._run_fetching(sequence)

    def abort(self, request_id: RequestId) -> LiveSequence | None:
        """End it and free its blocks. None if the id is unknown, as that of a held prefill is."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._finish(sequence)
        return sequence

    def held_blocks(self, transfer_id: TransferId) -> Sequence[int] | None:
        """Block ids of a held prefill, in order."""
        sequence = self._held.get(transfer_id)
        return None if sequence is None else sequence.table.block_ids

    def release_held(self, transfer_id: TransferId) -> bool:
        sequence = self._held.pop(transfer_id, None)
        if sequence is None:
            return False
        sequence.phase = Phase.FINISHED
        self._blocks.release(sequence.table)
        return True

    def cached_prefix_tokens(self, request: EngineRequest) -> int:
        """Leading tokens that would not be computed, were the request admitted now."""
        if computes_whole_prompt(request.sampling):
            return 0
        tokens = request.prompt_ids + request.resume_ids
        table = self._blocks.new_table(request.lora_name, request.cache_salt)
        num_cached = len(self._blocks.lookup(table, tokens)) * self._blocks.block_size
        return max(0, min(num_cached, len(tokens) // BYTES_PER_TOKEN - 1))

    def load(self) -> EngineLoad:
        totals = self._totals
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + len(self._fetching),
            num_blocks=self._blocks.num_blocks,
            num_blocks_used=self._blocks.num_used,
            num_blocks_held=sum(len(sequence.table.block_ids) for sequence in self._held.values()),
            prompt_tokens_total=totals.prompt,
            prompt_tokens_cached_total=totals.cached,
            prompt_tokens_computed_total=totals.computed,
            prompt_tokens_transferred_total=totals.transferred,
            generation_tokens_total=totals.generated,
            preemptions_total=totals.preemptions,
            steps_total=totals.steps,
            num_fetching=len(self._fetching),
        )

    def _plan_decodes(self, plan: Plan) -> int:
        for sequence in [sequence for sequence in self._running if sequence.num_uncomputed == 1]:
            if sequence.phase is Phase.RUNNING and self._make_room(sequence, plan):
                plan.chunks.append(self._chunk(sequence, 1))
        return len(plan.chunks)

    def _plan_prefills(self, plan: Plan, budget: int) -> int:
        used = 0
        for sequence in self._running:
            count = min(sequence.num_uncomputed, budget - used)
            if sequence.num_uncomputed > 1 and count > 0:
                plan.chunks.append(self._chunk(sequence, count))
                used += count
        return used

    def _admit(self, plan: Plan, budget: int) -> None:
        config = self._config
        while budget > 0 and self._waiting and len(self._running) + len(self._fetching) < config.max_num_seqs:
            sequence = self._waiting[0]
            busy = bool(self._running or self._fetching)
            reserve = max(1, self._blocks.num_blocks // RESERVE_DIVISOR) if busy else 0
            num_cached = self._blocks.acquire(
                sequence.table,
                sequence.tokens,
                sequence.num_tokens,
                reserve=reserve,
                look_up=not computes_whole_prompt(sequence.request.sampling),
            )
            if num_cached is None:
                return
            del self._waiting[0]
            self._start(sequence, num_cached * self._blocks.block_size)
            if sequence.phase is Phase.FETCHING:
                plan.fetches.append(sequence)
            else:
                count = min(sequence.num_uncomputed, budget)
                plan.chunks.append(self._chunk(sequence, count))
                budget -= count

    def _start(self, sequence: LiveSequence, num_cached: int) -> None:
        sequence.num_computed = min(num_cached, sequence.num_tokens - 1)
        sequence.num_to_prefill = sequence.num_tokens
        if not sequence.admitted:
            sequence.admitted = True
            sequence.num_cached = sequence.num_computed
            self._totals.prompt += sequence.num_tokens
            self._totals.cached += sequence.num_cached
        if min(sequence.num_fetchable, sequence.num_tokens - 1) > sequence.num_computed:
            sequence.phase = Phase.FETCHING
            self._fetching.append(sequence)
        else:
            self._set_running(sequence)

    def _run_fetching(self, sequence: LiveSequence) -> None:
        self._fetching.remove(sequence)
        self._set_running(sequence)

    def _set_running(self, sequence: LiveSequence) -> None:
        # A transfer is used at the first admission or never: later the peer may have been told to release it.
        sequence.num_fetchable = 0
        sequence.phase = Phase.RUNNING
        insort(self._running, sequence, key=_line_order)

    def _chunk(self, sequence: LiveSequence, count: int) -> ScheduledChunk:
        reaches_end = sequence.num_uncomputed == count
        return ScheduledChunk(sequence, sequence.num_computed, count, reaches_end and sequence.hold_as is None)

    def _make_room(self, sequence: LiveSequence, plan: Plan) -> bool:
        """Get the block that the next token needs, from those last in line if must be. False if it was preempted."""
        while not self._blocks.grow(sequence.table, sequence.num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            plan.chunks[:] = [chunk for chunk in plan.chunks if chunk.sequence is not victim]
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: LiveSequence) -> None:
        self._running.remove(sequence)
        self._blocks.release(sequence.table)
        sequence.num_computed = 0
        sequence.phase = Phase.WAITING
        insort(self._waiting, sequence, key=_line_order)
        self._totals.preemptions += 1

    def _advance(self, sequence: LiveSequence, chunk: ScheduledChunk) -> None:
        self._totals.computed += max(0, min(chunk.start + chunk.num_tokens, sequence.num_to_prefill) - chunk.start)
        sequence.num_computed = chunk.start + chunk.num_tokens
        self._blocks.commit(sequence.table, sequence.tokens, sequence.num_computed)

    def _append(self, sequence: LiveSequence, token_id: int) -> StepOutcome:
        sequence.tokens += token_id.to_bytes(BYTES_PER_TOKEN, "little")
        sequence.output_ids.append(token_id)
        self._totals.generated += 1
        reason = stop_reason(sequence.request.sampling, sequence.output_ids, self._config.eos_token_ids)
        if reason is None and sequence.num_tokens >= self._config.max_model_len:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._finish(sequence)
        return StepOutcome(sequence, token_id, reason)

    def _hold(self, sequence: LiveSequence, transfer_id: TransferId) -> None:
        self._running.remove(sequence)
        del self._by_id[sequence.request_id]
        sequence.phase = Phase.HELD
        self._held[transfer_id] = sequence

    def _finish(self, sequence: LiveSequence) -> None:
        line = {Phase.WAITING: self._waiting, Phase.FETCHING: self._fetching, Phase.RUNNING: self._running}
        line[sequence.phase].remove(sequence)
        del self._by_id[sequence.request_id]
        sequence.phase = Phase.FINISHED
        self._blocks.release(sequence.table)


@dataclass(slots=True)
class _Totals:
    """The counters of EngineLoad, which says what each counts. Prompt tokens include resumed ones."""

    prompt: int = 0
    cached: int = 0
    computed: int = 0
    transferred: int = 0
    generated: int = 0
    preemptions: int = 0
    steps: int = 0
