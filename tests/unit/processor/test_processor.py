"""The Processor end to end over the in-process request plane."""

import asyncio
import threading
from typing import Any

import pytest

from stator.core.hashing import block_hashes
from stator.errors import Ending, ErrorCode, StatorError
from stator.messages.engine import EngineRequest, FinishReason, TokenDelta
from stator.messages.openai import ChatCompletionRequest, ChatMessage, CompletionRequest
from stator.messages.tokens import TokenBuffer, num_tokens, unpack
from stator.messages.tools import Tool

from .harness import Harness, answer_with, harness

LOST = StatorError(ErrorCode.INSTANCE_LOST, "instance w1 was lost")


def chat(text: str = "Hello", **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="tiny", messages=[ChatMessage("user", text)], **fields)


def completion(prompt: Any = "In the beginning", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="tiny", prompt=prompt, **fields)


def ids_of(case: Harness, text: str) -> list[int]:
    return unpack(case.tokenizer.encode(text, add_special_tokens=False))


def test_a_chat_is_rendered_tokenized_hashed_routed_and_streamed() -> None:
    async def run() -> None:
        async with harness() as case:
            answer = ids_of(case, "Grüße 🙂!")
            case.workers["w1"].script = answer_with(answer, cached=3)
            got = await case.open("chat", chat(temperature=0, max_tokens=50)).done()
            assert (got.error, got.text) == (None, "Grüße 🙂!")
            sent: EngineRequest = case.workers["w1"].calls[0].request
            rendered = "<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
            assert case.tokenizer.decode(unpack(sent.prompt_ids), skip_special_tokens=False) == rendered
            assert (sent.sampling.max_tokens, sent.sampling.seed, sent.resume_ids) == (50, None, b"")
            route = case.router.requests[0]
            assert route.block_hashes == block_hashes(sent.prompt_ids, 4, model="tiny")
            assert (route.num_prompt_tokens, route.max_tokens) == (num_tokens(sent.prompt_ids), 50)
            last = got.deltas[-1]
            assert last.ending is Ending.LENGTH and last.usage is not None
            assert last.usage.prompt_tokens == num_tokens(sent.prompt_ids)
            assert last.usage.completion_tokens == len(answer) == sum(delta.num_tokens for delta in got.deltas)
            assert last.usage.prompt_tokens_details.cached_tokens == 3
            assert [delta.instance_id for delta in got.deltas] == ["w1"] + [None] * (len(got.deltas) - 1)
            assert all(delta.ending is None and delta.usage is None for delta in got.deltas[:-1])

    asyncio.run(run())


def test_deltas_of_one_frame_become_one() -> None:
    async def run() -> None:
        async with harness() as case:
            got = case.open("completions", completion())
            call = await case.workers["w1"].call()
            answer = ids_of(case, "the heaven and the earth")
            call.items([TokenDelta(answer[:1], None, 0), TokenDelta(answer[1:2])])
            await got.until(lambda: len(got.deltas) == 1)
            call.items([TokenDelta([token_id]) for token_id in answer[2:]])
            await got.until(lambda: len(got.deltas) == 2)
            call.items([TokenDelta([case.tokenizer.num_ids - 1][:0], FinishReason.LENGTH)])
            call.end()
            await got.done()
            assert [delta.num_tokens for delta in got.deltas] == [2, len(answer) - 2, 0]
            assert got.text == "the heaven and the earth"

    asyncio.run(run())


def test_the_booking_lives_as_long_as_the_request() -> None:
    async def run() -> None:
        async with harness() as case:
            got = case.open("completions", completion())
            call = await case.workers["w1"].call()
            assert case.router.num_bookings == 1
            answer_with([5, 6])(call)
            await got.done()
            await case.router.until_no_booking()
            assert case.workers["w1"].num_cancelled == 0

    asyncio.run(run())


@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_stop_string_ends_the_output_and_the_engine(size: int) -> None:
    async def run() -> None:
        async with harness() as case:
            got = case.open("completions", completion(stop=["earth", "##"], max_tokens=100))
            call = await case.workers["w1"].call()
            ids = ids_of(case, "the heaven and the earth the waters")
            for at in range(0, len(ids), size):
                call.items([TokenDelta(ids[at : at + size])])
            await got.done()
            assert (got.error, got.text, got.deltas[-1].ending) == (None, "the heaven and the ", Ending.STOP)
            assert [delta.stop_string for delta in got.deltas] == [None] * (len(got.deltas) - 1) + ["earth"]
            await case.workers["w1"].until(lambda: case.workers["w1"].num_cancelled == 1)
            await case.router.until_no_booking()
            usage = got.deltas[-1].usage
            assert usage is not None
            shown = case.tokenizer.decode(ids[: usage.completion_tokens])
            assert "earth" in shown and "earth" not in case.tokenizer.decode(ids[: usage.completion_tokens - 1])

    asyncio.run(run())


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    async def run() -> None:
        async with harness() as case:
            case.workers["w1"].script = answer_with(ids_of(case, "the ear"))
            got = await case.open("completions", completion(stop="earth")).done()
            assert (got.text, got.deltas[-1].ending) == ("the ear", Ending.LENGTH)

    asyncio.run(run())


