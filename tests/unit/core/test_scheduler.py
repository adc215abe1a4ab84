"""The scheduler, driven step by step with the runner that checks block contents."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.core.blocks import BlockManager
from stator.core.scheduler import LiveSequence, Phase, Plan, Scheduler, SchedulerConfig
from stator.engines.local.runner import Chunk, SampleSpec
from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.messages.engine import EngineRequest, FinishReason, SamplingParams
from stator.messages.tokens import pack
from stator.testing.fake_runner import FakeRunner

SIZE = 4


def request(name: str, prompt: list[int], resume: list[int] | None = None, **fields: Any) -> EngineRequest:
    own = {key: fields.pop(key) for key in ("priority", "cache_salt", "transfer") if key in fields}
    sampling = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, **fields})
    return EngineRequest(RequestId(name), pack(prompt), sampling, resume_ids=pack(resume or []), **own)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10, 900), k=length)


@dataclass
class Bench:
    """A scheduler with its blocks and a runner; `step` is what the engine does."""

    num_blocks: int = 32
    max_num_seqs: int = 4
    budget: int = 16
    caching: bool = True
    runner: FakeRunner = field(init=False)
    texts: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    reasons: dict[str, FinishReason] = field(default_factory=dict[str, FinishReason])

    def __post_init__(self) -> None:
        self.runner = FakeRunner(block_size=SIZE, num_blocks=self.num_blocks)
        self.blocks = BlockManager(self.num_blocks, SIZE, model="m", enable_prefix_caching=self.caching)
        config = SchedulerConfig(self.max_num_seqs, self.budget, 128, 1000, frozenset({2}))
        self.scheduler = Scheduler(config, self.blocks)

    def add(self, name: str, token_ids: list[int], resume: list[int] | None = None, **options: Any) -> LiveSequence:
        how = {key: options.pop(key) for key in ("hold_as", "num_fetchable") if key in options}
        made = request(name, token_ids, resume, **options)
        self.scheduler.check(made)
        self.texts[name] = []
        return self.scheduler.add(made, seed=1, **how)

    def compute(self, plan: Plan) -> list[int | None]:
        assert sum(chunk.num_tokens for chunk in plan.chunks) <= self.budget
        chunks: list[Chunk] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            ids = sequence.token_ids(chunk.start, chunk.start + chunk.num_tokens)
            params, output = sequence.request.sampling, len(sequence.output_ids)
            spec = SampleSpec(params, sequence.seed, sequence.num_tokens, output) if chunk.samples else None
            chunks.append(Chunk(list(sequence.table.block_ids), ids, chunk.start, spec))
        return self.runner.step(chunks)

    def finish(self, plan: Plan, sampled: list[int | None]) -> None:
        for outcome in self.scheduler.apply(plan, sampled):
            name = outcome.sequence.request_id
            if outcome.token_id is not None:
                self.texts[name].append(outcome.token_id)
            if outcome.finish_reason is not None:
                self.reasons[name] = outcome.finish_reason

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        if plan.chunks:
            self.finish(plan, self.compute(plan))
        return plan

    def run(self, max_steps: int = 2000) -> None:
        """Until nothing is left to compute; a line that does not move is a failure."""
        for _ in range(max_steps):
            if not self.step().chunks:
                return
        raise AssertionError(f"still running after {max_steps} steps: {self.scheduler.load()}")


def alone(token_ids: list[int], **fields: Any) -> list[int]:
    bench = Bench()
    bench.add("x", token_ids, **fields)
    bench.run()
    return bench.texts["x"]


def chunks_of(plan: Plan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    bench = Bench(budget=16)
    bench.add("a", prompt(40))
    assert [chunks_of(bench.step()) for _ in range(4)] == [
        [("a", 0, 16)],
        [("a", 16, 16)],
        [("a", 32, 8)],
        [("a", 40, 1)],
    ]


def test_decodes_come_first_then_prefills_then_newcomers() -> None:
    bench = Bench(budget=8)
    bench.add("a", prompt(4, 1), max_tokens=20)
    bench.step()
    bench.add("b", prompt(12, 2))
    bench.add("c", prompt(12, 3))
    assert chunks_of(bench.step()) == [("a", 4, 1), ("b", 0, 7)]
    assert chunks_of(bench.step()) == [("a", 5, 1), ("b", 7, 5), ("c", 0, 2)]
    assert chunks_of(bench.step()) == [("a", 6, 1), ("b", 12, 1), ("c", 2, 6)]


def test_priority_goes_before_arrival_and_the_line_is_not_overtaken() -> None:
    bench = Bench(num_blocks=8, max_num_seqs=1)
    for name, priority in (("late", 5), ("first", 0), ("urgent", -1), ("second", 0)):
        bench.add(name, prompt(4), priority=priority, max_tokens=1)
    order: list[str] = []
    while plan := chunks_of(bench.step()):
        order += [name for name, _, _ in plan]
    assert order == ["urgent", "first", "second", "late"]


def test_a_short_request_waits_behind_a_long_one_that_has_no_room() -> None:
    bench = Bench(num_blocks=8)
    bench.add("running", prompt(20, 1), max_tokens=2)
    bench.step()
    bench.add("long", prompt(16, 2))
    bench.add("short", prompt(1, 3))
    bench.step()
    assert bench.scheduler.load().num_waiting == 2
    bench.run()
    assert set(bench.reasons) == {"running", "long", "short"}


def test_a_fully_cached_prompt_computes_its_last_token_only() -> None:
    bench = Bench()
    bench.add("a", prompt(16))
    bench.run()
    again = bench.add("b", prompt(16))
    assert chunks_of(bench.step()) == [("b", 15, 1)]
    bench.run()
    assert bench.texts["a"] == bench.texts["b"]
    assert again.num_cached == 15
    load = bench.scheduler.load()
    assert (load.prompt_tokens_total, load.prompt_tokens_cached_total, load.prompt_tokens_computed_total) == (
        32,
        15,
        17,
    )


def test_the_last_in_line_is_preempted_and_computed_again() -> None:
    bench = Bench(num_blocks=8)
    for index, name in enumerate(("a", "b")):
        bench.add(name, prompt(11, index), max_tokens=16)
    bench.run()
    load = bench.scheduler.load()
    assert load.preemptions_total > 0
    assert load.num_blocks_used == 0
    assert bench.texts == {"a": alone(prompt(11, 0), max_tokens=16), "b": alone(prompt(11, 1), max_tokens=16)}
    assert load.prompt_tokens_total == 22, "counted once, not at every admission"
    assert load.generation_tokens_total == 32


def test_resumed_output_is_computed_as_prompt_and_counted_as_output() -> None:
    whole = alone(prompt(9), max_tokens=8)
    for cut in range(1, 8):
        bench = Bench()
        bench.add("x", prompt(9), whole[:cut], max_tokens=8)
        bench.run()
        assert whole[:cut] + bench.texts["x"] == whole
        assert bench.scheduler.load().generation_tokens_total == 8 - cut
        assert bench.scheduler.load().prompt_tokens_total == 9 + cut


def test_output_that_was_complete_on_arrival() -> None:
    bench = Bench()
    complete = request("x", [5], [7, 8, 9, 10], max_tokens=4)
    assert bench.scheduler.finished_on_arrival(complete) is FinishReason.LENGTH
    stopped = request("x", [5], [7, 2], max_tokens=4, ignore_eos=False)
    assert bench.scheduler.finished_on_arrival(stopped) is FinishReason.STOP
    assert bench.scheduler.finished_on_arrival(request("x", [5], [7, 2], max_tokens=4)) is None
    assert bench.scheduler.finished_on_arrival(request("x", [2], ignore_eos=False)) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (3, FinishReason.STOP)),
        ({"ignore_eos": True}, (10, FinishReason.LENGTH)),
        ({"min_tokens": 3}, (10, FinishReason.LENGTH)),
        ({"min_tokens": 2}, (3, FinishReason.STOP)),
        ({"stop_token_ids": (6,), "ignore_eos": True}, (2, FinishReason.STOP)),
        ({"stop_token_ids": (6,), "min_tokens": 2}, (3, FinishReason.STOP)),
        ({"max_tokens": 3}, (3, FinishReason.STOP)),
        ({"max_tokens": 2}, (2, FinishReason.LENGTH)),
    ],
)
def test_where_output_ends(fields: dict[str, Any], expected: tuple[int, FinishReason]) -> None:
    """The sampled tokens are 5, 6, then eos (2), then 7 for ever; a sampler would bar stops before min_tokens."""
    bench = Bench()
    bench.add("x", [3, 4], **{"max_tokens": 10, "ignore_eos": False, **fields})
    for token_id in [5, 6, 2, *[7] * 7]:
        bench.finish(bench.scheduler.plan(), [token_id])
        if bench.reasons:
            break
    assert (len(bench.texts["x"]), bench.reasons["x"]) == expected


def test_a_token_sampled_for_an_aborted_sequence_is_dropped() -> None:
    bench = Bench()
    bench.add("a", prompt(5, 1))
    bench.add("b", prompt(5, 2))
    plan = bench.scheduler.plan()
    sampled = bench.compute(plan)
    bench.scheduler.abort(RequestId("a"))
    bench.add("a", prompt(5, 3))
    bench.finish(plan, sampled)
    assert (bench.texts["a"], len(bench.texts["b"])) == ([], 1)
    bench.run()
    assert bench.texts["a"] == alone(prompt(5, 3))


@pytest.mark.parametrize("phase", list(Phase)[:3])
def test_abort_in_any_phase_frees_everything(phase: Phase) -> None:
    bench = Bench(max_num_seqs=1)
    if phase is Phase.WAITING:
        bench.add("other", prompt(4), max_tokens=1)
    sequence = bench.add("x", prompt(9, 1), num_fetchable=9 if phase is Phase.FETCHING else 0)
    bench.step()
    assert sequence.phase is phase or phase is Phase.WAITING
    assert bench.scheduler.abort(RequestId("x")) is sequence
    assert bench.scheduler.abort(RequestId("x")) is None
    bench.scheduler.fetched(sequence)
    bench.scheduler.fetch_failed(sequence)
    bench.run()
    load = bench.scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_blocks_used) == (0, 0, 0)


def test_a_prefill_holds_its_blocks_until_released() -> None:
    bench = Bench()
    held = TransferId("t")
    sequence = bench.add("x", prompt(18), hold_as=held)
    bench.run()
    assert sequence.phase is Phase.HELD
    assert bench.texts["x"] == []
    load = bench.scheduler.load()
    assert (load.num_blocks_used, load.num_blocks_held, load.num_running) == (5, 5, 0)
    assert bench.scheduler.abort(RequestId("x")) is None, "the request is over, the transfer id lives on"
    assert len(bench.scheduler.held_blocks(held) or ()) == 5
    assert bench.scheduler.release_held(held)
    assert not bench.scheduler.release_held(held)
    assert bench.scheduler.load().num_blocks_used == 0


def test_transferred_blocks_are_used_and_only_the_last_token_is_computed() -> None:
    source, bench = Bench(), Bench()
    source.add("x", prompt(18), hold_as=TransferId("t"))
    source.run()
    sequence = bench.add("x", prompt(18), num_fetchable=18)
    plan = bench.step()
    assert (plan.chunks, plan.fetches) == ([], [sequence])
    assert bench.step().fetches == [], "asked once"
    held = source.scheduler.held_blocks(TransferId("t")) or ()
    for index in bench.scheduler.fetch_range(sequence):
        bench.runner.import_block(sequence.table.block_ids[index], source.runner.export_block(held[index]))
    bench.scheduler.fetched(sequence)
    assert chunks_of(bench.step()) == [("x", 17, 1)]
    bench.run()
    assert bench.texts["x"] == alone(prompt(18))
    load = bench.scheduler.load()
    assert (load.prompt_tokens_transferred_total, load.prompt_tokens_computed_total) == (17, 1)


def test_only_what_the_own_cache_lacks_is_fetched() -> None:
    bench = Bench()
    bench.add("warm", prompt(18)[:9], max_tokens=1)
    bench.run()
    sequence = bench.add("x", prompt(18), num_fetchable=18)
    bench.step()
    assert bench.scheduler.fetch_range(sequence) == range(2, 5)
    bench.scheduler.fetch_failed(sequence)
    assert chunks_of(bench.step()) == [("x", 8, 10)]
    bench.run()
    assert bench.texts["x"] == alone(prompt(18))
    assert bench.scheduler.load().prompt_tokens_transferred_total == 0


def test_nothing_is_fetched_when_only_the_last_token_is_missing() -> None:
    bench = Bench()
    bench.add("warm", prompt(9), max_tokens=1)
    bench.run()
    sequence = bench.add("x", prompt(9), num_fetchable=9)
    plan = bench.step()
    assert (plan.fetches, chunks_of(plan)) == ([], [("x", 8, 1)])
    assert sequence.num_fetchable == 0, "nor after a preemption, when the peer's blocks may be gone"


def test_a_sequence_preempted_after_its_fetch_is_computed_here() -> None:
    bench = Bench(num_blocks=8)
    bench.add("old", prompt(11, 1), max_tokens=20)
    bench.step()
    sequence = bench.add("x", prompt(11, 2), max_tokens=12, num_fetchable=11)
    bench.step()
    source = Bench()
    source.add("x", prompt(11, 2), hold_as=TransferId("t"))
    source.run()
    held = source.scheduler.held_blocks(TransferId("t")) or ()
    for index in bench.scheduler.fetch_range(sequence):
        bench.runner.import_block(sequence.table.block_ids[index], source.runner.export_block(held[index]))
    bench.scheduler.fetched(sequence)
    bench.run()
    assert bench.scheduler.load().preemptions_total > 0
    assert bench.texts["x"] == alone(prompt(11, 2), max_tokens=12)


def test_cached_blocks_are_evicted_for_the_head_of_the_line() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", prompt(20, 1), max_tokens=2)
    bench.run()
    assert bench.blocks.num_cached == 5
    bench.add("b", prompt(21, 2), max_tokens=4)
    bench.run()
    assert bench.reasons["b"] is FinishReason.LENGTH


def test_a_line_held_up_by_held_blocks_moves_when_they_are_released() -> None:
    bench = Bench(num_blocks=6)
    bench.add("p", prompt(16, 1), hold_as=TransferId("t"))
    bench.run()
    bench.add("x", prompt(12, 2))
    bench.run()
    assert bench.scheduler.load().num_waiting == 1
    bench.scheduler.release_held(TransferId("t"))
    bench.run()
    assert len(bench.texts["x"]) == 4


def test_a_sequence_alone_that_cannot_grow_waits_for_held_blocks() -> None:
    bench = Bench(num_blocks=6)
    bench.add("x", prompt(4, 2), max_tokens=16)
    bench.step()
    bench.add("p", prompt(12, 1), hold_as=TransferId("t"))
    bench.run()
    assert bench.scheduler.load().num_waiting == 1
    bench.scheduler.release_held(TransferId("t"))
    bench.run()
    assert bench.texts["x"] == alone(prompt(4, 2), max_tokens=16)


@pytest.mark.parametrize(
    ("made", "param", "numbers"),
    [
        (request("x", []), "prompt_ids", []),
        (request("x", [5], max_tokens=0), "max_tokens", ["0"]),
        (request("x", prompt(100), max_tokens=40), "max_tokens", ["100", "40", "140", "128"]),
        (request("x", prompt(60), max_tokens=30), "max_tokens", ["60", "30", "23", "20"]),
        (request("x", [5, 1000]), "prompt_ids", ["1000"]),
        (request("x", [5], [7] * 5, max_tokens=4), "resume_ids", ["5", "4"]),
        (request("x", [5], temperature=float("nan")), "temperature", []),
        (request("x", [5], top_p=0.0), "top_p", []),
        (request("x", [5], min_tokens=9), "min_tokens", ["9"]),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_the_numbers(
    made: EngineRequest, param: str, numbers: list[str]
) -> None:
    with pytest.raises(StatorError) as caught:
        Bench(num_blocks=20).scheduler.check(made)
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, param)
    assert [number for number in numbers if number not in caught.value.message] == []


def test_a_budget_below_the_number_of_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match=r"16.*32"):
        SchedulerConfig(32, 16, 128, 1000)


REQUESTS = st.lists(
    st.tuples(st.integers(1, 24), st.integers(0, 3), st.integers(1, 16), st.integers(-1, 1)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(10, 24),
    budget=st.integers(4, 40),
    caching=st.booleans(),
    data=st.data(),
)
def test_any_load_completes_with_the_text_of_each_request_alone(
    requests: list[tuple[int, int, int, int]], num_blocks: int, budget: int, caching: bool, data: st.DataObject
) -> None:
    """Larger than memory, with shared prefixes, aborts and failing fetches in between."""
    bench = Bench(num_blocks=num_blocks, budget=budget, caching=caching)
    expected: dict[str, list[int]] = {}
    for index, (length, seed, max_tokens, priority) in enumerate(requests):
        fetchable = data.draw(st.sampled_from([0, 0, length]))
        bench.add(str(index), prompt(length, seed), max_tokens=max_tokens, priority=priority, num_fetchable=fetchable)
        expected[str(index)] = alone(prompt(length, seed), max_tokens=max_tokens)
    for _ in range(3000):
        plan = bench.scheduler.plan()
        sampled = bench.compute(plan) if plan.chunks else []
        for sequence in plan.fetches:
            bench.scheduler.fetch_failed(sequence)
        if plan.chunks and data.draw(st.integers(0, 15)) == 0:
            name = data.draw(st.sampled_from(sorted(expected)))
            if bench.scheduler.abort(RequestId(name)):
                del expected[name]
        if not plan.chunks and not plan.fetches:
            break
        bench.finish(plan, sampled)
        if not expected:
            break
    bench.run()
    assert {name: bench.texts[name] for name in expected} == expected
    load = bench.scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_blocks_used) == (0, 0, 0)
