"""The time that the sim engine takes, in virtual time against values computed by hand, its faults, and its settings."""

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stator.config.step_times import shipped_step_times
from stator.engines.local.runner import Chunk
from stator.engines.registry import create_engine
from stator.engines.sim.args import SimEngineArgs, args_from_section
from stator.engines.sim.engine import SimEngine
from stator.engines.sim.runner import SimRunner
from stator.engines.sim.vocabulary import Vocabulary
from stator.errors import ConfigError, ErrorCode
from stator.ids import RequestId
from stator.messages.engine import EngineInfo
from stator.runtime.context import loop_time
from stator.testing.clock import VirtualClockLoop, run_virtual
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.testing.engine_bench import BenchEngine, RecordingSink, running_engines

NAME = "405b-h100-fp8"
STEP = shipped_step_times().to_simulate(NAME, "").row.step_time


def exactly(milliseconds: Any) -> Any:
    """But for floating point."""
    return pytest.approx(milliseconds, rel=1e-9, abs=1e-9)


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(4, 4096), k=length)


def engine(seed: int = 1, **fields: Any) -> SimEngine:
    chosen: dict[str, Any] = {"model": "stator:tiny-llama", "step_times": NAME, "max_model_len": 32768, **fields}
    return SimEngine(SimEngineArgs(**chosen), rng=random.Random(seed))


def run(scenario: Callable[[BenchEngine], Awaitable[None]], **fields: Any) -> None:
    async def main() -> None:
        async with running_engines(engine(**fields)) as (one,):
            await scenario(one)

    run_virtual(main())


def timed(one: BenchEngine, name: str, length: int, count: int) -> tuple[RecordingSink, list[float]]:
    """The stream, and when each of its tokens came."""
    times: list[float] = []
    sink = RecordingSink(lambda: times.append(loop_time()))
    one.engine.generate(make_request(name, prompt(length, len(name)), max_tokens=count), sink)
    return sink, times


def test_one_request_takes_what_the_constants_say() -> None:
    async def scenario(one: BenchEngine) -> None:
        sink, times = timed(one, "a", 1000, 3)
        await sink.wait()
        # max(26.8, 17.5 + 0.1303 x 1000) + 1.69e-6 x 1000 x 500; then 26.8 + 0.0844 + 1.5e-5 x tokens before.
        expected = [148.645, 26.8994, 26.899415]
        passed = [times[0], times[1] - times[0], times[2] - times[1]]
        assert [each * 1e3 for each in passed] == exactly(expected)

    run(scenario)


def test_a_prompt_of_several_chunks_beside_a_decode() -> None:
    async def scenario(one: BenchEngine) -> None:
        first, times = timed(one, "a", 100, 4)
        await asyncio.wait_for(first.started.wait(), 1)
        _, late = timed(one, "bb", 1000, 1)
        await first.wait()
        # The step under way when it came; then 511 tokens beside one decode, and 489 beside the next.
        alone = 26.8 + 0.0844 + 1.5e-5 * 100
        one_step = 17.5 + 0.1303 * 512 + 1.69e-6 * 511 * 255.5 + 1.5e-5 * 101
        two_step = 17.5 + 0.1303 * 490 + 1.69e-6 * 489 * (511 + 244.5) + 1.5e-5 * 102
        passed = [(times[i + 1] - times[i]) * 1e3 for i in range(3)]
        assert passed == exactly([alone, one_step, two_step])
        assert late == [times[3]], "its first token comes with its last chunk"

    run(scenario, max_num_batched_tokens=512, max_num_seqs=8)


def test_a_small_prefill_takes_no_less_than_a_decode_step() -> None:
    async def scenario(one: BenchEngine) -> None:
        sink, times = timed(one, "a", 5, 1)
        await sink.wait()
        assert times[0] * 1e3 == exactly(26.8 + 1.69e-6 * 5 * 2.5)

    run(scenario)


