"""What the contract suite cannot stage: failing runners, steps under way, hostile and silent peers, large blocks."""

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest

from stator.engines.local.args import LocalEngineArgs
from stator.engines.local.engine import LocalEngine
from stator.engines.local.transfer import TransferParams
from stator.engines.transfer.messages import (
    FETCH_ENDPOINT,
    RELEASE_ENDPOINT,
    BlockPiece,
    FetchRequest,
    ReleaseRequest,
)
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.messages.engine import FinishReason
from stator.runtime.context import CallContext
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.testing.engine_bench import BenchEngine, BenchHost, KvMirror, RecordingSink, running_engines, until
from stator.testing.fake_runner import FakeRunner
from stator.transport import Call, Endpoint, Lane, Target, stream

SIZE = 4
PROMPT = list(range(10, 30))


class BigBlockRunner(FakeRunner):
    """Blocks of 2.5 MiB."""

    padding = bytes(2_621_440 - 4 * SIZE)

    def export_block(self, block_id: int) -> bytes:
        return super().export_block(block_id) + self.padding

    def import_block(self, block_id: int, data: bytes) -> None:
        assert data.endswith(self.padding)
        super().import_block(block_id, data[: -len(self.padding)])


def engine(runner: FakeRunner | None = None, **fields: Any) -> LocalEngine:
    made = runner or FakeRunner(block_size=SIZE)
    args = LocalEngineArgs(**{"model": "fake", "block_size": SIZE, "max_num_batched_tokens": 64, **fields})
    return LocalEngine(args, runner_factory=lambda _: made, rng=random.Random(1))


def run(scenario: Callable[..., Awaitable[None]], *engines: LocalEngine, tcp: bool = False) -> None:
    async def main() -> None:
        async with running_engines(*engines, tcp=tcp) as started:
            await scenario(*started)

    asyncio.run(asyncio.wait_for(main(), 30))


async def expected(prompt: list[int] = PROMPT, **sampling: Any) -> list[int]:
    async with running_engines(engine()) as (alone,):
        return await alone.text(make_request("x", prompt, **sampling))


def test_a_failing_step_kills_the_engine_and_tells_everybody(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner(block_size=SIZE)

    def fail() -> None:
        raise MemoryError("no more")

    async def scenario(one: BenchEngine) -> None:
        runner.before_step = fail
        sinks = [one.generate(make_request(name, PROMPT)) for name in "ab"]
        for sink in sinks:
            assert (await sink.wait_error()).code is ErrorCode.ENGINE_CRASHED
        assert len(one.host.dead) == 1
        assert "MemoryError" in one.host.dead[0]
        assert (await one.generate(make_request("c", PROMPT)).wait_error()).code is ErrorCode.ENGINE_DEAD
        await one.engine.stop()
        assert len(one.host.dead) == 1
        assert one.engine.load().num_blocks_used == 0

    run(scenario, engine(runner))
    assert "the local engine failed" in caplog.text


def test_a_crash_is_held_against_those_alone_whose_first_step_it_was() -> None:
    runner = FakeRunner(block_size=SIZE)
    hold, entered, go_on, crash = (threading.Event() for _ in range(4))

    def step() -> None:
        if crash.is_set():
            raise MemoryError("no more")
        if hold.is_set():
            entered.set()
            assert go_on.wait(10)
            crash.set()

    async def scenario(one: BenchEngine) -> None:
        runner.before_step = step
        decoding = one.generate(make_request("decoding", PROMPT, max_tokens=200))
        await until(decoding.started.is_set)
        hold.set()
        await until(entered.is_set)
        # Both fit into the sequences that may run, but the budget of a step ends within the first.
        names = ("first", "prefill", "waiting")
        sinks = {name: RecordingSink() for name in names}
        one.engine.generate(make_request("first", PROMPT), sinks["first"])
        one.engine.prefill(make_request("prefill", [9] * 40), sinks["prefill"])
        one.engine.generate(make_request("waiting", [8] * 40), sinks["waiting"])
        go_on.set()
        codes = {name: (await sink.wait_error()).code for name, sink in sinks.items()}
        assert codes["first"] is codes["prefill"] is ErrorCode.ENGINE_CRASHED
        assert codes["waiting"] is ErrorCode.ENGINE_DEAD
        assert (await decoding.wait_error()).code is ErrorCode.ENGINE_DEAD

    run(scenario, engine(runner, max_num_batched_tokens=32, max_num_seqs=8))


def test_requests_before_the_start_are_refused() -> None:
    async def main() -> None:
        sink = RecordingSink()
        unstarted = engine()
        unstarted.generate(make_request("a", PROMPT), sink)
        unstarted.release(TransferId("x"))
        assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
        await unstarted.stop()

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_leaves_no_thread() -> None:
    def refuse(args: LocalEngineArgs) -> FakeRunner:
        raise ConfigError("no such model")

    broken = LocalEngine(LocalEngineArgs(model="fake"), runner_factory=refuse)
    before = threading.active_count()
    with pytest.raises(ConfigError, match="no such model"):
        run(lambda _: asyncio.sleep(0), broken)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("fields", "numbers"), [({"max_model_len": 600}, r"600.*512"), ({"max_model_len": 300}, r"300.*64.*256")]
)
def test_a_context_that_does_not_fit_stops_the_start(fields: dict[str, Any], numbers: str) -> None:
    with pytest.raises(ConfigError, match=numbers):
        run(lambda _: asyncio.sleep(0), engine(**fields))


