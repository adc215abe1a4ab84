"""The KV event feed on vLLM itself: its publisher on real sockets, and an engine whose cache we must predict."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.core.hashing import block_hashes
from stator.engines.vllm.kv_feed import KvEndpoint, KvEventFeed, kv_events_settings
from stator.engines.vllm.kv_sockets import FrameSocket, KvSockets, ZmqSockets
from stator.messages.engine import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from stator.messages.tokens import pack
from stator.testing.engine_bench import until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore")]

MODEL_DIR = Path(__file__).resolve().parents[2] / "src" / "stator" / "models" / "tiny-llama"
MODEL = "tiny-llama"
SIZE = 32
NUM_BLOCKS = 40
BYTES_PER_BLOCK = 4 * 2 * 2 * 64 * SIZE * 2
MAX_LEN = 512


def chain(token_ids: Sequence[int], salt: str | None = None) -> list[int]:
    return [*block_hashes(pack(token_ids), SIZE, model=MODEL, cache_salt=salt)]


class Mirror:
    def __init__(self) -> None:
        self.hashes: set[int] = set()
        self.num_cleared = 0

    def __call__(self, events: Sequence[KvEvent], /) -> None:
        for event in events:
            match event:
                case BlocksStored():
                    assert not self.hashes.intersection(event.block_hashes)
                    self.hashes.update(event.block_hashes)
                case BlocksRemoved():
                    assert self.hashes.issuperset(event.block_hashes)
                    self.hashes.difference_update(event.block_hashes)
                case BlocksCleared():
                    self.num_cleared += 1
                    self.hashes.clear()


class LosingSockets:
    """ZmqSockets whose subscriptions do not give what `lose` says."""

    def __init__(self) -> None:
        self._inner = ZmqSockets()
        self.lose = False
        self.num_lost = 0
        self.num_asked = 0

    def subscribe(self, address: str) -> FrameSocket:
        return _LosingSocket(self, self._inner.subscribe(address))

    def ask(self, address: str) -> FrameSocket:
        self.num_asked += 1
        return self._inner.ask(address)

    def close(self) -> None:
        self._inner.close()


class _LosingSocket:
    def __init__(self, sockets: LosingSockets, inner: FrameSocket) -> None:
        self._sockets = sockets
        self._inner = inner

    async def send(self, frames: Sequence[bytes]) -> None:
        await self._inner.send(frames)

    async def recv(self) -> list[bytes]:
        while True:
            frames = await self._inner.recv()
            if not self._sockets.lose:
                return frames
            self._sockets.num_lost += 1

    def close(self) -> None:
        self._inner.close()


def make_publisher(endpoint: KvEndpoint, config: dict[str, Any]) -> Any:
    from vllm.config.kv_events import KVEventsConfig
    from vllm.distributed.kv_events import EventPublisherFactory

    return EventPublisherFactory.create(KVEventsConfig(**config), endpoint.rank)


def batch(*names: int, parent: int | None = None) -> Any:
    """One BlockStored of blocks filled with their name."""
    from vllm.distributed.kv_events import BlockStored, KVEventBatch

    tokens = [name for name in names for _ in range(SIZE)]
    event = BlockStored([*names], parent, tokens, SIZE, None, "GPU", None, None, 0, "full_attention")
    return KVEventBatch(ts=0.0, events=[event])


def test_every_rank_of_vllms_publisher_is_where_the_settings_say(tmp_path: Path) -> None:
    config, endpoints = kv_events_settings(tmp_path / "kv", 3)

    async def main() -> None:
        publishers = [make_publisher(endpoint, config) for endpoint in endpoints]
        feed = KvEventFeed(MODEL, SIZE, endpoints)
        try:
            for rank, publisher in enumerate(publishers):
                publisher.publish(batch(7, *range(100, 100 + rank)))
            await feed.start()
            await feed.sync()
            assert feed.longest_prefix(chain([n for n in (7, 100, 101) for _ in range(SIZE)])) == (3, 2)
            publishers[1].publish(batch(200))
            await until(lambda: feed.longest_prefix(chain([200] * SIZE)) == (1, 1))
        finally:
            for publisher in publishers:
                publisher.shutdown()
            await feed.close()
        assert list((tmp_path / "kv").iterdir()) == []
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_replay_longer_than_vllms_queue_comes_whole(tmp_path: Path) -> None:
    config, endpoints = kv_events_settings(tmp_path / "kv", 1)
    count = 9_000

    async def main() -> None:
        publisher = make_publisher(endpoints[0], config)
        feed = KvEventFeed(MODEL, SIZE, endpoints)
        try:
            publisher.publish(batch(0))
            for name in range(1, count):
                publisher.publish(batch(name, parent=name - 1))
            await until(lambda: publisher._event_queue.empty())
            await feed.start()
            await feed.sync()
            assert feed.num_blocks == count
        finally:
            publisher.shutdown()
            await feed.close()

    asyncio.run(main())


def test_a_gap_longer_than_vllms_memory_and_an_engine_that_starts_again(tmp_path: Path) -> None:
    config, endpoints = kv_events_settings(tmp_path / "kv", 1)
    config["buffer_steps"] = 4

    async def main() -> None:
        publisher = make_publisher(endpoints[0], config)
        sockets = LosingSockets()
        feed = KvEventFeed(MODEL, SIZE, endpoints, make_sockets=lambda: sockets)
        mirror = Mirror()
        feed.watch(mirror)
        try:
            publisher.publish(batch(1, 2))
            await feed.start()
            await until(lambda: feed.num_blocks == 2)
            publisher.publish(batch(3))
            await until(lambda: feed.num_blocks == 3)
            sockets.lose = True
            for name in range(10, 20):
                publisher.publish(batch(name))
            await until(lambda: sockets.num_lost == 10)
            sockets.lose = False
            publisher.publish(batch(20))
            await until(lambda: feed.num_blocks == 4)
            assert mirror.hashes == {chain([name] * SIZE)[0] for name in (17, 18, 19, 20)}
            publisher.shutdown()
            publisher = make_publisher(endpoints[0], config)
            publisher.publish(batch(30))
            await feed.sync()
            assert mirror.hashes == set(chain([30] * SIZE))
        finally:
            publisher.shutdown()
            await feed.close()

    asyncio.run(main())


class Engine:
    """A vLLM engine on the bundled model with few blocks, and feeds on its events."""

    def __init__(self, directory: Path) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.config, self.endpoints = kv_events_settings(directory, 1)
        arguments: dict[str, Any] = {
            "model": str(MODEL_DIR),
            "enforce_eager": True,
            "block_size": SIZE,
            "kv_cache_memory_bytes": NUM_BLOCKS * BYTES_PER_BLOCK,
            "max_model_len": MAX_LEN,
            "max_num_seqs": 4,
            "kv_events_config": self.config,
            "disable_log_stats": True,
        }
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.num_requests = 0

    async def generate(
        self, prompt: Sequence[int], salt: str | None = None, max_tokens: int = 1
    ) -> tuple[list[int], int]:
        """(all tokens, tokens of the prompt that were cached)."""
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import SamplingParams

        self.num_requests += 1
        inputs = TokensPrompt(prompt_token_ids=[*prompt])
        if salt is not None:
            inputs["cache_salt"] = salt
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        last: Any = None
        async for output in self.llm.generate(inputs, sampling, request_id=f"r{self.num_requests}"):
            last = output
        return [*prompt, *last.outputs[0].token_ids], last.num_cached_tokens


class Stage:
    """One engine for all tests here; each has feeds of its own on one event loop."""

    def __init__(self, runner: asyncio.Runner, engine: Engine) -> None:
        self.runner = runner
        self.engine = engine

    def run(self, scenario: Any, sockets: Any = ZmqSockets) -> None:
        async def main() -> None:
            feed = KvEventFeed(MODEL, SIZE, self.engine.endpoints, make_sockets=sockets)
            mirror = Mirror()
            feed.watch(mirror)
            await feed.start()
            try:
                await scenario(self.engine, feed, mirror)
            finally:
                # Without the files' removal: the engine goes on.
                await feed._tasks.close()
                assert feed._sockets is not None
                feed._sockets.close()

        self.runner.run(main())


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as environment, asyncio.Runner() as runner:
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setenv("OMP_NUM_THREADS", "1")
        directory = tmp_path_factory.mktemp("e") / "kv"

        async def begin() -> Engine:
            return Engine(directory)

        engine = runner.run(begin())

        async def end() -> None:
            engine.llm.shutdown()
            feed = KvEventFeed(MODEL, SIZE, engine.endpoints)
            await feed.close()

        try:
            yield Stage(runner, engine)
        finally:
            runner.run(end())
        assert list(directory.iterdir()) == []


def prompt_of(seed: int, length: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(10, 4000) for _ in range(length)]


def test_hashes_are_those_of_prompt_and_output(stage: Stage) -> None:
    async def scenario(engine: Engine, feed: KvEventFeed, mirror: Mirror) -> None:
        await engine.llm.reset_prefix_cache()
        feed.clear()
        # 70 + 60 tokens: blocks that end in the prompt, across it and in the output. The last token's KV is not there.
        tokens, _ = await engine.generate(prompt_of(1, 70), max_tokens=60)
        await feed.sync()
        assert mirror.hashes == set(chain(tokens[:-1]))
        assert feed.longest_prefix(chain(tokens)) == (4, 0)
        await engine.generate(prompt_of(1, 70))
        await feed.sync()
        assert len(mirror.hashes) == 4, "a hit stores nothing"
        salted, _ = await engine.generate(prompt_of(1, 70), salt="tenant")
        await feed.sync()
        assert mirror.hashes == {*chain(tokens[:-1]), *chain(salted[:-1], "tenant")}
        late = Mirror()
        feed.watch(late)
        assert late.hashes == mirror.hashes

    stage.run(scenario)


def test_equal_prompts_at_once_are_counted(stage: Stage) -> None:
    async def scenario(engine: Engine, feed: KvEventFeed, mirror: Mirror) -> None:
        prompt = prompt_of(2, 100)
        await asyncio.gather(*(engine.generate(prompt) for _ in range(4)))
        await feed.sync()
        assert feed.longest_prefix(chain(prompt)) == (3, 0)
        for seed in range(20, 32):
            await engine.generate(prompt_of(seed, 200))
        await feed.sync()
        assert feed.longest_prefix(chain(prompt)) == (0, 0), "every copy was evicted"

    stage.run(scenario)


def test_the_engines_cached_tokens_are_predicted_under_eviction(stage: Stage) -> None:
    async def scenario(engine: Engine, feed: KvEventFeed, mirror: Mirror) -> None:
        rng = Random(3)
        trunks = [
            (prompt_of(100 + n, 32 * rng.randint(1, 8) + rng.randint(0, 31)), rng.choice([None, "s"])) for n in range(6)
        ]
        num_hits = 0
        for turn in range(60):
            trunk, salt = rng.choice(trunks)
            prompt = [*trunk, *prompt_of(1000 + rng.randint(0, 3), rng.randint(1, 80))]
            await feed.sync()
            num_blocks, _ = feed.longest_prefix(chain(prompt, salt))
            # At least the last token is computed.
            predicted = min(num_blocks, (len(prompt) - 1) // SIZE) * SIZE
            _, num_cached = await engine.generate(prompt, salt, max_tokens=rng.randint(1, 40))
            assert num_cached == predicted, f"turn {turn}"
            num_hits += num_cached > 0
        await feed.sync()
        assert num_hits > 10
        assert len(mirror.hashes) < NUM_BLOCKS

    stage.run(scenario)


def test_reset(stage: Stage) -> None:
    async def scenario(engine: Engine, feed: KvEventFeed, mirror: Mirror) -> None:
        await engine.generate(prompt_of(4, 100))
        mark = feed.clear_mark()
        assert await engine.llm.reset_prefix_cache()
        feed.clear(since=mark)
        assert mirror.hashes == set()
        await feed.sync()
        assert mirror.hashes == set(), "the engine says so with its next step"
        tokens, num_cached = await engine.generate(prompt_of(4, 100))
        await feed.sync()
        assert num_cached == 0
        assert mirror.hashes == set(chain(tokens[:-1]))

    stage.run(scenario)


def test_a_gap_is_replayed(stage: Stage) -> None:
    sockets = LosingSockets()

    def make() -> KvSockets:
        return sockets

    async def scenario(engine: Engine, feed: KvEventFeed, mirror: Mirror) -> None:
        sockets.lose = True
        num_asked = sockets.num_asked
        prompt = prompt_of(5, 130)
        await engine.generate(prompt)
        await until(lambda: sockets.num_lost > 0)
        assert feed.longest_prefix(chain(prompt)) == (0, 0)
        num_cleared = mirror.num_cleared
        sockets.lose = False
        other = prompt_of(6, 40)
        await engine.generate(other)
        await until(lambda: feed.longest_prefix(chain(other)) == (1, 0))
        assert feed.longest_prefix(chain(prompt)) == (4, 0)
        assert sockets.num_asked > num_asked
        assert mirror.num_cleared == num_cleared, "nothing was lost"

    stage.run(scenario, make)


def test_a_late_feed_has_the_whole_state(stage: Stage) -> None:
    async def scenario(engine: Engine, feed: KvEventFeed, mirror: Mirror) -> None:
        prompt = prompt_of(5, 130)
        num_blocks, _ = feed.longest_prefix(chain(prompt))
        assert num_blocks == 4
        _, num_cached = await engine.generate(prompt)
        assert num_cached == 4 * SIZE

    stage.run(scenario)
