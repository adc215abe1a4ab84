"""What the Processor does with what discovery tells it: deaths that no connection shows, engines that cannot resume,
and instances that come when a request waits for one."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from stator.discovery.base import Lease
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.errors import Ending, ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo, EngineRequest, FinishReason, TokenDelta
from stator.messages.instances import InstanceInfo, InstanceState
from stator.messages.openai import CompletionRequest
from stator.messages.tokens import unpack
from stator.runtime.directory import InstanceDirectory, register_instance, update_instance_state
from stator.testing.clock import run_virtual
from stator.transport.base import Endpoint

from .harness import FakeWorker, Harness, answer_with, harness

LOST = StatorError(ErrorCode.INSTANCE_LOST, "the connection was lost")
NOBODY = StatorError(ErrorCode.NO_INSTANCE, "no worker of tiny is ready", retry_after_s=2.0)
VLLM_CANNOT = ("seed", "presence_penalty", "frequency_penalty")


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(model="tiny", prompt="In the beginning", **{"max_tokens": 50, **fields})


@dataclass
class Registered:
    """Instances in discovery, and the directory that follows them. The router of these cases takes the first one that
    is in `offers` and not excluded."""

    discovery: MemoryDiscovery
    directory: InstanceDirectory
    leases: dict[str, tuple[Lease, InstanceInfo]] = field(default_factory=dict[str, tuple[Lease, InstanceInfo]])

    async def add(
        self, name: str, *, cannot_resume: tuple[str, ...] = (), cannot: tuple[str, ...] = (), visible: bool = True
    ) -> None:
        engine = EngineInfo("fake", "1", "tiny", 4, 64, 8, 64, 256, cannot_resume=cannot_resume, cannot=cannot)
        info = InstanceInfo(
            InstanceId(name), "W", "decode", (f"inproc://{name}",), ("generate",), "h", 1, model="tiny", engine=engine
        )
        lease = await self.discovery.grant_lease(3600.0)
        self.leases[name] = (lease, info)
        await register_instance(self.discovery, lease, info)
        await self.directory.wait_for(lambda d: d.get(info.instance_id) is not None, 5)

    async def remove(self, name: str) -> None:
        await self.leases[name][0].revoke()
        await self.directory.wait_for(lambda d: d.get(InstanceId(name)) is None, 5)


@asynccontextmanager
async def registered(names: dict[str, tuple[str, ...]], **options: Any) -> AsyncIterator[tuple[Harness, Registered]]:
    """names: instances with what their engines cannot resume."""
    discovery = MemoryDiscovery(MemoryKeyStore())
    directory = InstanceDirectory(discovery)
    await directory.start()
    known = Registered(discovery, directory)
    try:
        async with harness(list(names), directory=directory, **options) as case:
            case.router.no_instance = NOBODY
            for name, cannot_resume in names.items():
                await known.add(name, cannot_resume=cannot_resume)
            yield case, known
    finally:
        await directory.close()
        await discovery.close()


def scene(body: Callable[[], Any]) -> None:
    """On virtual time: waits of half a minute cost nothing."""
    run_virtual(body())


ANY = dict.fromkeys(("w1", "w2"), ())


def test_an_instance_that_discovery_lost_ends_its_attempts_at_once() -> None:
    async def body() -> None:
        async with registered(ANY) as (case, known):
            got = [case.open("completions", completion()) for _ in range(3)]
            calls = [await case.workers["w1"].call(index) for index in range(3)]
            for call in calls:
                call.items([TokenDelta([5, 6], None, 0)])
            await got[2].until(lambda: bool(got[2].deltas))
            # w1 is silent, not closed: no connection tells of it.
            await known.remove("w1")
            moved = [await case.workers["w2"].call(index) for index in range(3)]
            for call in moved:
                assert unpack(call.request.resume_ids) == [5, 6]
                answer_with([7])(call)
            for each in got:
                assert (await each.done()).error is None
            assert all(call.cancelled for call in calls), "what still lives there is told to stop"
            await case.router.until_no_booking()
            assert case.processor._instances.num_open == 0

    scene(body)


def test_nothing_is_sent_to_an_instance_that_has_left_though_the_router_still_offers_it() -> None:
    async def body() -> None:
        async with registered(ANY) as (case, known):
            await known.remove("w1")
            case.workers["w2"].script = answer_with([7])
            got = await case.open("completions", completion()).done()
            assert got.error is None
            assert not case.workers["w1"].calls
            assert [request.exclude for request in case.router.requests] == [(), ("w1",)]

    scene(body)


def test_an_instance_that_registers_again_under_its_id_is_used_again() -> None:
    async def body() -> None:
        async with registered(ANY) as (case, known):
            await known.remove("w1")
            await known.add("w1")
            case.workers["w1"].script = answer_with([7])
            assert (await case.open("completions", completion()).done()).error is None
            assert len(case.workers["w1"].calls) == 1

    scene(body)


def test_an_instance_that_this_process_has_not_heard_of_yet_is_used() -> None:
    async def body() -> None:
        async with registered({}) as (case, _):
            case.router.instances = ["w1"]
            case.workers["w1"].script = answer_with([7])
            assert (await case.open("completions", completion()).done()).error is None

    scene(body)


# Waiting


async def half_an_answer(case: Harness, **fields: Any) -> Any:
    got = case.open("completions", completion(**fields))
    call = await case.workers["w1"].call()
    call.items([TokenDelta([5, 6], None, 0)])
    await got.until(lambda: bool(got.deltas))
    return got, call


def test_half_an_answer_whose_only_worker_died_goes_on_with_the_next_that_comes() -> None:
    async def body() -> None:
        async with registered({"w1": ()}) as (case, known):
            loop = asyncio.get_running_loop()
            worker = case.workers["w2"] = FakeWorker()
            case.servers.append(server := case._server("w2", []))
            server.register(Endpoint("generate", EngineRequest, worker.generate))
            await server.start()
            got, _ = await half_an_answer(case)
            case.router.instances = []
            await known.remove("w1")
            await asyncio.sleep(7.3)
            assert not got.ended and got.text
            num_asked = len(case.router.requests)
            assert 4 <= num_asked <= 10, "asks now and then"
            case.router.instances = ["w2"]
            before = loop.time()
            await known.add("w2")
            call = await worker.call()
            assert loop.time() == before, "it is told, and need not wait for its next turn"
            assert unpack(call.request.resume_ids) == [5, 6]
            answer_with([7])(call)
            assert (await got.done()).error is None

    scene(body)


def test_the_wait_is_bounded_and_ends_with_503_and_a_time_to_come_back() -> None:
    async def body() -> None:
        async with registered({"w1": ()}, migration_wait_s=12.0) as (case, known):
            got, _ = await half_an_answer(case)
            case.router.instances = []
            await known.remove("w1")
            await asyncio.sleep(11.9)
            assert not got.ended
            await asyncio.sleep(0.2)
            assert got.ended
            assert got.error is not None and got.error.info.status == 503
            assert got.error.retry_after_s == 2.0 and "2 tokens" in got.error.message
            assert case.processor.num_open == 0 and not case.processor._instances._waiting

    scene(body)


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_a_wait_ends_with_its_request(how: str) -> None:
    async def body() -> None:
        async with registered({"w1": ()}) as (case, known):
            got = case.open("completions", completion(), seconds=5.0 if how == "deadline" else None)
            call = await case.workers["w1"].call()
            call.items([TokenDelta([5], None, 0)])
            await got.until(lambda: bool(got.deltas))
            case.router.instances = []
            await known.remove("w1")
            await asyncio.sleep(1)
            assert len(case.processor._instances._waiting) == 1
            if how == "cancelled":
                assert got.handle is not None
                got.handle.cancel()
            await got.done()
            assert got.error is not None and got.error.code.value == how
            num_asked = len(case.router.requests)
            await asyncio.sleep(40)
            assert len(case.router.requests) == num_asked and not case.processor._instances._waiting

    scene(body)


def test_without_a_token_a_request_whose_workers_are_all_gone_is_refused_at_once() -> None:
    async def body() -> None:
        async with registered({"w1": ()}) as (case, known):
            got = case.open("completions", completion())
            await case.workers["w1"].call()
            case.router.instances = []
            begin = asyncio.get_running_loop().time()
            await known.remove("w1")
            await got.done()
            assert asyncio.get_running_loop().time() == begin
            assert got.error is not None
            assert (got.error.code, got.error.retry_after_s) == (ErrorCode.NO_INSTANCE, 2.0)

    scene(body)


@pytest.mark.parametrize("code", ["instance_lost", "overloaded", "stale_instance"])
def test_retries_of_an_only_worker_that_fails_on_and_on_do_not_spin(code: str) -> None:
    async def body() -> None:
        async with registered({"w1": ()}) as (case, _):
            case.router.falls_back = True
            worker = case.workers["w1"]
            worker.script = answer_with([], error=StatorError(ErrorCode(code), "no"))
            got = await case.open("completions", completion()).done()
            assert got.error is not None and got.error.info.status in (503, 429) and got.error.retry_after_s
            assert 2 <= len(worker.calls) <= 6 and len(case.router.requests) <= 8
            # Half an answer tries for longer, and goes on when the worker is back.
            worker.script, num_before = None, len(worker.calls)
            got = case.open("completions", completion())
            call = await worker.call(num_before)
            call.items([TokenDelta([5], None, 0)])
            await got.until(lambda: bool(got.deltas))
            worker.script = answer_with([], error=StatorError(ErrorCode(code), "no"))
            call.end(StatorError(ErrorCode(code), "no"))
            await asyncio.sleep(10)
            assert not got.ended and len(worker.calls) - num_before < 12
            worker.script = answer_with([7])
            assert (await got.done()).error is None

    scene(body)


# Engines that cannot resume


def test_a_parameter_that_no_engine_left_can_resume_ends_with_one_clear_error() -> None:
    async def body() -> None:
        async with registered(dict.fromkeys(("w1", "w2"), VLLM_CANNOT)) as (case, _):
            for fields, param in (
                ({"seed": 3}, "seed"),
                ({"presence_penalty": 0.5, "temperature": 0}, "presence_penalty"),
            ):
                case.workers["w1"].calls.clear()
                got, call = await half_an_answer(case, **fields)
                call.end(LOST)
                await got.done()
                assert got.error is not None
                assert (got.error.code, got.error.param) == (ErrorCode.NOT_RESUMABLE, param)
                assert "2 tokens" in got.error.message and "Nothing else was wrong" in got.error.message
                assert all(delta.ending is None for delta in got.deltas)
            assert not case.workers["w2"].calls
            await case.router.until_no_booking()

    scene(body)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0, "seed": 3}, {"repetition_penalty": 1.2}])
def test_what_is_not_in_the_way_goes_on(fields: dict[str, Any]) -> None:
    """A seed that the Processor drew is nobody's wish; a greedy request draws nothing."""

    async def body() -> None:
        async with registered(dict.fromkeys(("w1", "w2"), VLLM_CANNOT)) as (case, _):
            case.workers["w2"].script = answer_with([7])
            got, call = await half_an_answer(case, **fields)
            call.end(LOST)
            assert (await got.done()).error is None

    scene(body)


