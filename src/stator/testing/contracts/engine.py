"""What every engine must do (engines.base). Subclass `EngineContract` in a test module and give it an engine.

The suite compares texts, so an engine under it must be deterministic: the same request gives the same token ids in
any batch, after preemption or resumption, and whether its prompt was computed here, cached, or transferred.
"""

import asyncio
import threading
from typing import Any

from stator.core.hashing import block_hashes
from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.messages.engine import EngineRequest, FinishReason
from stator.messages.tokens import pack
from stator.testing.contracts.engine_embeddings import EngineEmbeddingsContract
from stator.testing.contracts.engine_scores import EngineScoresContract
from stator.testing.contracts.engine_suite import EngineSettings, make_request, with_transfer
from stator.testing.contracts.engine_transfer import EngineTransferContract
from stator.testing.engine_bench import BenchEngine, KvMirror, RecordingSink, until


class EngineContract(EngineTransferContract, EngineScoresContract, EngineEmbeddingsContract):
    """Everything an engine must do; `EngineSuite` says what a subclass gives."""

    def test_info_describes_the_engine(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            assert (one.info.block_size, one.info.num_blocks) == (self.block_size, 64)
            assert one.info.pairing == two.info.pairing
            assert {"block_size", "kv_dtype", "model", "engine", "connector"} <= set(one.info.pairing)

        self.run(scenario)

    def test_the_same_request_twice_gives_the_same_text_and_hits_the_cache(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            length = 3 * self.block_size + 1
            first = await one.generate(make_request("a", self.prompt(length))).wait()
            again = make_request("b", self.prompt(length))
            await self.settle(one.engine)
            assert one.engine.cached_prefix_tokens(again) == length - 1
            second = await one.generate(again).wait()
            assert len(first.token_ids) == 12
            assert second.token_ids == first.token_ids
            assert (first.num_cached, second.num_cached) == (0, length - 1)
            assert first.finish_reason is FinishReason.LENGTH
            elsewhere = await two.text(make_request("c", self.prompt(length)))
            assert elsewhere == first.token_ids

        self.run(scenario)

    def test_a_fully_cached_prompt(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            length = 2 * self.block_size
            first = await one.text(make_request("a", self.prompt(length)))
            again = await one.generate(make_request("b", self.prompt(length))).wait()
            assert again.token_ids == first
            assert length - self.block_size <= again.num_cached < length

        self.run(scenario)

    def test_a_salt_separates_tenants(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            length = 2 * self.block_size + 1
            first = await one.text(make_request("a", self.prompt(length), salt="a"))
            other = await one.generate(make_request("b", self.prompt(length), salt="b")).wait()
            assert (other.num_cached, other.token_ids) == (0, first)

        self.run(scenario)

    def test_a_batch_gives_each_request_the_text_it_has_alone(self) -> None:
        lengths = [1, self.block_size, self.block_size + 1, 2 * self.block_size + 3, 5, 70, 2, 3 * self.block_size]
        requests = [make_request(str(index), self.prompt(n, index)) for index, n in enumerate(lengths)]

        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            alone = [await one.text(request) for request in requests]
            batch = [two.generate(request) for request in requests]
            assert [(await sink.wait()).token_ids for sink in batch] == alone

        self.run(scenario)

    def test_more_than_the_memory_holds_completes_with_the_same_text(self) -> None:
        requests = [
            make_request(
                str(index), self.prompt(2 * self.block_size + index % 3, index % 4), max_tokens=2 * self.block_size
            )
            for index in range(8)
        ]

        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            alone = [await one.text(request) for request in requests[:4]]
            batch = [two.generate(request) for request in requests]
            texts = [(await sink.wait()).token_ids for sink in batch]
            assert texts[:4] == alone
            assert two.engine.load().preemptions_total > 0

        self.run(scenario, EngineSettings(num_blocks=10))

    def test_resuming_at_every_point_equals_an_undisturbed_run(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            prompt = self.prompt(self.block_size - 2)
            penalties = {"frequency_penalty": 0.5, "presence_penalty": 0.5}
            samplings: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 7}, penalties]
            # A request with what the engine says it cannot resume is not sent on.
            resumable = [each for each in samplings if not set(one.info.cannot_resume).intersection(each)]
            assert resumable
            for sampling in resumable:
                whole = await one.text(make_request("whole", prompt, **sampling))
                sinks = [two.generate(make_request(f"{cut}", prompt, whole[:cut], **sampling)) for cut in range(13)]
                for cut, sink in enumerate(sinks):
                    await sink.wait()
                    assert whole[:cut] + sink.token_ids == whole
                    assert sink.finish_reason is FinishReason.LENGTH
                    assert sink.num_cached <= len(prompt)

        self.run(scenario)

    def test_sampling_with_a_seed_is_repeatable_and_without_one_varies(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            prompt = self.prompt(9)
            seeded = [await each.text(make_request("s", prompt, temperature=1.0, seed=3)) for each in (one, two)]
            assert seeded[0] == seeded[1]
            free = [await one.text(make_request(str(n), prompt, temperature=2.0)) for n in range(3)]
            assert len({tuple(text) for text in free}) > 1

        self.run(scenario)

    def test_where_output_ends(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            prompt = self.prompt(6)
            whole = await one.text(make_request("whole", prompt))
            for max_tokens in (1, 5):
                cut = await one.generate(make_request("m", prompt, max_tokens=max_tokens)).wait()
                assert (cut.token_ids, cut.finish_reason) == (whole[:max_tokens], FinishReason.LENGTH)
            stop = whole[4]
            end = whole.index(stop) + 1
            stopped = await one.generate(make_request("s", prompt, stop_token_ids=(stop,))).wait()
            assert (stopped.token_ids, stopped.finish_reason) == (whole[:end], FinishReason.STOP)
            late = await one.generate(make_request("l", prompt, stop_token_ids=(stop,), min_tokens=8)).wait()
            assert stop not in late.token_ids[:8]
            assert len(late.token_ids) > 8

        self.run(scenario)

    def test_invalid_requests_end_their_sink_and_are_not_raised(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            limit = one.info.max_model_len
            cases: list[tuple[EngineRequest, list[str]]] = [
                (make_request("empty", []), []),
                (make_request("long", self.prompt(limit), max_tokens=9), [str(limit), "9", str(limit + 9)]),
                (make_request("none", [5], max_tokens=0), ["0"]),
                (make_request("vocab", [self.vocab_size + 100_000]), [str(self.vocab_size + 100_000)]),
            ]
            for request, numbers in cases:
                for start in (one.engine.generate, one.engine.prefill):
                    sink = RecordingSink()
                    start(request, sink)
                    assert not sink.ended.is_set(), "ended from inside the call"
                    error = await sink.wait_error()
                    assert error.code is ErrorCode.INVALID_REQUEST
                    assert [number for number in numbers if number not in error.message] == []
            running = one.generate(make_request("twice", self.prompt(5)))
            assert (await one.generate(make_request("twice", [5])).wait_error()).code is ErrorCode.INVALID_REQUEST
            assert len((await running.wait()).token_ids) == 12

        self.run(scenario)

    def test_all_sequences_of_a_step_are_pushed_in_one_callback(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            loop = asyncio.get_running_loop()
            turns: list[int] = [0]
            pushes: dict[str, list[int]] = {"a": [], "b": []}

            def record(name: str) -> None:
                pushes[name].append(turns[0])
                loop.call_soon(next_turn)

            def next_turn() -> None:
                turns[0] += 1

            sinks = [RecordingSink(lambda: record("a")), RecordingSink(lambda: record("b"))]
            for name, sink in zip("ab", sinks, strict=True):
                one.engine.generate(make_request(name, self.prompt(5, ord(name))), sink)
            for sink in sinks:
                await sink.wait()
            assert (len(pushes["a"]), len(pushes["b"])) == (12, 12)
            # An engine elsewhere may have begun with the first when it hears of the second.
            num_steps_alone = 2 if self.computes_apart else 0
            assert len(set(pushes["a"]).intersection(pushes["b"])) >= 12 - num_steps_alone

        self.run(scenario)

    def test_abort_while_waiting_computing_or_decoding_frees_all_blocks(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            # The second waits behind the first: there is room for one sequence.
            decoding = one.generate(make_request("d", self.prompt(4), max_tokens=8 * self.block_size))
            waiting = one.generate(make_request("w", self.prompt(40, 2)))
            await asyncio.wait_for(decoding.started.wait(), self.scenario_s)
            one.engine.abort(RequestId("w"))
            one.engine.abort(RequestId("d"))
            one.engine.abort(RequestId("d"))
            one.engine.abort(RequestId("unknown"))
            await self.until_freed(one)
            num_items = len(decoding.received)
            for sink in (waiting, decoding):
                assert (await sink.wait_error()).code is ErrorCode.CANCELLED
            # Two more steps have been computed when this has its tokens: nothing came after the end.
            again = await one.text(make_request("d", self.prompt(4), max_tokens=2))
            assert (len(again), len(decoding.received)) == (2, num_items)
            prefilling = RecordingSink()
            one.engine.prefill(make_request("p", self.prompt(20 * self.block_size, 3)), prefilling)
            await until(lambda: one.engine.load().num_running == 1)
            if not self.computes_apart:
                assert one.engine.load().num_blocks_used >= 20
            one.engine.abort(RequestId("p"))
            assert (await prefilling.wait_error()).code is ErrorCode.CANCELLED

        self.run(scenario, EngineSettings(max_num_seqs=1, max_num_batched_tokens=1))

    def test_a_sink_may_abort_others_of_its_step(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            sink = RecordingSink(lambda: one.engine.abort(RequestId("b")))
            one.engine.generate(make_request("a", self.prompt(5, 1)), sink)
            other = one.generate(make_request("b", self.prompt(5, 2), max_tokens=40))
            assert (await other.wait_error()).code is ErrorCode.CANCELLED
            assert len((await sink.wait()).token_ids) == 12

        self.run(scenario)

    def test_kv_events_replayed_equal_the_state(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            early, mirror = KvMirror(), KvMirror()
            unwatch = one.engine.watch_kv(early)
            length = 3 * self.block_size
            await one.text(make_request("first", self.prompt(length)))
            await self.settle(one.engine)
            named = block_hashes(pack(self.prompt(length)), self.block_size, model=one.info.model)
            assert set(named) <= early.hashes
            one.engine.watch_kv(mirror)
            assert mirror.hashes == early.hashes, "a late listener begins with the whole state"
            sinks = [one.generate(make_request(str(n), self.prompt(length, n))) for n in range(6)]
            for sink in sinks:
                await sink.wait()
            await self.settle(one.engine)
            late = KvMirror()
            one.engine.watch_kv(late)
            assert mirror.num_removed > 0, "the scenario is meant to evict"
            assert late.hashes == mirror.hashes == early.hashes
            for n in range(6):
                request = make_request("probe", self.prompt(length, n))
                chain = block_hashes(request.prompt_ids, self.block_size, model=one.info.model)
                num_known = next((i for i, name in enumerate(chain) if name not in late.hashes), len(chain))
                expected = self.usable(num_known * self.block_size, length)
                assert one.engine.cached_prefix_tokens(request) == expected
            unwatch()
            assert await one.engine.reset_prefix_cache()
            assert (mirror.hashes, late.hashes) == (set(), set())
            assert early.hashes, "unwatched"

        self.run(scenario, EngineSettings(num_blocks=12))

    def test_reset_prefix_cache(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            request = make_request("r", self.prompt(2 * self.block_size + 1))
            expected = await one.text(request)
            result = await one.prefill(request)
            assert not await one.engine.reset_prefix_cache(), "held blocks stay cached"
            await self.settle(one.engine)
            assert one.engine.cached_prefix_tokens(request) == 2 * self.block_size
            one.engine.release(TransferId(result.transfer["transfer_id"]))
            await self.until_freed(one)
            assert await one.engine.reset_prefix_cache()
            again = await one.generate(request).wait()
            assert (again.num_cached, again.token_ids) == (0, expected)

        self.run(scenario)

    def test_load_counters_add_up(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            before = one.engine.load()
            lengths = [5, 2 * self.block_size, 2 * self.block_size, 3 * self.block_size + 1]
            for index, length in enumerate(lengths):
                request = make_request(str(index), self.prompt(length))
                result = await two.prefill(request) if index == 3 else None
                transferred = with_transfer(request, result.transfer) if result is not None else request
                await one.text(transferred)
            load = one.engine.load()
            assert load.prompt_tokens_total - before.prompt_tokens_total == sum(lengths)
            assert load.generation_tokens_total - before.generation_tokens_total == 12 * len(lengths)
            parts = (
                load.prompt_tokens_cached_total - before.prompt_tokens_cached_total,
                load.prompt_tokens_computed_total - before.prompt_tokens_computed_total,
                load.prompt_tokens_transferred_total - before.prompt_tokens_transferred_total,
            )
            assert sum(parts) == sum(lengths)
            assert min(parts) > 0
            assert load.steps_total > before.steps_total
            assert load.num_blocks == one.info.num_blocks

        self.run(scenario)

    def test_stop_ends_every_stream_and_leaves_nothing(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            held = await one.prefill(make_request("h", self.prompt(5)))
            request = make_request("d", self.prompt(5), max_tokens=8 * self.block_size)
            decoding = two.generate(request)
            waiting = two.generate(make_request("w", self.prompt(5, 2)))
            await asyncio.wait_for(decoding.started.wait(), self.scenario_s)
            await asyncio.gather(two.engine.stop(), two.engine.stop())
            await two.engine.stop()
            for sink in (decoding, waiting):
                assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
            late: StatorError = await two.generate(make_request("late", [5])).wait_error()
            assert late.code is ErrorCode.ENGINE_DEAD
            two.engine.abort(RequestId("d"))
            assert held.transfer
            await one.engine.stop()
            await self.until_freed(one)
            assert one.host.dead == two.host.dead == [], "a stop is no death"

        before = set(threading.enumerate())
        self.run(scenario, ends_engines=True)
        assert set(threading.enumerate()) <= before
