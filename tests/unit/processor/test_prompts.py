"""Prompts that are made in a process of their own: the same as elsewhere, and given up when they do not end."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from stator.errors import Ending, ErrorCode, StatorError
from stator.ids import RequestId
from stator.messages.openai import ChatCompletionRequest, ChatMessage, CompletionRequest, TextPart
from stator.messages.tokenize import Tokenized, TokenizeRequest
from stator.messages.tokens import unpack
from stator.processor.prompt_jobs import ChatPrompt
from stator.runtime.context import CallContext
from stator.transport import calls
from stator.transport.base import Target

from .harness import Collected, Harness, answer_with, harness

# Goes round thinking_budget x 100,000 times, in which a sandbox's bound on a single range is of no help.
SLOW_IF_ASKED = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if enable_thinking is defined %}thinking: {{ enable_thinking }}{% endif %}
{%- if thinking_budget is defined %}
{%- for i in range(thinking_budget) %}{% for j in range(100000) %}{% endfor %}{% endfor %}
{%- endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LONG = "In the beginning God created the heaven and the earth. " * 3


def run(test: Callable[[Harness], Awaitable[None]], model_dir: Path | None, **options: Any) -> None:
    async def main() -> None:
        options.setdefault("max_model_len", 4096)
        async with harness(["w1"], template=SLOW_IF_ASKED, model_dir=model_dir, **options) as case:
            case.workers["w1"].script = answer_with([5])
            async with asyncio.timeout(50):
                await test(case)

    asyncio.run(main())


def chat(*texts: str, **fields: Any) -> ChatCompletionRequest:
    messages = [ChatMessage("user", text) for text in texts or (LONG,)]
    return ChatCompletionRequest(model="tiny", messages=messages, max_tokens=1, **fields)


async def prompt_of(case: Harness, endpoint: str, request: Any) -> list[int]:
    """What the engine was given for it."""
    answered = await case.open(endpoint, request).done()
    assert answered.error is None and answered.deltas[-1].ending is Ending.LENGTH
    return unpack(case.workers["w1"].calls[-1].request.prompt_ids)


async def tokenized(case: Harness, **fields: Any) -> Tokenized:
    target = Target(("inproc://processor",), "tokenize")
    request, context = TokenizeRequest(**fields), CallContext(RequestId("r"))
    return await calls.call(case.client, target, request, context=context, item_type=Tokenized)


def test_a_prompt_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    found: list[list[Any]] = []
    whole: dict[str, Any] = {"messages": chat().messages, "add_generation_prompt": False}

    async def test(case: Harness) -> None:
        found.append(
            [
                await prompt_of(case, "chat", chat()),
                await prompt_of(case, "chat", chat("äöü \N{SNOWMAN}", LONG)),
                await prompt_of(case, "chat", chat(chat_template_kwargs={"enable_thinking": False})),
                await prompt_of(case, "completions", CompletionRequest(model="tiny", prompt=LONG, max_tokens=1)),
                await prompt_of(case, "completions", CompletionRequest(model="tiny", prompt=[1, 2], max_tokens=1)),
                await tokenized(case, prompt=LONG, return_token_strs=True),
                await tokenized(case, prompt=LONG, add_special_tokens=False),
                await tokenized(case, **whole, add_special_tokens=True),
                await tokenized(case, **whole, continue_final_message=True),
            ]
        )

    for number, options in enumerate(({}, {"thread_chars": 1}, {"thread_chars": 1, "pool_chars": 1})):
        directory = tmp_path / str(number)
        directory.mkdir()
        run(test, directory, **options)
    run(test, None, thread_chars=1, pool_chars=1)
    assert found[0] == found[1] == found[2] == found[3]


def test_several_prompts_and_choices_of_one_request(tmp_path: Path) -> None:
    async def test(case: Harness) -> None:
        request = CompletionRequest(model="tiny", prompt=[LONG, "x", LONG * 2], max_tokens=1, n=2, echo=True)
        answered = await case.open("completions", request).done()
        assert answered.error is None
        prompts = {call.request.prompt_ids for call in case.workers["w1"].calls}
        assert len(prompts) == 3 and len(case.workers["w1"].calls) == 6

    run(test, tmp_path, thread_chars=1, pool_chars=1)


def refusal(answered: Collected) -> StatorError:
    assert answered.error is not None
    return answered.error


def test_a_template_that_does_not_end_costs_its_request_alone(tmp_path: Path) -> None:
    async def test(case: Harness) -> None:
        stuck = case.open("chat", chat(chat_template_kwargs={"thinking_budget": 100_000}))
        # Others of the kind wait for the process, all others for nothing.
        behind = case.open("chat", chat(chat_template_kwargs={"enable_thinking": True}))
        assert await prompt_of(case, "chat", chat())
        assert stuck.error is None and not behind.deltas
        error = refusal(await stuck.done())
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "messages")
        assert "took longer than 2 seconds" in error.message
        assert (await behind.done()).error is None
        await case.processor.drain()
        assert case.processor.num_open == 0

    run(test, tmp_path, prompt_timeout_s=2.0)


def test_a_prompt_that_ends_its_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(case: Harness) -> None:
        pool = case.processor._pool
        assert pool is not None
        submit = pool.submit

        def ending(payload: bytes, *args: Any, **kwargs: Any) -> "asyncio.Future[bytes]":
            return submit(b"\xc1" if b"broken" in payload else payload, *args, **kwargs)

        monkeypatch.setattr(pool, "submit", ending)
        answered = await case.open("chat", chat("broken", LONG)).done()
        assert refusal(answered).code is ErrorCode.INTERNAL
        assert await prompt_of(case, "chat", chat())

    run(test, tmp_path, pool_chars=1)


def test_what_the_process_refuses_is_refused_by_its_field(tmp_path: Path) -> None:
    async def test(case: Harness) -> None:
        empty = ChatCompletionRequest(model="tiny", messages=[], chat_template_kwargs={"enable_thinking": True})
        error = refusal(await case.open("chat", empty).done())
        assert (error.code, error.param, error.message) == (
            ErrorCode.INVALID_REQUEST,
            "messages",
            "messages must not be empty",
        )
        silent = [ChatMessage("user", LONG), ChatMessage("user")]
        error = refusal(await case.open("chat", ChatCompletionRequest(model="tiny", messages=silent)).done())
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "messages[1].content")

    run(test, tmp_path, pool_chars=50)


def test_they_are_bounded_and_end_with_the_processor(tmp_path: Path) -> None:
    async def test(case: Harness) -> None:
        slow = chat(chat_template_kwargs={"thinking_budget": 100_000})
        waiting = [case.open("chat", slow) for _ in range(2)]
        error = refusal(await case.open("chat", slow).done())
        assert error.code is ErrorCode.OVERLOADED and error.retry_after_s is not None
        assert case.processor.num_open == 2
        await case.processor.close()
        assert [refusal(await each.done()).code for each in waiting] == [ErrorCode.DRAINING] * 2
        assert case.processor.num_open == 0

    run(test, tmp_path, max_encoding=2)


def test_one_that_was_cancelled_goes_nowhere(tmp_path: Path) -> None:
    async def test(case: Harness) -> None:
        asked = case.open("chat", chat(chat_template_kwargs={"enable_thinking": True}))
        while not case.processor.num_open:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert asked.handle is not None
        asked.handle.cancel()
        await asked.done()
        await case.processor.drain()
        assert not case.router.requests

    run(test, tmp_path)


def test_the_length_of_a_conversation_is_that_of_its_texts() -> None:
    messages = [
        ChatMessage("system", "four"),
        ChatMessage("user", [TextPart("abc"), TextPart("")]),
        ChatMessage("assistant", None, tool_calls=[{"id": "x"}]),
    ]
    assert ChatPrompt(messages).num_chars() == 7
    assert ChatPrompt([]).num_chars() == 0