def test_before_its_first_token_any_request_goes_elsewhere() -> None:
    async def body() -> None:
        async with registered(dict.fromkeys(("w1", "w2"), VLLM_CANNOT)) as (case, _):
            case.workers["w1"].script = answer_with([], error=LOST)
            case.workers["w2"].script = answer_with([7])
            assert (await case.open("completions", completion(seed=3)).done()).error is None

    scene(body)


def test_in_a_mixed_deployment_it_goes_on_where_it_can() -> None:
    async def body() -> None:
        async with registered({"w1": VLLM_CANNOT, "w2": VLLM_CANNOT, "w3": ()}) as (case, known):
            case.workers["w3"].script = answer_with([7])
            got, call = await half_an_answer(case, seed=3)
            call.end(LOST)
            assert (await got.done()).error is None
            assert set(case.router.requests[-1].exclude) == {"w1", "w2"}
            # Should the router have nobody else after all, the request is not sent there.
            case.router.falls_back = True
            case.workers["w1"].calls.clear()
            case.router.instances = ["w1", "w2"]
            got, call = await half_an_answer(case, seed=3)
            call.end(LOST)
            await got.done()
            assert got.error is not None and got.error.code is ErrorCode.NOT_RESUMABLE
            assert not case.workers["w2"].calls
            assert known.directory.get(InstanceId("w3")) is not None

    scene(body)