def test_the_loop_lives_during_a_step_and_an_abort_in_it_drops_its_token() -> None:
    runner = FakeRunner(block_size=SIZE, num_blocks=8)
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(10)

    async def scenario(one: BenchEngine) -> None:
        runner.before_step = hold
        first = one.generate(make_request("a", PROMPT, max_tokens=4))
        await until(entered.is_set)
        assert one.engine.load().num_running == 1, "the loop answers while the step computes"
        one.engine.abort(RequestId("a"))
        assert one.engine.load().num_blocks_used == 0
        # Needs the blocks that the step under way still writes to, and takes the same request id.
        second = one.generate(make_request("a", PROMPT[::-1], max_tokens=4))
        assert (await first.wait_error()).code is ErrorCode.CANCELLED
        runner.before_step = None
        go_on.set()
        assert (await second.wait()).token_ids == await expected(PROMPT[::-1], max_tokens=4)
        assert first.received == []

    run(scenario, engine(runner))


def test_stop_waits_for_the_step_under_way() -> None:
    runner = FakeRunner(block_size=SIZE)
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(10)

    async def scenario(one: BenchEngine) -> None:
        runner.before_step = hold
        sink = one.generate(make_request("a", PROMPT))
        await until(entered.is_set)
        stopping = asyncio.ensure_future(one.engine.stop())
        assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
        assert not stopping.done()
        go_on.set()
        await stopping
        assert sink.received == []

    run(scenario, engine(runner))


def test_a_sink_that_raises_loses_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def items(self, items: Sequence[Any], /) -> None:
            raise KeyError("mine")

        def end(self, error: StatorError | None = None, /) -> None:
            raise KeyError("mine too")

    async def scenario(one: BenchEngine) -> None:
        one.engine.generate(make_request("broken", PROMPT), Broken())
        one.engine.generate(make_request("broken at its last", PROMPT, max_tokens=1), Broken())
        good = one.generate(make_request("good", PROMPT))
        assert (await good.wait()).token_ids == await expected()
        await one.until_idle()

    run(scenario, engine())
    assert "the sink of request broken failed" in caplog.text


def test_a_kv_listener_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(one: BenchEngine) -> None:
        def listener(events: Sequence[Any]) -> None:
            if events:
                raise KeyError("mine")

        one.engine.watch_kv(listener)
        assert await one.text(make_request("a", PROMPT)) == await expected()

    run(scenario, engine())
    assert "a listener to KV events failed" in caplog.text


def test_output_complete_on_arrival_ends_at_once() -> None:
    async def scenario(one: BenchEngine) -> None:
        sink = await one.generate(make_request("a", PROMPT, [5, 6], max_tokens=2)).wait()
        assert (sink.token_ids, sink.finish_reason, sink.num_cached) == ([], FinishReason.LENGTH, 0)

    run(scenario, engine())


def test_eos_ends_the_output_unless_ignored_or_too_early() -> None:
    runner = FakeRunner(block_size=SIZE, eos_token_ids=frozenset(range(1, 500)))

    async def scenario(one: BenchEngine) -> None:
        stopped = await one.generate(make_request("a", PROMPT, ignore_eos=False)).wait()
        assert stopped.finish_reason is FinishReason.STOP
        assert stopped.token_ids[-1] < 500 <= min([*stopped.token_ids[:-1], 999])
        ignored = await one.generate(make_request("b", PROMPT)).wait()
        assert ignored.finish_reason is FinishReason.LENGTH
        late = await one.generate(make_request("c", PROMPT, ignore_eos=False, min_tokens=6)).wait()
        assert len(late.token_ids) > 6

    run(scenario, engine(runner))