def test_min_tokens_keeps_stop_strings_from_matching() -> None:
    async def run() -> None:
        async with harness() as case:
            ids = ids_of(case, "earth the earth")
            case.workers["w1"].script = answer_with(ids)
            first = len(ids_of(case, "earth"))
            got = await case.open("completions", completion(stop="earth", min_tokens=first)).done()
            assert (got.text, got.deltas[-1].ending) == ("earth the ", Ending.STOP)

    asyncio.run(run())


def test_the_token_that_ends_the_output_is_counted_but_not_shown() -> None:
    async def run() -> None:
        async with harness() as case:
            ids = ids_of(case, "the heaven!")
            case.workers["w1"].script = answer_with(ids, finish=FinishReason.STOP)
            got = await case.open("completions", completion(stop_token_ids=[ids[-1]])).done()
            assert (got.text, got.deltas[-1].ending) == ("the heaven", Ending.STOP)
            assert got.deltas[-1].usage is not None and got.deltas[-1].usage.completion_tokens == len(ids)

    asyncio.run(run())


def test_cancelling_reaches_router_and_engine() -> None:
    async def run() -> None:
        async with harness() as case:
            got = case.open("completions", completion())
            call = await case.workers["w1"].call()
            call.items([TokenDelta([5], None, 0)])
            await got.until(lambda: bool(got.deltas))
            assert got.handle is not None
            got.handle.cancel()
            await got.done()
            assert got.error is not None and got.error.code is ErrorCode.CANCELLED
            await case.workers["w1"].until(lambda: case.workers["w1"].num_cancelled == 1)
            await case.router.until_no_booking()
            await case.processor.drain()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_waiting_at_the_router_is_left_at_once(how: str) -> None:
    async def run() -> None:
        async with harness() as case:
            case.router.answers = False
            got = case.open("completions", completion(), seconds=0.1 if how == "deadline" else None)
            await case.router.until_asked()
            if how == "cancelled":
                assert got.handle is not None
                got.handle.cancel()
            await got.done()
            assert got.error is not None and got.error.code.value == how
            await case.router.until_no_booking()
            await case.processor.drain()
            assert not case.workers["w1"].calls

    asyncio.run(run())


def test_a_deadline_ends_everything() -> None:
    async def run() -> None:
        async with harness() as case:
            got = case.open("completions", completion(), seconds=0.05)
            call = await case.workers["w1"].call()
            assert call.context.deadline is not None
            await got.done()
            assert got.error is not None and got.error.code is ErrorCode.DEADLINE
            await case.router.until_no_booking()

    asyncio.run(run())


def test_a_lost_worker_is_continued_elsewhere_with_the_ids_received() -> None:
    async def run() -> None:
        async with harness(["w1", "w2"]) as case:
            ids = ids_of(case, "Grüße an die 🙂 Welt")
            case.workers["w1"].script = answer_with(ids[:9], cached=4, error=LOST)
            case.workers["w2"].script = answer_with(ids[9:], cached=1)
            got = await case.open("completions", completion(stop=["never"], max_tokens=30)).done()
            assert (got.error, got.text) == (None, "Grüße an die 🙂 Welt")
            first, second = (case.workers[name].calls[0].request for name in ("w1", "w2"))
            assert unpack(second.resume_ids) == ids[:9]
            assert second.sampling == first.sampling and first.sampling.seed is not None
            assert second.prompt_ids == first.prompt_ids
            assert case.router.requests[1].exclude == ("w1",)
            assert [request.resumed for request in case.router.requests] == [False, True]
            usage = got.deltas[-1].usage
            assert usage is not None and usage.completion_tokens == len(ids)
            assert usage.prompt_tokens_details.cached_tokens == 4
            await case.router.until_no_booking()

    asyncio.run(run())


@pytest.mark.parametrize("code", ["stale_instance", "draining", "engine_dead", "overloaded"])
def test_a_refused_request_is_tried_elsewhere(code: str) -> None:
    async def run() -> None:
        async with harness(["w1", "w2"]) as case:
            case.workers["w1"].script = answer_with([], error=StatorError(ErrorCode(code), "no"))
            case.workers["w2"].script = answer_with([5, 6])
            got = await case.open("completions", completion()).done()
            assert got.error is None and got.deltas[-1].ending is Ending.LENGTH
            assert got.deltas[0].instance_id == "w2"

    asyncio.run(run())