# Poison, and answers that are none


def test_a_request_is_refused_after_its_second_victim_and_the_log_names_both(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with registered(dict.fromkeys(("w1", "w2", "w3"), ())) as (case, _):
            crash = StatorError(ErrorCode.ENGINE_CRASHED, "MemoryError in the engine's step")
            case.workers["w1"].script = answer_with([], error=crash)
            case.workers["w2"].script = answer_with(
                [],
                error=StatorError(
                    ErrorCode.ENGINE_CRASHED, "its prefill engine died", instance_id=InstanceId("prefill-7")
                ),
            )
            with caplog.at_level(logging.ERROR):
                got = await case.open("completions", completion()).done()
            assert got.error is not None and got.error.code is ErrorCode.POISON_REQUEST
            assert not case.workers["w3"].calls
            (record,) = [each for each in caplog.records if "is refused" in each.getMessage()]
            assert all(name in record.getMessage() for name in ("r1", "w1", "prefill-7"))

    scene(body)


def test_an_engine_that_finishes_without_a_token_is_no_empty_answer() -> None:
    async def body() -> None:
        async with registered(ANY) as (case, _):
            for reason in FinishReason:
                for item in (TokenDelta([], reason), TokenDelta([], reason, 0)):
                    case.workers["w1"].script = lambda call, item=item: (call.items([item]), call.end())
                    got = await case.open("completions", completion()).done()
                    assert got.error is not None and got.error.code is ErrorCode.PROTOCOL
                    assert not got.deltas
            case.workers["w1"].script = lambda call: call.end()
            got = await case.open("completions", completion()).done()
            assert got.error is not None and got.error.code is ErrorCode.PROTOCOL
            await case.router.until_no_booking()

    scene(body)


def test_a_draining_instance_is_no_lost_one() -> None:
    async def body() -> None:
        async with registered(ANY) as (case, known):
            got, call = await half_an_answer(case)
            lease, info = known.leases["w1"]
            await update_instance_state(known.discovery, lease, info, InstanceState.DRAINING)
            await known.directory.wait_for(lambda d: d.instances(role="decode")[0].instance_id == "w2", 5)
            answer_with([7])(call)
            assert (await got.done()).error is None and got.deltas[-1].ending is Ending.LENGTH
            assert not case.workers["w2"].calls

    scene(body)


def test_what_no_engine_of_the_model_has_is_refused_before_it_is_routed() -> None:
    async def body() -> None:
        async with registered({}) as (case, known):
            await known.add("w1", cannot=("logprobs",))
            got = await case.open("completions", completion(logprobs=1)).done()
            assert got.error is not None
            assert (got.error.code, got.error.param) == (ErrorCode.UNSUPPORTED, "logprobs")
            assert "fake" in got.error.message and not case.router.requests
            case.workers["w1"].script = answer_with([5])
            assert (await case.open("completions", completion()).done()).error is None
            # One that may have it decides itself.
            await known.add("w2")
            case.router.requests.clear()
            case.workers["w1"].script = answer_with([5], error=StatorError(ErrorCode.UNSUPPORTED, "no", param="x"))
            assert (await case.open("completions", completion(logprobs=1)).done()).error is not None
            assert case.router.requests
            await known.remove("w2")
            await known.remove("w1")
            assert case.processor.num_open == 0

    scene(body)