@pytest.mark.parametrize("tcp", [False, True])
def test_large_blocks_travel_in_pieces(tcp: bool) -> None:
    sizes: list[int] = []

    async def scenario(one: BenchEngine, two: BenchEngine) -> None:
        request = make_request("a", PROMPT)
        result = await one.prefill(request)
        params = msgspec.convert(result.transfer, TransferParams)
        target = Target(params.addresses, FETCH_ENDPOINT, params.instance_id, Lane.BULK)
        context = CallContext(RequestId("probe"))
        pieces = stream(
            two.host.client, target, FetchRequest(params.transfer_id, 0, 5), context=context, item_type=BlockPiece
        )
        async for items in pieces:
            sizes.extend(len(piece.data) for piece in items)
        decoded = await two.generate(with_transfer(request, result.transfer)).wait()
        assert decoded.num_transferred == len(PROMPT) - 1
        assert decoded.token_ids == await expected()
        await one.until_idle()

    run(scenario, engine(BigBlockRunner(block_size=SIZE)), engine(BigBlockRunner(block_size=SIZE)), tcp=tcp)
    assert max(sizes) == 1024 * 1024
    assert sum(sizes) == 5 * 2_621_440


Serve = Callable[[Call], None]


def _pieces(*pieces: BlockPiece) -> Serve:
    def serve(call: Call) -> None:
        call.items(list(pieces))
        call.end()

    return serve


GOOD = bytes(4 * SIZE)


