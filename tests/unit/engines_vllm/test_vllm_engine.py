"""The adapter's own decisions, with a vLLM that does what it is told: the contract suite runs on the real one."""

import asyncio
import contextlib
import functools
import json
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from stator.engines.lora import LoraEngine
from stator.engines.vllm import engine as adapter
from stator.engines.vllm.args import settings_from_section
from stator.engines.vllm.connectors import STATOR_CONNECTOR
from stator.engines.vllm.engine import VllmEngine
from stator.engines.vllm.transfer import VllmTransfer, result_transfer
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.ids import RequestId, TransferId
from stator.messages.embeddings import Embedding, EmbedRequest
from stator.messages.engine import EngineRequest, FinishReason
from stator.messages.tokens import pack
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.testing.engine_bench import BenchEngine, RecordingSink, running_engines, until


@dataclass
class Added:
    request_id: str
    sampling: dict[str, Any]
    on_output: Callable[[Any], None]
    lora: Any
    priority: int


@dataclass
class FakeVllm:
    """Stands for StartedVllm. gate, lora_gate: what `add` and `add_lora` wait for."""

    arguments: list[str]
    block_size: int = 4
    num_blocks: int = 64
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_model_len: int = 256
    vocab_size: int = 1000
    version: str = "0.32.0"
    device: str = "cpu"
    eos_token_ids: frozenset[int] = frozenset({2})
    config: Any = None
    added: list[Added] = field(default_factory=list[Added])
    aborted: list[str] = field(default_factory=list[str])
    shut_downs: int = 0
    split: tuple[int, int] = (0, 0)
    died: Callable[[str], None] | None = None
    killed: bool = False
    loras: list[tuple[str, int, str]] = field(default_factory=list[tuple[str, int, str]])
    lora_error: Exception | None = None
    tasks: frozenset[str] = frozenset({"generate"})

    def __post_init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.lora_gate = asyncio.Event()
        self.lora_gate.set()

    def on_dead(self, callback: Callable[[str], None]) -> None:
        self.died = callback

    async def add(self, request_id: str, token_ids: list[int], sampling: dict[str, Any], **others: Any) -> None:
        await self.gate.wait()
        others["on_added"](f"core-{request_id}")
        self.added.append(Added(request_id, sampling, others["on_output"], others["lora"], others["priority"]))

    async def supported_tasks(self) -> frozenset[str]:
        return self.tasks

    def has_dimensions(self, dimensions: int) -> bool:
        return dimensions <= 2

    async def abort(self, core_id: str) -> None:
        self.aborted.append(core_id)

    async def reset_prefix_cache(self) -> bool:
        return True

    async def add_lora(self, lora: tuple[str, int, str]) -> None:
        await self.lora_gate.wait()
        if self.lora_error is not None:
            raise self.lora_error
        self.loras.append(lora)

    async def remove_lora(self, lora: tuple[str, int, str]) -> None:
        self.loras.remove(lora)

    async def call_workers(self, method: str, arguments: tuple[Any, ...]) -> Sequence[Any]:
        return []

    def was_killed(self) -> bool:
        return self.killed

    def cached_split(self, output: Any, core_id: str | None) -> tuple[int, int]:
        return self.split

    async def shut_down(self, timeout_s: float) -> None:
        self.shut_downs += 1


class FakeLaunch:
    def __init__(self, fails: Exception | None = None, tasks: frozenset[str] = frozenset({"generate"})) -> None:
        self.fails = fails
        self.tasks = tasks
        self.vllm: FakeVllm | None = None

    def has_gpu(self) -> bool:
        return False

    async def start(self, arguments: list[str], record: Any) -> Any:
        if self.fails is not None:
            raise self.fails
        self.vllm = FakeVllm(arguments, tasks=self.tasks)
        return self.vllm


def output(token_ids: list[int], reason: str | None = None, params: dict[str, Any] | None = None) -> Any:
    completion = SimpleNamespace(token_ids=token_ids, finish_reason=reason)
    return SimpleNamespace(outputs=[completion], kv_transfer_params=params)


def in_loop(test: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 20))

    return run


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here publishes KV events or has a model's configuration."""
    monkeypatch.setattr(adapter, "engine_pairing", lambda *_, **__: {"engine": "vllm"})


SECTION = {"model": "stator:tiny-llama", "served_model_name": "m", "enable_prefix_caching": False}


@contextlib.asynccontextmanager
async def running(**section: Any) -> AsyncGenerator[tuple[BenchEngine, FakeVllm]]:
    launch = FakeLaunch()
    engine = VllmEngine(settings_from_section({**SECTION, **section}), launcher=launch)
    async with running_engines(engine) as (one,):
        assert launch.vllm is not None
        yield one, launch.vllm