def test_migration_has_a_limit() -> None:
    async def run() -> None:
        async with harness(["w1", "w2", "w3"], migration_limit=1) as case:
            for worker in case.workers.values():
                worker.script = answer_with([5], error=LOST)
            got = await case.open("completions", completion()).done()
            assert got.error is not None and got.error.code is ErrorCode.INSTANCE_LOST
            assert len(case.router.requests) == 2
            await case.router.until_no_booking()

    asyncio.run(run())


def test_a_failure_of_the_request_itself_is_final() -> None:
    async def run() -> None:
        async with harness(["w1", "w2"]) as case:
            refusal = StatorError(ErrorCode.INVALID_REQUEST, "needs 9 KV blocks", param="max_tokens")
            case.workers["w1"].script = answer_with([], error=refusal)
            got = await case.open("completions", completion()).done()
            assert got.error is not None
            assert (got.error.code, got.error.message, got.error.param) == (
                ErrorCode.INVALID_REQUEST,
                "needs 9 KV blocks",
                "max_tokens",
            )
            assert not case.workers["w2"].calls

    asyncio.run(run())


def test_no_instance_is_passed_on_with_its_retry_time() -> None:
    async def run() -> None:
        async with harness() as case:
            case.router.failures = [StatorError(ErrorCode.NO_INSTANCE, "none yet", retry_after_s=2.0)]
            got = await case.open("completions", completion()).done()
            assert got.error is not None
            assert (got.error.code, got.error.retry_after_s) == (ErrorCode.NO_INSTANCE, 2.0)

    asyncio.run(run())


def test_an_overloaded_only_instance_is_reported_as_overloaded() -> None:
    async def run() -> None:
        async with harness() as case:
            case.workers["w1"].script = answer_with([], error=StatorError(ErrorCode.OVERLOADED, "full"))
            case.router.no_instance = StatorError(ErrorCode.NO_INSTANCE, "no other")
            got = await case.open("completions", completion()).done()
            assert got.error is not None and got.error.code is ErrorCode.OVERLOADED

    asyncio.run(run())


def test_the_loss_of_the_router_does_not_end_a_running_stream() -> None:
    async def run() -> None:
        async with harness() as case:
            got = case.open("completions", completion())
            call = await case.workers["w1"].call()
            case.router.calls[0].end(LOST)
            call.items([TokenDelta(ids_of(case, "the"), None, 0)])
            await got.until(lambda: bool(got.deltas))
            call.items([TokenDelta([], FinishReason.STOP)])
            call.end()
            await got.done()
            assert (got.error, got.text, got.deltas[-1].ending) == (None, "the", Ending.STOP)

    asyncio.run(run())


def test_a_lost_router_is_asked_again() -> None:
    async def run() -> None:
        async with harness() as case:
            case.router.failures = [LOST]
            case.workers["w1"].script = answer_with([5])
            got = await case.open("completions", completion()).done()
            assert got.error is None and len(case.router.requests) == 2

    asyncio.run(run())


def test_a_router_that_cannot_be_found() -> None:
    def nowhere() -> Any:
        raise StatorError(ErrorCode.NO_INSTANCE, "no router is registered", retry_after_s=1.0)

    async def run() -> None:
        async with harness(router=nowhere, router_wait_s=0.2) as case:
            got = await case.open("completions", completion()).done()
            assert got.error is not None and got.error.code is ErrorCode.NO_INSTANCE
            assert got.error.retry_after_s is not None
            await case.processor.drain()

    asyncio.run(run())


def test_an_engine_that_ends_without_a_reason_is_a_protocol_error() -> None:
    async def run() -> None:
        async with harness() as case:
            case.workers["w1"].script = answer_with([5], finish=None)
            got = await case.open("completions", completion()).done()
            assert got.error is not None and got.error.code is ErrorCode.PROTOCOL

    asyncio.run(run())


def test_a_lost_last_frame_needs_no_other_engine() -> None:
    async def run() -> None:
        async with harness(["w1", "w2"]) as case:
            case.workers["w1"].script = answer_with([5, 6], error=LOST)
            got = await case.open("completions", completion(max_tokens=2)).done()
            assert got.error is None and got.deltas[-1].ending is Ending.LENGTH
            assert not case.workers["w2"].calls

    asyncio.run(run())


def test_token_ids_as_prompt_and_long_prompts_on_a_thread() -> None:
    async def run() -> None:
        async with harness(thread_chars=10) as case:
            case.workers["w1"].script = answer_with([5])
            await case.open("completions", completion([7, 8, 9])).done()
            got = await case.open("completions", completion("In the beginning God created")).done()
            assert got.error is None
            first, second = (call.request for call in case.workers["w1"].calls)
            assert unpack(first.prompt_ids) == [7, 8, 9]
            assert second.prompt_ids == case.tokenizer.encode("In the beginning God created", add_special_tokens=True)
            too_long = await case.open("completions", completion("In the beginning " * 200)).done()
            assert too_long.error is not None and too_long.error.code is ErrorCode.INVALID_REQUEST
            await case.processor.drain()

    asyncio.run(run())


