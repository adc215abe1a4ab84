"""What every engine must do (engines.base). Subclass `EngineContract` in a test module and give it an engine.

The suite compares texts, so an engine under it must be deterministic: the same request gives the same token ids in
any batch, after preemption or resumption, and whether its prompt was computed here, cached, or transferred.
"""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from stator.core.hashing import block_hashes
from stator.engines.base import Engine
from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.messages.engine import EngineRequest, FinishReason, SamplingParams
from stator.messages.tokens import EMPTY, pack
from stator.testing.engine_bench import BenchEngine, KvMirror, RecordingSink, running_engines, until

SCENARIO_S = 50.0


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


class EngineContract:
    """block_size: of the engines that make_engine makes. vocab_size: prompts are drawn from 4 to there.

    tcp: whether the engines reach each other over sockets.
    """

    block_size: int
    vocab_size: int
    tcp: bool = False

    def make_engine(self, settings: EngineSettings) -> Engine:
        """An engine with exactly that many blocks, prefix caching, and a context of at least 24 blocks of tokens."""
        raise NotImplementedError

    def prompt(self, num_tokens: int, seed: int = 0) -> list[int]:
        return random.Random(seed).choices(range(4, self.vocab_size), k=num_tokens)

    def run(self, scenario: Scenario, settings: EngineSettings | None = None) -> None:
        """Run a scenario on two engines that reach each other; afterwards neither may use a block."""
        chosen = settings or EngineSettings()

        async def main() -> None:
            async with running_engines(self.make_engine(chosen), self.make_engine(chosen), tcp=self.tcp) as (one, two):
                await scenario(one, two)
                await one.until_idle()
                await two.until_idle()

        async def bounded() -> None:
            await asyncio.wait_for(main(), SCENARIO_S)

        asyncio.run(bounded())

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
            for sampling in samplings:
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
            assert pushes["a"] == pushes["b"]
            assert len(pushes["a"]) == 12

        self.run(scenario)

    def test_abort_while_waiting_computing_or_decoding_frees_all_blocks(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            # The second waits behind the first: there is room for one sequence.
            decoding = one.generate(make_request("d", self.prompt(4), max_tokens=8 * self.block_size))
            waiting = one.generate(make_request("w", self.prompt(40, 2)))
            await asyncio.wait_for(decoding.started.wait(), SCENARIO_S)
            one.engine.abort(RequestId("w"))
            one.engine.abort(RequestId("d"))
            one.engine.abort(RequestId("d"))
            one.engine.abort(RequestId("unknown"))
            assert one.engine.load().num_blocks_used == 0, "freed at once"
            num_items = len(decoding.received)
            for sink in (waiting, decoding):
                assert (await sink.wait_error()).code is ErrorCode.CANCELLED
            # Two more steps have been computed when this has its tokens: nothing came after the end.
            again = await one.text(make_request("d", self.prompt(4), max_tokens=2))
            assert (len(again), len(decoding.received)) == (2, num_items)
            prefilling = RecordingSink()
            one.engine.prefill(make_request("p", self.prompt(20 * self.block_size, 3)), prefilling)
            await until(lambda: one.engine.load().num_running == 1)
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

    def test_prefill_transfer_decode_equals_local(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            size = self.block_size
            for seed, length in enumerate((1, 2, size - 1, size, size + 1, 2 * size, 3 * size + 5)):
                request = make_request(f"r{length}", self.prompt(length, seed))
                result = await one.prefill(request)
                assert result.num_prompt_tokens == length
                decoded = await two.generate(with_transfer(request, result.transfer)).wait()
                assert decoded.num_transferred == length - 1
                assert decoded.num_cached == 0
                assert decoded.token_ids == await one.text(request)
                await one.until_idle()

        self.run(scenario)

    def test_many_transfers_at_once(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            requests = [make_request(str(n), self.prompt(2 * self.block_size + n, n)) for n in range(8)]
            results = [await one.prefill(request) for request in requests]
            pairs = zip(requests, results, strict=True)
            sinks = [two.generate(with_transfer(request, result.transfer)) for request, result in pairs]
            texts = [(await sink.wait()).token_ids for sink in sinks]
            assert texts == [await one.text(request) for request in requests]
            assert two.engine.load().prompt_tokens_transferred_total > 0

        self.run(scenario)

    def test_a_prefill_of_a_resumed_request(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            prompt = self.prompt(self.block_size)
            whole = await one.text(make_request("whole", prompt))
            resumed = make_request("r", prompt, whole[:5])
            result = await one.prefill(resumed)
            decoded = await two.generate(with_transfer(resumed, result.transfer)).wait()
            assert whole[:5] + decoded.token_ids == whole
            assert decoded.num_transferred == self.block_size + 4

        self.run(scenario)

    def test_transfer_counts_and_own_cache_first(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            size = self.block_size
            head, whole = self.prompt(2 * size + 1), [*self.prompt(2 * size + 1), *self.prompt(size, 9)]
            await one.text(make_request("warm one", head, max_tokens=1))
            await two.text(make_request("warm two", head[: size + 1], max_tokens=1))
            result = await one.prefill(make_request("p", whole))
            assert result.num_cached_tokens == 2 * size
            decoded = await two.generate(with_transfer(make_request("d", whole), result.transfer)).wait()
            assert decoded.num_cached == 2 * size, "what the prefill engine had cached counts as cached"
            assert decoded.num_transferred == len(whole) - 1 - size, "the own block is not fetched"
            cached = make_request("c", whole)
            result = await one.prefill(cached)
            again = await two.generate(with_transfer(cached, result.transfer)).wait()
            assert (again.num_transferred, again.token_ids) == (0, decoded.token_ids)
            await one.until_idle()

        self.run(scenario)

    def test_a_transfer_made_for_other_tokens_is_not_used(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            length = 2 * self.block_size + 1
            result = await one.prefill(make_request("p", self.prompt(length, 1)))
            transfers: list[dict[str, Any]] = [result.transfer, {}, {"connector": "another"}]
            expected = await one.text(make_request("x", self.prompt(length, 2)))
            for index, transfer in enumerate(transfers):
                request = make_request(str(index), self.prompt(length, 2), salt=str(index))
                assert await two.text(with_transfer(request, transfer)) == expected
            one.engine.release(TransferId(result.transfer["transfer_id"]))

        self.run(scenario)

    def test_a_released_or_expired_transfer_is_computed_here(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            request = make_request("r", self.prompt(2 * self.block_size + 1))
            released = await one.prefill(request)
            assert one.engine.load().num_blocks_held == 3
            transfer_id = TransferId(released.transfer["transfer_id"])
            one.engine.release(transfer_id)
            one.engine.release(transfer_id)
            one.engine.release(TransferId("unknown"))
            assert one.engine.load().num_blocks_held == 0
            expired = await one.prefill(request)
            await one.until_idle()
            expected = await one.text(request)
            for name, result in (("a", released), ("b", expired)):
                request = msgspec.structs.replace(request, cache_salt=None)
                decoded = await two.generate(with_transfer(request, result.transfer, name)).wait()
                assert (decoded.token_ids, decoded.num_transferred) == (expected, 0)

        self.run(scenario, EngineSettings(transfer_hold_s=0.05))

    def test_death_of_the_prefill_engine_costs_only_time(self) -> None:
        for when in ("before", "amid", "stopped"):

            async def scenario(one: BenchEngine, two: BenchEngine, when: str = when) -> None:
                request = make_request("r", self.prompt(20 * self.block_size + 1))
                expected = await two.text(msgspec.structs.replace(request, cache_salt="other"))
                result = await one.prefill(request)
                closing: list[asyncio.Task[None]] = []

                def die(endpoint: str) -> None:
                    if not closing:
                        closing.append(asyncio.ensure_future(one.host.server.close()))

                if when == "amid":
                    two.host.watched_client.on_items = die
                elif when == "before":
                    await one.host.server.close()
                else:
                    await one.engine.stop()
                decoded = await two.generate(with_transfer(request, result.transfer)).wait()
                assert decoded.token_ids == expected
                assert decoded.num_transferred == 0
                assert bool(closing) == (when == "amid")
                await asyncio.gather(*closing)
                one.engine.release(TransferId(result.transfer["transfer_id"]))

            self.run(scenario)

    def test_abort_in_the_transfer_window_frees_both_sides(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            request = make_request("r", self.prompt(20 * self.block_size + 1))
            for amid in (False, True):
                result = await one.prefill(request)
                sink = RecordingSink()
                if amid:
                    two.host.watched_client.on_items = lambda _: two.engine.abort(RequestId("r"))
                two.engine.generate(with_transfer(request, result.transfer), sink)
                if not amid:
                    two.engine.abort(RequestId("r"))
                assert (await sink.wait_error()).code is ErrorCode.CANCELLED
                assert two.engine.load().num_blocks_used == 0
                await one.until_idle()
                assert sink.received == []

        self.run(scenario)

    def test_kv_events_replayed_equal_the_state(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            early, mirror = KvMirror(), KvMirror()
            unwatch = one.engine.watch_kv(early)
            length = 3 * self.block_size
            await one.text(make_request("first", self.prompt(length)))
            named = block_hashes(pack(self.prompt(length)), self.block_size, model=one.info.model)
            assert set(named) <= early.hashes
            one.engine.watch_kv(mirror)
            assert mirror.hashes == early.hashes, "a late listener begins with the whole state"
            sinks = [one.generate(make_request(str(n), self.prompt(length, n))) for n in range(6)]
            for sink in sinks:
                await sink.wait()
            late = KvMirror()
            one.engine.watch_kv(late)
            assert mirror.num_removed > 0, "the scenario is meant to evict"
            assert late.hashes == mirror.hashes == early.hashes
            for n in range(6):
                request = make_request("probe", self.prompt(length, n))
                chain = block_hashes(request.prompt_ids, self.block_size, model=one.info.model)
                num_known = next((i for i, name in enumerate(chain) if name not in late.hashes), len(chain))
                assert one.engine.cached_prefix_tokens(request) == min(num_known * self.block_size, length - 1)
            unwatch()
            assert await one.engine.reset_prefix_cache()
            assert (mirror.hashes, late.hashes) == (set(), set())
            assert early.hashes, "unwatched"

        self.run(scenario, EngineSettings(num_blocks=12))

    def test_transferred_blocks_are_cached_and_reported(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            mirror = KvMirror()
            two.engine.watch_kv(mirror)
            request = make_request("r", self.prompt(3 * self.block_size + 1))
            result = await one.prefill(request)
            await two.text(with_transfer(request, result.transfer))
            assert set(block_hashes(request.prompt_ids, self.block_size, model=two.info.model)) <= mirror.hashes

        self.run(scenario)

    def test_reset_prefix_cache(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            request = make_request("r", self.prompt(2 * self.block_size + 1))
            expected = await one.text(request)
            result = await one.prefill(request)
            assert not await one.engine.reset_prefix_cache(), "held blocks stay cached"
            assert one.engine.cached_prefix_tokens(request) == 2 * self.block_size
            one.engine.release(TransferId(result.transfer["transfer_id"]))
            assert await one.engine.reset_prefix_cache()
            again = await one.generate(request).wait()
            assert (again.num_cached, again.token_ids) == (0, expected)

        self.run(scenario)

    def test_load_counters_add_up(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            lengths = [5, 2 * self.block_size, 2 * self.block_size, 3 * self.block_size + 1]
            for index, length in enumerate(lengths):
                request = make_request(str(index), self.prompt(length))
                result = await two.prefill(request) if index == 3 else None
                transferred = with_transfer(request, result.transfer) if result is not None else request
                await one.text(transferred)
            load = one.engine.load()
            assert load.prompt_tokens_total == sum(lengths)
            assert load.generation_tokens_total == 12 * len(lengths)
            parts = (
                load.prompt_tokens_cached_total,
                load.prompt_tokens_computed_total,
                load.prompt_tokens_transferred_total,
            )
            assert sum(parts) == sum(lengths)
            assert min(parts) > 0
            assert load.steps_total > 0
            assert load.num_blocks == one.info.num_blocks

        self.run(scenario)

    def test_stop_ends_every_stream_and_leaves_nothing(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            held = await one.prefill(make_request("h", self.prompt(5)))
            request = make_request("d", self.prompt(5), max_tokens=8 * self.block_size)
            decoding = two.generate(request)
            waiting = two.generate(make_request("w", self.prompt(5, 2)))
            await asyncio.wait_for(decoding.started.wait(), SCENARIO_S)
            await asyncio.gather(two.engine.stop(), two.engine.stop())
            await two.engine.stop()
            for sink in (decoding, waiting):
                assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
            late: StatorError = await two.generate(make_request("late", [5])).wait_error()
            assert late.code is ErrorCode.ENGINE_DEAD
            two.engine.abort(RequestId("d"))
            assert held.transfer
            await one.engine.stop()
            assert one.engine.load().num_blocks_used == 0
            assert one.host.dead == two.host.dead == [], "a stop is no death"

        before = set(threading.enumerate())
        self.run(scenario)
        assert set(threading.enumerate()) <= before