async def sent(one: BenchEngine, vllm: FakeVllm, request: EngineRequest) -> tuple[RecordingSink, Added]:
    sink = one.generate(request)
    count = len(vllm.added)
    await until(lambda: len(vllm.added) > count)
    return sink, vllm.added[-1]


@in_loop
async def test_tokens_and_the_end() -> None:
    async with running() as (one, vllm):
        vllm.split = (8, 0)
        sink, added = await sent(one, vllm, make_request("r", [5] * 9))
        added.on_output(output([7, 8]))
        added.on_output(output([9], "length"))
        assert (sink.token_ids, sink.finish_reason, sink.num_cached) == ([7, 8, 9], FinishReason.LENGTH, 8)
        assert sink.ended.is_set() and sink.error is None
        added.on_output(output([1]))  # after the end: nothing
        assert vllm.aborted == []


@in_loop
async def test_an_abort_before_vllm_has_the_request_is_carried_out_after() -> None:
    async with running() as (one, vllm):
        vllm.gate.clear()
        sink = one.generate(make_request("r", [5]))
        await asyncio.sleep(0)
        one.engine.abort(RequestId("r"))
        assert (await sink.wait_error()).code is ErrorCode.CANCELLED
        vllm.gate.set()
        await until(lambda: vllm.aborted == ["core-r"])
        vllm.added[0].on_output(output([7]))
        assert sink.received == []


@in_loop
async def test_endings_that_are_no_endings_are_failures() -> None:
    async with running() as (one, vllm):
        for reason in ("abort", "error"):
            sink, added = await sent(one, vllm, make_request(reason, [5]))
            added.on_output(output([], reason))
            assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
        sink, added = await sent(one, vllm, make_request("x", [5]))
        added.on_output(ValueError("no"))
        assert (await sink.wait_error()).code is ErrorCode.INTERNAL


DEATH = type("EngineDeadError", (Exception,), {})


@in_loop
@pytest.mark.parametrize("told_by", ["its requests", "its process"])
@pytest.mark.parametrize("killed", [False, True])
async def test_a_crash_is_held_against_those_in_their_first_step_alone(told_by: str, killed: bool) -> None:
    async with running() as (one, vllm):
        vllm.max_num_batched_tokens, vllm.killed = 12, killed
        decoding, added = await sent(one, vllm, make_request("decoding", [5]))
        added.on_output(output([7]))
        first = [await sent(one, vllm, make_request(name, [5] * 8)) for name in ("one", "two")]
        waiting, last = await sent(one, vllm, make_request("no room in this step", [5]))
        vllm.gate.clear()
        not_there = one.generate(make_request("on its way", [5]))
        if told_by == "its requests":
            for each in (last, added, *(added for _, added in first)):
                each.on_output(DEATH("gone"))
        assert vllm.died is not None
        vllm.died("gone")
        crashed = ErrorCode.ENGINE_DEAD if killed else ErrorCode.ENGINE_CRASHED
        assert [(await sink.wait_error()).code for sink, _ in first] == [crashed, crashed]
        for sink in (decoding, waiting, not_there):
            assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD


@in_loop
async def test_a_death_is_told_once_and_ends_everything() -> None:
    async with running() as (one, vllm):
        sink, _ = await sent(one, vllm, make_request("r", [5]))
        assert vllm.died is not None
        vllm.killed = True
        vllm.died("killed")
        vllm.died("killed")
        assert (await sink.wait_error()).code is ErrorCode.ENGINE_DEAD
        assert one.host.dead == ["killed"]
        assert (await one.generate(make_request("late", [5])).wait_error()).code is ErrorCode.ENGINE_DEAD


@in_loop
async def test_lora_adapters_go_by_name() -> None:
    async with running(lora_modules={"a": "org/a", "b": "org/b"}) as (one, vllm):
        assert "--enable-lora" in vllm.arguments
        request = make_request("r", [5])
        with_lora = EngineRequest(request.request_id, request.prompt_ids, request.sampling, lora_name="b", priority=3)
        _, added = await sent(one, vllm, with_lora)
        assert (added.lora, added.priority) == (("b", 2, "org/b"), 3)
        unknown = EngineRequest(RequestId("u"), request.prompt_ids, request.sampling, lora_name="c")
        error = await one.generate(unknown).wait_error()
        assert error.code is ErrorCode.MODEL_NOT_FOUND and "a, b" in error.message
        added.on_output(output([1], "stop"))


def write_adapter(directory: Path, rank: int = 8) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return str(directory)