@pytest.mark.parametrize(
    "serve",
    [
        _pieces(),
        _pieces(BlockPiece(0, 0, len(GOOD), GOOD)),
        _pieces(BlockPiece(7, 0, len(GOOD), GOOD)),
        _pieces(BlockPiece(0, 4, len(GOOD), GOOD)),
        _pieces(BlockPiece(0, 0, len(GOOD), GOOD), BlockPiece(0, 0, len(GOOD), GOOD)),
        _pieces(*[BlockPiece(index, 0, 3, b"bad") for index in range(5)]),
        lambda call: call.end(StatorError(ErrorCode.TRANSFER_FAILED, "gone")),
        lambda call: None,
    ],
    ids=["nothing", "too few", "not asked", "bad offset", "twice", "bad size", "refused", "silent"],
)
def test_a_transfer_that_goes_wrong_is_computed_here(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the peer does: right text, one log line, one count, and the peer is told to release."""
    released: list[str] = []

    async def scenario(one: BenchEngine, two: BenchEngine) -> None:
        def handle_release(call: Call) -> None:
            released.append(call.request.transfer_id)
            call.end()

        request = make_request("a", PROMPT)
        result = await one.prefill(request)
        peer = BenchHost("peer", two.host.network)
        await peer.server.start()
        peer.register(Endpoint(FETCH_ENDPOINT, FetchRequest, serve))
        peer.register(Endpoint(RELEASE_ENDPOINT, ReleaseRequest, handle_release))
        transfer = {**result.transfer, "instance_id": "peer", "addresses": list(peer.addresses)}
        decoded = await two.generate(with_transfer(request, transfer)).wait()
        assert decoded.token_ids == await expected()
        assert (decoded.num_transferred, decoded.num_cached) == (0, 0)
        assert two.engine.num_transfer_failures == 1
        await until(lambda: released == [result.transfer["transfer_id"]])
        await two.until_idle()
        await peer.server.close()

    with caplog.at_level(logging.WARNING, "stator.engines.local.capacity"):
        run(scenario, engine(), engine(transfer_timeout_s=0.2))
    assert sum("computing here" in record.getMessage() for record in caplog.records) == 1


def test_a_runner_that_fails_to_import_costs_the_transfer_only(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(FakeRunner):
        def import_block(self, block_id: int, data: bytes) -> None:
            raise RuntimeError("driver")

    async def scenario(one: BenchEngine, two: BenchEngine) -> None:
        request = make_request("a", PROMPT)
        result = await one.prefill(request)
        decoded = await two.generate(with_transfer(request, result.transfer)).wait()
        assert (decoded.token_ids, decoded.num_transferred) == (await expected(), 0)
        await one.until_idle()

    run(scenario, engine(), engine(Failing(block_size=SIZE)))
    assert "importing KV blocks for request a failed" in caplog.text


@pytest.mark.parametrize("seed", range(6))
def test_a_storm_of_everything_leaves_right_texts_and_no_blocks(seed: int) -> None:
    """Prefills, transfers, aborts and releases at random moments, on engines that hold a fraction of the load."""
    rng = random.Random(seed)
    prompts = [rng.choices(range(10, 900), k=rng.randint(1, 30)) for _ in range(6)]

    async def one_request(
        name: str, one: BenchEngine, two: BenchEngine, texts: dict[str, tuple[int, list[int]]]
    ) -> None:
        index = rng.randrange(len(prompts))
        request = make_request(name, prompts[index])
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
        if rng.random() < 0.7:
            result = await one.prefill(request)
            request = with_transfer(request, result.transfer)
            if rng.random() < 0.2:
                one.engine.release(TransferId(result.transfer["transfer_id"]))
        sink = two.generate(request)
        if rng.random() < 0.4:
            for _ in range(rng.randrange(60)):
                await asyncio.sleep(0)
            two.engine.abort(request.request_id)
        await asyncio.wait_for(sink.ended.wait(), 20)
        if sink.error is None:
            texts[name] = (index, sink.token_ids)
        else:
            assert sink.error.code is ErrorCode.CANCELLED

    async def scenario(one: BenchEngine, two: BenchEngine) -> None:
        mirrors = [KvMirror(), KvMirror()]
        for bench, mirror in zip((one, two), mirrors, strict=True):
            bench.engine.watch_kv(mirror)
        texts: dict[str, tuple[int, list[int]]] = {}
        await asyncio.gather(*[one_request(str(n), one, two, texts) for n in range(40)])
        alone = [await expected(prompt) for prompt in prompts]
        assert texts
        assert {name: alone[index] for name, (index, _) in texts.items()} == {n: text for n, (_, text) in texts.items()}
        assert two.engine.load().prompt_tokens_transferred_total > 0
        for bench, mirror in zip((one, two), mirrors, strict=True):
            await bench.until_idle()
            late = KvMirror()
            bench.engine.watch_kv(late)
            assert late.hashes == mirror.hashes

    small = [FakeRunner(block_size=SIZE, num_blocks=24) for _ in range(2)]
    run(scenario, *[engine(runner, max_num_seqs=6, max_num_batched_tokens=16) for runner in small])


def test_a_release_amid_a_fetch_frees_the_blocks_after_it() -> None:
    async def scenario(one: BenchEngine, two: BenchEngine) -> None:
        request = make_request("a", PROMPT)
        result = await one.prefill(request)
        two.host.watched_client.on_items = lambda _: one.engine.release(TransferId(result.transfer["transfer_id"]))
        decoded = await two.generate(with_transfer(request, result.transfer)).wait()
        assert decoded.token_ids == await expected()
        assert decoded.num_transferred == 0
        await one.until_idle()

    run(scenario, engine(BigBlockRunner(block_size=SIZE)), engine(BigBlockRunner(block_size=SIZE)))


def test_a_hold_does_not_expire_while_it_is_fetched() -> None:
    runner = FakeRunner(block_size=SIZE)
    entered, go_on = threading.Event(), threading.Event()

    def hold_up() -> None:
        entered.set()
        assert go_on.wait(10)

    async def scenario(one: BenchEngine, two: BenchEngine) -> None:
        request = make_request("a", PROMPT)
        result = await one.prefill(request)
        runner.before_step = hold_up
        slow = one.generate(make_request("slow", [5], max_tokens=1))
        await until(entered.is_set)
        decoding = two.generate(with_transfer(request, result.transfer))
        # The export waits behind the slow step, for longer than the hold.
        loop = asyncio.get_running_loop()
        passed = asyncio.Event()
        loop.call_later(0.3, passed.set)
        await passed.wait()
        assert one.engine.load().num_blocks_held == 5
        go_on.set()
        await slow.wait()
        assert (await decoding.wait()).num_transferred == len(PROMPT) - 1
        await one.until_idle()

    run(scenario, engine(runner, transfer_hold_s=0.1), engine())


def test_a_fetch_of_blocks_that_are_not_held_says_so() -> None:
    async def scenario(one: BenchEngine, two: BenchEngine) -> None:
        result = await one.prefill(make_request("a", PROMPT))
        held = TransferId(result.transfer["transfer_id"])
        target = Target(one.host.addresses, FETCH_ENDPOINT)
        for asked in (FetchRequest(TransferId("x"), 0, 1), FetchRequest(held, 0, 6), FetchRequest(held, -1, 2)):
            with pytest.raises(StatorError) as caught:
                async for _ in stream(two.host.client, target, asked, context=CallContext(RequestId("r"))):
                    pass
            assert caught.value.code is ErrorCode.TRANSFER_FAILED
        one.engine.release(held)

    run(scenario, engine(), engine())


def test_unseeded_requests_draw_from_the_given_random() -> None:
    async def texts(seed: int) -> list[list[int]]:
        args = LocalEngineArgs(model="fake", block_size=SIZE, max_num_batched_tokens=64, seed=seed)
        async with running_engines(LocalEngine(args, runner_factory=lambda _: FakeRunner(block_size=SIZE))) as (one,):
            return [await one.text(make_request(name, PROMPT, temperature=1.0)) for name in "ab"]

    first, again, other = (asyncio.run(texts(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] != first[1]