def test_single_steps_take_the_time_of_the_closed_form() -> None:
    """Nothing is lost by not leaping over steps in which the batch does not change."""
    streams, steps, context = 16, 500, 64

    async def scenario(one: BenchEngine) -> None:
        made = [timed(one, "x" * (index + 1), context, steps + 1) for index in range(streams)]
        for sink, _ in made:
            await sink.wait()
        (first, *_), last = made[0][1], made[0][1][-1]
        assert {tuple(times) for _, times in made} == {tuple(made[0][1])}
        step = STEP.d0 + STEP.d1 * streams + STEP.d2 * streams * context
        expected = steps * step + STEP.d2 * streams * steps * (steps - 1) / 2
        assert (last - first) * 1e3 == pytest.approx(expected, rel=1e-9)

    run(scenario)


def test_speed_divides_all_time() -> None:
    async def scenario(one: BenchEngine) -> None:
        sink, times = timed(one, "a", 1000, 1)
        await sink.wait()
        assert times[0] * 1e3 == exactly(14.8645)
        assert one.info.device == "simulated 405b-h100-fp8 at speed 10.0"

    run(scenario, sim_speed=10.0)


def test_blocks_come_over_the_link_at_its_bandwidth_one_after_another() -> None:
    async def main() -> None:
        async with running_engines(engine(block_size=64), engine(block_size=64)) as (prefill, decode):
            asked = [make_request(name, prompt(1025, index), max_tokens=1) for index, name in enumerate("ab")]
            results = [await prefill.prefill(request) for request in asked]
            begin = loop_time()
            times: list[float] = []
            sinks = [RecordingSink(lambda: times.append(loop_time())) for _ in asked]
            for request, result, sink in zip(asked, results, sinks, strict=True):
                decode.engine.generate(with_transfer(request, result.transfer), sink)
            for sink in sinks:
                await sink.wait()
                assert sink.num_transferred == 1024
            # 1025 tokens lie in 17 blocks, which all come; the last token is computed again for its logits.
            link_ms = 17 * 64 * 258_048 / 64e9 * 1e3
            alone_ms = STEP.d0 + STEP.d1 + STEP.d2 * 1024
            assert (times[0] - begin) * 1e3 == exactly(link_ms + alone_ms)
            # The second came while the first's step was computed.
            assert (times[1] - times[0]) * 1e3 == exactly(alone_ms)

    run_virtual(main())


def trace(seed: int) -> list[tuple[float, str, tuple[int, ...]]]:
    """Everything that 30 requests with arrivals, aborts and preemptions see."""
    seen: list[tuple[float, str, tuple[int, ...]]] = []

    async def main() -> None:
        rng = random.Random(seed)
        made = engine(seed, block_size=16, num_gpu_blocks_override=80, max_model_len=1280, sim_mean_output_tokens=40.0)
        async with running_engines(made) as (one,):
            sinks: list[RecordingSink] = []
            for index in range(30):
                await asyncio.sleep(rng.expovariate(50))
                sink = RecordingSink()

                def record(name: str = str(index), sink: RecordingSink = sink) -> None:
                    seen.append((loop_time(), name, tuple(sink.received[-1].token_ids)))

                sink._on_items = record  # pyright: ignore[reportPrivateUsage]
                request = make_request(str(index), prompt(rng.randint(1, 600), index % 5), max_tokens=300,
                                       temperature=1.0, ignore_eos=False)  # fmt: skip
                one.engine.generate(request, sink)
                sinks.append(sink)
                if rng.random() < 0.2:
                    one.engine.abort(RequestId(str(rng.randrange(index + 1))))
            for sink in sinks:
                await sink.ended.wait()
            await one.until_idle()
            assert one.engine.load().preemptions_total > 0

    before = set(threading.enumerate())
    run_virtual(main())
    assert set(threading.enumerate()) == before
    return seen


def test_one_seed_gives_one_trace_and_another_gives_another() -> None:
    first = trace(1)
    assert len(first) > 500
    assert trace(1) == first
    assert trace(2) != first


class Late(SimRunner):
    """Takes real time of the loop's clock, as a machine that is busy does."""

    late_s = 0.0

    def step(self, chunks: Any) -> list[int | None]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        loop.advance(self.late_s)
        return super().step(chunks)


