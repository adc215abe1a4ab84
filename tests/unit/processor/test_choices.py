"""Several choices of one request: when each begins, and how all of them end."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from stator.errors import ErrorCode, StatorError
from stator.messages.engine import EngineRequest, FinishReason, TokenDelta
from stator.messages.openai import CompletionRequest
from stator.transport.base import Call

from .harness import Harness, answer_with, harness

WHOLE = "In the beginning God created the heaven and the earth"


def completion(prompt: Any = WHOLE, **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="tiny", prompt=prompt, max_tokens=20, **fields)


def run(scene: Callable[[Harness], Any], **options: Any) -> None:
    async def main() -> None:
        async with harness(**options) as case:
            await scene(case)
            await case.router.until_no_booking()
            assert case.processor.num_open == 0

    asyncio.run(asyncio.wait_for(main(), 20))


async def begun(case: Harness) -> int:
    """How many choices have been sent, once nothing is on its way any more."""
    before = -1
    while before != len(case.workers["w1"].calls):
        before = len(case.workers["w1"].calls)
        for _ in range(10):
            await asyncio.sleep(0)
    return before


def test_the_others_begin_when_the_first_has_its_first_token() -> None:
    async def scene(case: Harness) -> None:
        got = case.open("completions", completion(n=3, seed=5))
        worker = case.workers["w1"]
        first = await worker.call()
        assert await begun(case) == 1
        first.items([TokenDelta([5], None, 0)])
        assert await begun(case) == 3
        requests: list[EngineRequest] = [call.request for call in worker.calls]
        assert [request.sampling.seed for request in requests] == [5, 6, 7]
        assert len({request.request_id for request in requests}) == 3
        assert len({bytes(request.prompt_ids) for request in requests}) == 1
        for call in worker.calls:
            call.items([TokenDelta([6], FinishReason.LENGTH, 8)])
            call.end()
        await got.done()
        assert got.error is None
        assert sorted(delta.choice for delta in got.deltas if delta.ending is not None) == [0, 1, 2]
        assert [delta.usage is not None for delta in got.deltas] == [False] * (len(got.deltas) - 1) + [True]
        usage = got.deltas[-1].usage
        assert usage is not None and usage.completion_tokens == 4
        assert usage.prompt_tokens_details.cached_tokens == 0, "what the first found"

    run(scene)


def test_where_there_is_nothing_to_share_all_begin_at_once() -> None:
    async def scene(case: Harness) -> None:
        got = case.open("completions", completion("a", n=3))
        assert await begun(case) == 3
        for call in case.workers["w1"].calls:
            answer_with([5, 6])(call)
        await got.done()
        assert got.error is None

    run(scene)


def test_the_first_of_every_prompt_begins() -> None:
    async def scene(case: Harness) -> None:
        got = case.open("completions", completion([WHOLE, WHOLE + "."], n=2))
        assert await begun(case) == 2
        for index in range(4):
            answer_with([5, 6])(await case.workers["w1"].call(index))
        await got.done()
        usage = got.deltas[-1].usage
        assert usage is not None and usage.completion_tokens == 8
        sizes = [len(call.request.prompt_ids) // 4 for call in case.workers["w1"].calls]
        assert usage.prompt_tokens == sum(sorted(sizes)[::2])

    run(scene)


@pytest.mark.parametrize("started", [False, True])
def test_what_one_choice_fails_of_ends_the_request(started: bool) -> None:
    async def scene(case: Harness) -> None:
        got = case.open("completions", completion("a", n=3))
        assert await begun(case) == 3
        calls: list[Call] = case.workers["w1"].calls
        if started:
            calls[0].items([TokenDelta([5], None, 0)])
        calls[1].end(StatorError(ErrorCode.INVALID_REQUEST, "no", param="x"))
        await got.done()
        assert got.error is not None and (got.error.code, got.error.param) == (ErrorCode.INVALID_REQUEST, "x")
        await case.workers["w1"].until(lambda: case.workers["w1"].num_cancelled == 2)

    run(scene)


@pytest.mark.parametrize("first_token", [False, True])
def test_a_client_that_leaves_cancels_what_runs_and_nothing_more_begins(first_token: bool) -> None:
    async def scene(case: Harness) -> None:
        got = case.open("completions", completion(n=3))
        worker = case.workers["w1"]
        call = await worker.call()
        if first_token:
            call.items([TokenDelta([5], None, 0)])
            assert await begun(case) == 3
        assert got.handle is not None
        got.handle.cancel()
        await worker.until(lambda: worker.num_cancelled == len(worker.calls))
        assert await begun(case) == (3 if first_token else 1)

    run(scene)


def test_a_deadline_ends_all() -> None:
    async def scene(case: Harness) -> None:
        got = await case.open("completions", completion("a", n=2), seconds=0.2).done()
        assert got.error is not None and got.error.code is ErrorCode.DEADLINE
        await case.workers["w1"].until(lambda: case.workers["w1"].num_cancelled == 2)

    run(scene)


def test_closing_ends_all() -> None:
    async def scene(case: Harness) -> None:
        got = case.open("completions", completion("a", n=3))
        assert await begun(case) == 3
        await case.processor.close()
        await got.done()
        assert got.error is not None and got.error.code is ErrorCode.DRAINING

    run(scene)


def test_an_engine_that_gives_no_probabilities_is_no_answer_without_them() -> None:
    async def scene(case: Harness) -> None:
        case.workers["w1"].script = answer_with([5, 6])
        got = await case.open("completions", completion(logprobs=1)).done()
        assert got.error is not None and got.error.code is ErrorCode.PROTOCOL

    run(scene)
