"""Endpoint embeddings of a Processor, over the in-process request plane, with workers that follow a script."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId, RequestId
from stator.messages.embeddings import Embedding, EmbeddingsRequest, EmbedRequest
from stator.messages.tokens import num_tokens, unpack
from stator.processor import embeddings, processor
from stator.runtime.context import CallContext
from stator.transport import calls
from stator.transport.base import Call, Endpoint, Target

from .harness import TIMEOUT_S, FakeWorker, Harness, harness


def run(test: Callable[["Case"], Awaitable[None]], workers: list[str] | None = None, **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(TIMEOUT_S), harness(workers, **options) as made:
            case = Case(made)
            await test(case)
            await made.router.until_no_booking()
            assert made.processor.num_open == 0
            assert made.processor._instances.num_open == 0

    asyncio.run(main())


def answer(call: Call) -> None:
    """A vector that names its input."""
    request: EmbedRequest = call.request
    call.items([Embedding(bytes([unpack(request.prompt_ids)[-1] % 256]), num_tokens(request.prompt_ids))])
    call.end()


class Case:
    """workers: what gets `embed`; the script of each is `answer` unless the test says otherwise."""

    def __init__(self, made: Harness) -> None:
        self.harness = made
        self.workers: dict[str, FakeWorker] = {}
        for server in made.servers:
            name = str(server.identity.instance_id)
            if name in made.workers:
                worker = self.workers[name] = FakeWorker()
                worker.script = answer
                server.register(Endpoint("embed", EmbedRequest, worker.generate))

    async def ask(self, given: Any, **fields: Any) -> dict[int, Embedding]:
        request = EmbeddingsRequest(model="tiny", input=given, **fields)
        context = CallContext(RequestId("r"))
        target = Target(("inproc://processor",), "embeddings")
        found: dict[int, Embedding] = {}
        async for items in calls.stream(self.harness.client, target, request, context=context, item_type=Embedding):
            for item in items:
                assert item.index not in found
                found[item.index] = item
        return found

    async def refusal(self, given: Any, **fields: Any) -> StatorError:
        with pytest.raises(StatorError) as refused:
            await self.ask(given, **fields)
        return refused.value


@pytest.mark.parametrize("thread_chars", [1, 8192], ids=["on the thread", "at once"])
def test_each_input_is_routed_by_itself_and_keeps_its_number(thread_chars: int) -> None:
    async def test(case: Case) -> None:
        found = await case.ask([[5, 6], [7], [8, 9, 10]], priority=3, cache_salt="s", dimensions=4)
        assert {index: (item.vector, item.num_tokens) for index, item in found.items()} == {
            0: (b"\x06", 2), 1: (b"\x07", 1), 2: (b"\x0a", 3)
        }  # fmt: skip
        for call in case.workers["w1"].calls:
            request: EmbedRequest = call.request
            assert (request.priority, request.cache_salt, request.dimensions) == (3, "s", 4)
        routed = case.harness.router.requests
        assert [(each.num_prompt_tokens, each.max_tokens, each.priority) for each in routed] == [
            (2, 1, 3), (1, 1, 3), (3, 1, 3)
        ]  # fmt: skip
        text = "Hello there"
        (item,) = (await case.ask(text)).values()
        assert item.num_tokens == num_tokens(case.harness.tokenizer.encode(text, add_special_tokens=True))

    run(test, thread_chars=thread_chars)


def test_only_so_many_inputs_are_under_way_at_once() -> None:
    async def test(case: Case) -> None:
        worker = case.workers["w1"]
        worker.script = None
        asked = asyncio.create_task(case.ask([[n % 300 + 1] for n in range(embeddings.INPUTS_AT_ONCE + 5)]))
        await worker.call(embeddings.INPUTS_AT_ONCE - 1)
        assert len(case.harness.router.requests) == embeddings.INPUTS_AT_ONCE
        worker.script = answer
        for call in list(worker.calls):
            answer(call)
        assert len(await asked) == embeddings.INPUTS_AT_ONCE + 5

    run(test)


@pytest.mark.parametrize("code", [ErrorCode.INSTANCE_LOST, ErrorCode.ENGINE_DEAD, ErrorCode.DRAINING])
def test_an_input_whose_instance_failed_goes_to_another(code: ErrorCode) -> None:
    async def test(case: Case) -> None:
        case.workers["w1"].script = lambda call: call.end(StatorError(code, "gone"))
        assert len(await case.ask([[5], [6]])) == 2
        assert case.harness.router.requests[-1].exclude == (InstanceId("w1"),)
        assert len(case.workers["w2"].calls) == 2

    run(test, workers=["w1", "w2"])


def test_an_input_is_not_tried_for_ever() -> None:
    async def test(case: Case) -> None:
        for worker in case.workers.values():
            worker.script = lambda call: call.end(StatorError(ErrorCode.ENGINE_DEAD, "gone"))
        assert (await case.refusal([5])).code is ErrorCode.ENGINE_DEAD
        assert sum(len(worker.calls) for worker in case.workers.values()) == 2

    run(test, workers=["w1", "w2", "w3"], migration_limit=1)


def test_an_input_that_engines_crash_of_is_given_to_no_third() -> None:
    async def test(case: Case) -> None:
        for worker in case.workers.values():
            worker.script = lambda call: call.end(StatorError(ErrorCode.ENGINE_CRASHED, "crashed"))
        assert (await case.refusal([5])).code is ErrorCode.POISON_REQUEST

    run(test, workers=["w1", "w2", "w3"])


def test_what_one_input_fails_of_ends_the_request_and_stops_the_others() -> None:
    async def test(case: Case) -> None:
        worker = case.workers["w1"]

        def script(call: Call) -> None:
            request: EmbedRequest = call.request
            if unpack(request.prompt_ids) == [6]:
                call.end(StatorError(ErrorCode.UNSUPPORTED, "no", param="dimensions"))

        worker.script = script
        error = await case.refusal([[5], [6], [7]], dimensions=3)
        assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, "dimensions")
        await worker.until(lambda: worker.num_cancelled == 2)

    run(test)


def test_a_caller_that_leaves_takes_its_inputs_along() -> None:
    async def test(case: Case) -> None:
        worker = case.workers["w1"]
        worker.script = None
        asked = asyncio.create_task(case.ask([[5], [6]]))
        await worker.call(1)
        asked.cancel()
        await worker.until(lambda: worker.num_cancelled == 2)

    run(test)


def test_no_router_and_no_room_are_told_as_for_any_request() -> None:
    async def test(case: Case) -> None:
        case.harness.router.failures = [StatorError(ErrorCode.OVERLOADED, "full", retry_after_s=3.0)]
        error = await case.refusal([5])
        assert (error.code, error.retry_after_s) == (ErrorCode.OVERLOADED, 3.0)
        case.harness.router.failures = [StatorError(ErrorCode.INSTANCE_LOST, "the router left")]
        assert len(await case.ask([5])) == 1

    run(test)


def test_a_worker_that_ends_without_a_vector_is_no_success() -> None:
    async def test(case: Case) -> None:
        case.workers["w1"].script = lambda call: call.end()
        assert (await case.refusal([5])).code is ErrorCode.PROTOCOL

    run(test)


def test_a_processor_that_stops_tells_those_who_wait() -> None:
    async def test(case: Case) -> None:
        worker = case.workers["w1"]
        worker.script = None
        asked = asyncio.create_task(case.refusal([[5], [6]]))
        await worker.call(1)
        drained = asyncio.create_task(case.harness.processor.drain())
        await asyncio.sleep(0)
        assert not drained.done() and case.harness.processor.num_open == 1
        await case.harness.processor.close()
        assert (await asked).code is ErrorCode.DRAINING
        assert (await case.refusal([5])).code is ErrorCode.DRAINING
        await drained

    run(test)


def test_a_flood_of_long_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "MAX_WAITING", 1)

    async def test(case: Case) -> None:
        gate, encode = threading.Event(), case.harness.tokenizer.encode

        def slow(text: str, *, add_special_tokens: bool) -> Any:
            assert gate.wait(10)
            return encode(text, add_special_tokens=add_special_tokens)

        monkeypatch.setattr(case.harness.tokenizer, "encode", slow)
        first = asyncio.create_task(case.ask("first"))
        while not case.harness.processor.num_open:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert (await case.refusal("second")).code is ErrorCode.OVERLOADED
        gate.set()
        assert len(await first) == 1

    run(test, thread_chars=1)