def test_a_prompt_is_counted_without_router_or_engine() -> None:
    async def run() -> None:
        async with harness(thread_chars=200) as case:
            case.workers["w1"].script = answer_with([5])
            asked = chat(temperature=0, max_tokens=5)
            (counted,) = (await case.open("count_tokens", asked).done()).deltas
            assert not case.router.requests and case.processor.num_open == 0
            used = (await case.open("chat", asked).done()).deltas[-1].usage
            assert counted.ending is Ending.STOP and counted.usage is not None and used is not None
            assert (counted.usage.prompt_tokens, counted.usage.completion_tokens) == (used.prompt_tokens, 0)
            # On the thread, and longer than the context.
            (long,) = (await case.open("count_tokens", chat("In the beginning " * 500)).done()).deltas
            assert long.usage is not None and long.usage.prompt_tokens > 1000
            unknown = ChatCompletionRequest(model="other", messages=asked.messages)
            refused = (await case.open("count_tokens", unknown).done()).error
            assert refused is not None and refused.code is ErrorCode.MODEL_NOT_FOUND

    asyncio.run(run())


def test_a_request_cancelled_while_its_prompt_is_tokenized_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with harness(thread_chars=1) as case:
            loop, started, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
            encode = case.tokenizer.encode

            def slow_encode(text: str, *, add_special_tokens: bool) -> TokenBuffer:
                loop.call_soon_threadsafe(started.set)
                assert go_on.wait(10)
                return encode(text, add_special_tokens=add_special_tokens)

            monkeypatch.setattr(case.tokenizer, "encode", slow_encode)
            got = case.open("completions", completion())
            await started.wait()
            assert (case.processor.num_open, got.handle is not None) == (1, True)
            assert got.handle is not None
            got.handle.cancel()
            await got.done()
            go_on.set()
            await case.processor.drain()
            assert not case.router.requests

    asyncio.run(run())


def test_prompts_that_wait_to_be_tokenized_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with harness(["w1"], thread_chars=1, max_encoding=2) as case:
            go_on = threading.Event()
            encode = case.tokenizer.encode

            def slow_encode(text: str, *, add_special_tokens: bool) -> TokenBuffer:
                assert go_on.wait(10)
                return encode(text, add_special_tokens=add_special_tokens)

            monkeypatch.setattr(case.tokenizer, "encode", slow_encode)
            case.workers["w1"].script = answer_with([1])
            waiting = [case.open("completions", completion()) for _ in range(2)]
            refused = await case.open("completions", completion()).done()
            assert refused.error is not None and refused.error.code is ErrorCode.OVERLOADED
            assert refused.error.retry_after_s is not None
            go_on.set()
            assert [(await got.done()).error for got in waiting] == [None, None]

    asyncio.run(run())


def test_refusals_reach_the_caller_with_code_and_field() -> None:
    cases: list[tuple[str, Any, ErrorCode, str]] = [
        ("chat", ChatCompletionRequest(model="gpt", messages=[]), ErrorCode.MODEL_NOT_FOUND, "model"),
        ("chat", ChatCompletionRequest(model="tiny", messages=[]), ErrorCode.INVALID_REQUEST, "messages"),
        ("chat", chat(n=129), ErrorCode.INVALID_REQUEST, "n"),
        ("chat", chat(tools=[Tool("retrieval")]), ErrorCode.UNSUPPORTED, "tools[0].type"),
        ("chat", chat(temperature=3.0), ErrorCode.INVALID_REQUEST, "temperature"),
        ("completions", completion(""), ErrorCode.INVALID_REQUEST, "prompt"),
        ("completions", completion(["a", ""]), ErrorCode.INVALID_REQUEST, "prompt"),
        ("completions", completion(stop=[""]), ErrorCode.INVALID_REQUEST, "stop"),
        ("completions", completion(max_tokens=1000), ErrorCode.INVALID_REQUEST, "max_tokens"),
    ]

    async def run() -> None:
        async with harness() as case:
            for endpoint, request, code, param in cases:
                got = await case.open(endpoint, request).done()
                assert got.error is not None
                assert (got.error.code, got.error.param) == (code, param)
            assert not case.router.requests

    asyncio.run(run())


def test_closing_ends_open_requests() -> None:
    async def run() -> None:
        async with harness() as case:
            got = case.open("completions", completion())
            await case.workers["w1"].call()
            await case.processor.close()
            await got.done()
            assert got.error is not None and got.error.code is ErrorCode.DRAINING
            after = await case.open("completions", completion()).done()
            assert after.error is not None and after.error.code is ErrorCode.DRAINING

    asyncio.run(run())