@in_loop
async def test_adapters_come_and_go_while_it_runs() -> None:
    with tempfile.TemporaryDirectory() as made:
        path = write_adapter(Path(made) / "a")
        async with running(enable_lora=True) as (one, vllm):
            engine = one.engine
            assert isinstance(engine, LoraEngine) and not engine.adapters
            await engine.load_adapter("odd", path)
            assert (list(engine.adapters), vllm.loras) == (["odd"], [("odd", 1, path)])
            request = msgspec.structs.replace(make_request("r", [5]), lora_name="odd")
            _, added = await sent(one, vllm, request)
            assert added.lora == ("odd", 1, path)
            added.on_output(output([1], "stop"))
            await engine.unload_adapter("odd")
            assert vllm.loras == [] and not engine.adapters
            error = await one.generate(msgspec.structs.replace(request, request_id=RequestId("s"))).wait_error()
            assert error.code is ErrorCode.MODEL_NOT_FOUND
            # vLLM would take blocks of the one before for those of an equal name and path.
            await engine.load_adapter("odd", path)
            assert vllm.loras == [("odd", 2, f"{path}/.")]
            vllm.lora_error = ValueError("target module zz is not supported")
            with pytest.raises(StatorError, match="vLLM cannot load .*zz"):
                await engine.load_adapter("other", path)
            with pytest.raises(StatorError, match="rank of .* is 64, above max-lora-rank, which is 16"):
                await engine.load_adapter("big", write_adapter(Path(made) / "big", 64))
            assert list(engine.adapters) == ["odd"]
        async with running() as (one, _):
            assert isinstance(one.engine, LoraEngine)
            with pytest.raises(StatorError, match="enable-lora"):
                await one.engine.load_adapter("odd", path)
    with pytest.raises(ConfigError, match="lora-modules: a: there is no directory /nowhere"):
        async with running(lora_modules={"a": "/nowhere"}):
            pass


@in_loop
async def test_what_is_first_asked_for_is_told_until_there_is_a_result() -> None:
    async with running(enable_lora=True) as (one, vllm):

        def first_uses() -> int:
            return one.engine.load().num_first_uses

        _, plain = await sent(one, vllm, make_request("a", [5], max_tokens=9))
        assert first_uses() == 1
        plain.on_output(output([1]))
        assert first_uses() == 0
        _, plain = await sent(one, vllm, make_request("b", [5], max_tokens=9))
        assert first_uses() == 0
        _, gone = await sent(one, vllm, make_request("c", [5], max_tokens=9, min_p=0.5))
        assert first_uses() == 1
        one.engine.abort(RequestId("c"))
        assert first_uses() == 0, "of an aborted one nobody is told"
        await sent(one, vllm, make_request("d", [5], max_tokens=9, min_p=0.5))
        assert first_uses() == 1, "it had no result"
        with tempfile.TemporaryDirectory() as made:
            vllm.lora_gate.clear()
            loading = asyncio.create_task(one.engine.load_adapter("odd", write_adapter(Path(made) / "a")))
            await until(lambda: first_uses() == 2)
            vllm.lora_gate.set()
            await loading
            assert first_uses() == 1


def transfer(request: EngineRequest, port: int) -> dict[str, Any]:
    params = {"transfer_id": "t", "remote_instance_id": "p", "remote_addresses": [[f"tcp://127.0.0.1:{port}"]]}
    return result_transfer(
        params, connector=STATOR_CONNECTOR, transfer_id=TransferId("t"), request=request, num_cached_tokens=4
    )


@in_loop
async def test_a_transfer_goes_over_only_if_its_peer_lives_and_it_fits() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    request = make_request("r", [5] * 9)
    async with running() as (one, vllm):
        vllm.split = (0, 8)
        sink, added = await sent(one, vllm, with_transfer(request, transfer(request, port)))
        assert added.sampling["extra_args"]["kv_transfer_params"]["transfer_id"] == "t"
        added.on_output(output([1], "stop"))
        assert (sink.num_cached, sink.num_transferred) == (4, 8)
        other = make_request("o", [6] * 9)
        _, added = await sent(one, vllm, with_transfer(other, transfer(request, port), "o"))
        assert "extra_args" not in added.sampling, "made for other tokens"
        added.on_output(output([1], "stop"))
        sink, added = await sent(one, vllm, with_transfer(request, transfer(request, port), "failed"))
        added.on_output(output([], "error"))
        assert (await sink.wait_error()).code is ErrorCode.TRANSFER_FAILED
        server.close()
        await server.wait_closed()
        _, added = await sent(one, vllm, with_transfer(request, transfer(request, port), "late"))
        assert "extra_args" not in added.sampling, "nobody is there"
        added.on_output(output([1], "stop"))