def with_late_runner() -> tuple[SimEngine, Late]:
    late = Late(Vocabulary(tuple(range(4, 4096)), 4096, frozenset(), 4096), block_size=64, num_blocks=64)
    args = SimEngineArgs(model="any", step_times=NAME, block_size=64, num_gpu_blocks_override=64)
    return SimEngine(args, rng=random.Random(1), runner_factory=lambda _: late), late


def test_what_the_simulation_itself_takes_is_part_of_its_steps(caplog: pytest.LogCaptureFixture) -> None:
    made, late = with_late_runner()

    async def main() -> None:
        async with running_engines(made) as (one,):
            late.late_s = 0.020
            sink, times = timed(one, "a", 5, 11)
            await sink.wait()
            expected = [STEP.d0 + STEP.d1 + STEP.d2 * n for n in range(5, 15)]
            passed = [(times[i + 1] - times[i]) * 1e3 for i in range(10)]
            assert passed == exactly(expected)
            # One step that is late is caught up by those that follow.
            late.late_s = 0.100
            begin = loop_time()
            sink, times = timed(one, "b", 5, 11)
            await sink.started.wait()
            late.late_s = 0.0
            await sink.wait()
            assert times[0] == begin + 0.100
            assert times[10] - begin == pytest.approx(11 * STEP.d0 / 1e3, rel=0.01)
            assert made.executor.lag_s == 0.0

    with caplog.at_level(logging.WARNING):
        run_virtual(main())
    assert not caplog.records


def test_a_machine_that_cannot_keep_up_is_told_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    made, late = with_late_runner()

    async def main() -> None:
        async with running_engines(made) as (one,):
            late.late_s = 0.5
            sink, _ = timed(one, "a", 5, 20)
            await sink.wait()
            assert made.executor.lag_s == pytest.approx(19 * (0.5 - STEP.d0 / 1e3), rel=0.1)

    with caplog.at_level(logging.WARNING):
        run_virtual(main())
    assert [record.getMessage()[:28] for record in caplog.records] == ["the simulation cannot keep up"[:28]]


def test_an_engine_that_was_idle_owes_nothing() -> None:
    async def scenario(one: BenchEngine) -> None:
        for name in "abc":
            sink, times = timed(one, name, 5, 1)
            begin = loop_time()
            await sink.wait()
            assert (times[0] - begin) * 1e3 == pytest.approx(26.8, rel=1e-5)
            await asyncio.sleep(0.001)

    run(scenario)


def test_a_crash_ends_every_request_and_the_engine() -> None:
    async def scenario(one: BenchEngine) -> None:
        assert isinstance(one.engine, SimEngine)
        sink, _ = timed(one, "a", 5, 50)
        await sink.started.wait()
        one.engine.faults.crash("bad luck")
        error = await sink.wait_error()
        assert error.code is ErrorCode.ENGINE_DEAD, "it was decoding, and is not suspected"
        assert len(one.host.dead) == 1 and "bad luck" in one.host.dead[0]

    run(scenario)


def test_a_poison_request_crashes_the_engine_that_computes_it() -> None:
    def is_poison(chunks: Any) -> bool:
        return any(13 in chunk.token_ids for chunk in chunks if isinstance(chunk, Chunk))

    async def scenario(one: BenchEngine) -> None:
        assert isinstance(one.engine, SimEngine)
        one.engine.faults.crash_if = is_poison
        assert len(await one.text(make_request("fine", [5, 6, 7]))) == 12
        sink = one.generate(make_request("poison", [5, 13, 7]))
        assert (await sink.wait_error()).code is ErrorCode.ENGINE_CRASHED
        assert len(one.host.dead) == 1

    run(scenario, seed=3)


def test_a_hang_lasts_until_it_is_released_or_the_engine_is_stopped() -> None:
    async def scenario(one: BenchEngine) -> None:
        assert isinstance(one.engine, SimEngine)
        sink, times = timed(one, "a", 5, 20)
        await sink.started.wait()
        one.engine.faults.hang()
        await asyncio.sleep(100)
        assert len(times) == 1 and one.engine.load().num_running == 1
        one.engine.faults.release()
        await sink.wait()
        assert len(times) == 20 and times[1] > 100
        one.engine.faults.hang()
        stuck, _ = timed(one, "b", 5, 20)
        await asyncio.sleep(10)
        await one.engine.stop()
        assert (await stuck.wait_error()).code is ErrorCode.ENGINE_DEAD
        assert not stuck.received

    run(scenario)


