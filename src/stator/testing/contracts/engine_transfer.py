"""The engine contract's part about KV blocks that go from a prefill engine to a decode engine."""

import asyncio
from typing import Any

import msgspec

from stator.core.hashing import block_hashes
from stator.errors import ErrorCode
from stator.ids import RequestId, TransferId
from stator.testing.contracts.engine_suite import EngineSettings, EngineSuite, make_request, with_transfer
from stator.testing.engine_bench import BenchEngine, KvMirror, RecordingSink, until


class EngineTransferContract(EngineSuite):
    """Runs as part of `contracts.engine.EngineContract`."""

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
            await until(lambda: one.engine.load().num_blocks_held == 3)
            transfer_id = TransferId(released.transfer["transfer_id"])
            one.engine.release(transfer_id)
            one.engine.release(transfer_id)
            one.engine.release(TransferId("unknown"))
            await self.until_freed(one)
            expired = await one.prefill(request)
            await one.until_idle()
            expected = await one.text(request)
            for name, result in (("a", released), ("b", expired)):
                request = msgspec.structs.replace(request, cache_salt=None)
                decoded = await two.generate(with_transfer(request, result.transfer, name)).wait()
                assert (decoded.token_ids, decoded.num_transferred) == (expected, 0)

        self.run(scenario, EngineSettings(transfer_hold_s=0.05))

    def test_death_of_the_prefill_engine_costs_only_time(self) -> None:
        for when in ("before", "stopped") if self.computes_apart else ("before", "amid", "stopped"):

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
                    await self.cut_off(one)
                else:
                    await one.engine.stop()
                decoded = await two.generate(with_transfer(request, result.transfer)).wait()
                assert decoded.token_ids == expected
                assert decoded.num_transferred == 0
                assert bool(closing) == (when == "amid")
                await asyncio.gather(*closing)
                one.engine.release(TransferId(result.transfer["transfer_id"]))

            self.run(scenario, ends_engines=True)

    def test_abort_in_the_transfer_window_frees_both_sides(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            request = make_request("r", self.prompt(20 * self.block_size + 1))
            for amid in (False,) if self.computes_apart else (False, True):
                result = await one.prefill(request)
                sink = RecordingSink()
                if amid:
                    two.host.watched_client.on_items = lambda _: two.engine.abort(RequestId("r"))
                two.engine.generate(with_transfer(request, result.transfer), sink)
                if not amid:
                    two.engine.abort(RequestId("r"))
                assert (await sink.wait_error()).code is ErrorCode.CANCELLED
                await self.until_freed(two)
                await one.until_idle()
                assert sink.received == []

        self.run(scenario)

    def test_transferred_blocks_are_cached_and_reported(self) -> None:
        async def scenario(one: BenchEngine, two: BenchEngine) -> None:
            mirror = KvMirror()
            two.engine.watch_kv(mirror)
            request = make_request("r", self.prompt(3 * self.block_size + 1))
            result = await one.prefill(request)
            await two.text(with_transfer(request, result.transfer))
            await self.settle(two.engine)
            assert set(block_hashes(request.prompt_ids, self.block_size, model=two.info.model)) <= mirror.hashes

        self.run(scenario)