@in_loop
async def test_a_prefill_is_handed_over_as_what_vllm_answered() -> None:
    async with running() as (one, vllm):
        sink = RecordingSink()
        request = make_request("p", [5] * 9)
        one.engine.prefill(request, sink)
        await until(lambda: bool(vllm.added))
        vllm.split = (4, 0)
        vllm.added[0].on_output(output([3], "length", {"do_remote_prefill": True}))
        result = sink.prefill_result
        assert (result.num_prompt_tokens, result.num_cached_tokens) == (9, 4)
        handed = msgspec.convert(result.transfer, VllmTransfer)
        assert (handed.num_tokens, handed.params) == (9, {"do_remote_prefill": True})
        empty = RecordingSink()
        one.engine.prefill(make_request("q", [5]), empty)
        await until(lambda: len(vllm.added) == 2)
        vllm.added[1].on_output(output([3], "length"))
        assert (await empty.wait_error()).code is ErrorCode.TRANSFER_FAILED


@in_loop
async def test_a_start_that_fails_leaves_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = VllmEngine(settings_from_section(SECTION), launcher=FakeLaunch(ConfigError("no such flag")))
    with pytest.raises(ConfigError, match="no such flag"):
        async with running_engines(engine):
            pass
    assert list(tmp_path.iterdir()) == []
    assert engine.load().num_blocks_used == 0


@in_loop
async def test_the_token_is_in_a_file_of_ours_and_not_in_the_arguments() -> None:
    async with running() as (_, vllm):
        assert "bench" not in " ".join(vllm.arguments)
        assert "token_file" in " ".join(vllm.arguments)


class FakeTensor(list[float]):
    """As far as the adapter reads a torch.Tensor."""

    def float(self) -> "FakeTensor":
        return self

    def cpu(self) -> "FakeTensor":
        return self

    def numpy(self) -> Any:
        return np.array(self)


@contextlib.asynccontextmanager
async def pooling() -> AsyncGenerator[tuple[BenchEngine, FakeVllm]]:
    launch = FakeLaunch(tasks=frozenset({"embed", "token_embed"}))
    async with running_engines(VllmEngine(settings_from_section(SECTION), launcher=launch)) as (one,):
        assert launch.vllm is not None
        yield one, launch.vllm


def embed(one: BenchEngine, name: str, ids: list[int], **fields: Any) -> RecordingSink:
    sink = RecordingSink()
    one.engine.embed(EmbedRequest(RequestId(name), pack(ids), **fields), sink)
    return sink


@in_loop
async def test_a_pooling_model_embeds_and_generates_nothing() -> None:
    async with pooling() as (one, vllm):
        assert one.info.can_embed
        sink = embed(one, "a", [5, 6], dimensions=2, priority=3)
        await until(lambda: bool(vllm.added))
        (added,) = vllm.added
        assert (added.sampling, added.priority) == ({"task": "embed", "dimensions": 2}, 3)
        data = SimpleNamespace(data=FakeTensor([0.5, -1.0]))
        added.on_output(SimpleNamespace(outputs=data, finished=True, error=None))
        (item,) = (await sink.wait()).received
        assert item == Embedding(np.array([0.5, -1.0], "<f4").tobytes(), 2)
        error = await one.generate(make_request("b", [5])).wait_error()
        assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, "model") and "/v1/embeddings" in error.message
        for name, ids, fields, param in (
            ("c", [5], {"dimensions": 3}, "dimensions"),
            ("d", [], {}, "input"),
            ("e", [5] * 300, {}, "input"),
            ("f", [2000], {}, "prompt_ids"),
        ):
            assert (await embed(one, name, ids, **fields).wait_error()).param == param
        failing = embed(one, "g", [5])
        await until(lambda: len(vllm.added) == 2)
        vllm.added[1].on_output(SimpleNamespace(outputs=None, finished=True, error="x"))
        assert (await failing.wait_error()).code is ErrorCode.INTERNAL
        left = embed(one, "h", [5])
        await until(lambda: len(vllm.added) == 3)
        one.engine.abort(RequestId("h"))
        assert (await left.wait_error()).code is ErrorCode.CANCELLED
        await until(lambda: vllm.aborted == ["core-h"])


@in_loop
async def test_a_model_that_generates_makes_no_embeddings() -> None:
    async with running() as (one, _):
        assert not one.info.can_embed
        error = await embed(one, "a", [5]).wait_error()
        assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, "model") and "vllm" in error.message