def test_a_stop_does_not_wait_for_the_end_of_a_step() -> None:
    async def scenario(one: BenchEngine) -> None:
        sink, _ = timed(one, "a", 8000, 1)
        await asyncio.sleep(0.1)
        await one.engine.stop()
        assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
        assert loop_time() == 0.1

    run(scenario, step_times="405b-a100-w8a16")


def test_engines_pair_if_they_simulate_one_model() -> None:
    found: dict[str, dict[str, str]] = {}

    async def main(name: str, **fields: Any) -> None:
        async with running_engines(engine(step_times=name, **fields)) as (one,):
            found[name] = one.info.pairing

    run_virtual(main("405b-h200-fp8", sim_mean_output_tokens=50, sim_speed=2.0))
    for name in ("405b-h100-fp8", "49b-h100-fp8", "49b-h100-bf16"):
        run_virtual(main(name))
    assert found["405b-h100-fp8"] == found["405b-h200-fp8"]
    assert len({tuple(each.items()) for each in found.values()}) == 3


def test_a_slow_engine() -> None:
    async def scenario(one: BenchEngine) -> None:
        assert isinstance(one.engine, SimEngine)
        one.engine.faults.slowdown = 10.0
        sink, times = timed(one, "a", 1000, 1)
        await sink.wait()
        assert times[0] * 1e3 == exactly(1486.45)

    run(scenario)


def test_the_router_finds_the_constants_of_what_is_simulated() -> None:
    found: list[EngineInfo] = []

    async def main(**fields: Any) -> None:
        async with running_engines(engine(**fields)) as (one,):
            found.append(one.info)

    for speed in (1.0, 1.0, 4.0):
        run_virtual(main(sim_speed=speed))
    table = shipped_step_times()
    assert (found[0].engine, found[0].device) == ("sim", "simulated 405b-h100-fp8")
    assert table.of(found[0]) is table.of(found[1]) is STEP
    assert table.of(found[2]) == STEP.scaled(0.25)
    assert table.of(found[2]) is table.of(found[2]), "workers of one kind are priced together"
    assert found[0].num_blocks == 550_000 // 64


def test_settings() -> None:
    args = args_from_section({"model": "nvidia/Llama-3.1-405B-Instruct-FP8", "max-num-seqs": 16, "swap-space": 4})
    assert (args.simulated.name, args.max_num_seqs, args.max_num_batched_tokens) == (NAME, 16, 8192)
    assert args_from_section({"model": "nvidia/Llama-3_3-Nemotron-Super-49B-v1"}).simulated.name == "49b-h100-bf16"
    assert args_from_section({"model": "stator:tiny-llama", "block-size": 16}).num_blocks == 4096
    by_bytes = {"model": "m", "step-times": NAME, "kv-cache-memory-bytes": 10**9, "block-size": 64}
    assert args_from_section(by_bytes).num_blocks == 10**9 // (64 * 258_048)
    assert args_from_section({**by_bytes, "num-gpu-blocks-override": 9}).num_blocks == 9
    assert isinstance(create_engine("sim", {"model": "stator:tiny-llama"}), SimEngine)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": "some/model"},
            "none for the model some/model; choose one to simulate: 405b-h100-fp8, .*tiny-decilm",
        ),
        ({"model": "m", "step-times": "405b-h10"}, r"'405b-h10' \(did you mean 405b-h100-fp8\?\); there are 405b-h100"),
        ({"model": "stator:tiny-llama", "sim-speed": 0}, "sim-speed is 0.0; it must be above 0"),
        ({"model": "stator:tiny-llama", "sim-mean-output-tokens": 0.5}, "sim-mean-output-tokens is 0.5"),
        ({"model": "stator:tiny-llama", "sim-sped": 2}, "the sim engine has no setting 'sim-sped'; did you mean"),
        ({"model": "stator:tiny-llama", "kv-cache-memory-bytes": 5}, "one KV block of tiny-llama with block-size 64"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        args_from_section(values)
