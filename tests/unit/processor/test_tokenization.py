"""Endpoints tokenize and detokenize of a Processor, over the in-process request plane."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId
from stator.messages.openai import ChatMessage, TextPart
from stator.messages.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from stator.messages.tokens import unpack
from stator.messages.tools import FunctionDefinition, Tool
from stator.processor import processor, tokenization
from stator.runtime.context import CallContext
from stator.transport import calls
from stator.transport.base import Target

from . import tokenizers_for_tests as fixtures
from .harness import Harness, harness

USER = ChatMessage("user", "Hello")


def run(test: Callable[[Harness], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with harness(**options) as case:
            await test(case)

    asyncio.run(main())


async def ask(case: Harness, endpoint: str, request: Any) -> Any:
    item_type = Tokenized if endpoint == "tokenize" else Detokenized
    target = Target(("inproc://processor",), endpoint)
    return await calls.call(case.client, target, request, context=CallContext(RequestId("r")), item_type=item_type)


async def refusal(case: Harness, request: Any) -> StatorError:
    endpoint = "tokenize" if isinstance(request, TokenizeRequest) else "detokenize"
    with pytest.raises(StatorError) as refused:
        await ask(case, endpoint, request)
    assert case.processor.num_open == 0
    return refused.value


async def text_of(case: Harness, **fields: Any) -> str:
    tokens = unpack((await ask(case, "tokenize", TokenizeRequest(**fields))).tokens)
    return (await ask(case, "detokenize", DetokenizeRequest(tokens=tokens))).prompt


@pytest.mark.parametrize("thread_chars", [1, 8192], ids=["on the thread", "at once"])
def test_a_prompt_becomes_tokens_and_these_become_the_prompt(
    thread_chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "THREAD_TOKENS", 1 if thread_chars == 1 else 2048)

    async def test(case: Harness) -> None:
        text = "Grüße 🙂, world"
        for special in (None, True, False):
            request = TokenizeRequest(model="alias", prompt=text, add_special_tokens=special, return_token_strs=True)
            got: Tokenized = await ask(case, "tokenize", request)
            expected = case.tokenizer.encode(text, add_special_tokens=special is not False)
            assert (got.tokens, got.max_model_len) == (expected, 256)
            assert got.strings == case.tokenizer.strings(unpack(expected))
        back = await ask(case, "detokenize", DetokenizeRequest(model="tiny", tokens=unpack(expected)))
        assert back.prompt == text

    run(test, thread_chars=thread_chars)


def test_an_empty_prompt_has_no_tokens_but_the_special_ones() -> None:
    async def test(case: Harness) -> None:
        got = await ask(case, "tokenize", TokenizeRequest(prompt="", add_special_tokens=False))
        assert unpack(got.tokens) == [] and got.strings is None
        assert (await ask(case, "detokenize", DetokenizeRequest(tokens=[]))).prompt == ""

    run(test)


def test_messages_are_those_that_chat_would_send() -> None:
    async def test(case: Harness) -> None:
        start = "<s><|im_start|>user\nHello<|im_end|>\n"
        assert await text_of(case, messages=[USER]) == start + "<|im_start|>assistant\n"
        assert await text_of(case, messages=[USER], add_generation_prompt=False) == start
        begun = [USER, ChatMessage("assistant", "Well, ")]
        fields: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
        assert await text_of(case, messages=begun, **fields) == start + "<|im_start|>assistant\nWell, "
        parts = [USER, ChatMessage("assistant", [TextPart("a"), TextPart("b")])]
        assert (await text_of(case, messages=parts, **fields)).endswith("b")

    run(test)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "prompt", ErrorCode.INVALID_REQUEST),
        ({"prompt": "a", "messages": [USER]}, "prompt", ErrorCode.INVALID_REQUEST),
        ({"messages": []}, "messages", ErrorCode.INVALID_REQUEST),
        ({"messages": [ChatMessage("user")]}, "messages[0].content", ErrorCode.INVALID_REQUEST),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message", ErrorCode.INVALID_REQUEST),
        ({"prompt": "a", "chat_template": "x"}, "chat_template", ErrorCode.UNSUPPORTED),
        ({"prompt": "a", "tools": [Tool("function")]}, "tools", ErrorCode.INVALID_REQUEST),
        ({"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", ErrorCode.INVALID_REQUEST),
        ({"prompt": "a", "model": "other"}, "model", ErrorCode.MODEL_NOT_FOUND),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, code: ErrorCode) -> None:
    async def test(case: Harness) -> None:
        error = await refusal(case, TokenizeRequest(**fields))
        assert (error.param, error.code) == (param, code)

    run(test)


def test_tools_are_in_the_prompt_as_in_a_chats() -> None:
    shown = "{{- bos_token }}{%- if tools %}{{- tools | tojson }}{%- endif %}"
    template = fixtures.CHATML.replace("{{- bos_token }}", shown)

    async def test(case: Harness) -> None:
        tool = Tool("function", FunctionDefinition("look"))
        text = await text_of(case, messages=[USER], tools=[tool])
        assert '"name": "look"' in text
        error = await refusal(case, TokenizeRequest(messages=[USER], tools=[Tool("retrieval")]))
        assert error.param == "tools[0].type"

    run(test, template=template)


def test_what_asks_for_nothing_passes() -> None:
    async def test(case: Harness) -> None:
        await ask(case, "tokenize", TokenizeRequest(prompt="a", tools=[], chat_template_kwargs={}))

    run(test)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    async def test(case: Harness) -> None:
        error = await refusal(case, DetokenizeRequest(tokens=[1, case.tokenizer.num_ids]))
        assert (error.param, error.code) == ("tokens", ErrorCode.INVALID_REQUEST)
        assert str(case.tokenizer.num_ids) in error.message

    run(test)


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "MAX_TOKENS", 4)
    monkeypatch.setattr(tokenization, "MAX_TEXT_BYTES", 3)

    async def test(case: Harness) -> None:
        assert (await refusal(case, TokenizeRequest(prompt="Grüße 🙂, world"))).param == "prompt"
        assert (await refusal(case, TokenizeRequest(prompt="abcd", return_token_strs=True))).param == "prompt"
        assert (await refusal(case, DetokenizeRequest(tokens=[1] * 5))).param == "tokens"
        assert (await refusal(case, DetokenizeRequest(tokens=[1] * 4))).param == "tokens"

    run(test)


def test_a_flood_of_long_texts_is_refused_and_generates_no_work_for_those_who_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor, "MAX_WAITING", 2)

    async def test(case: Harness) -> None:
        gate, encoded = threading.Event(), []
        encode = case.tokenizer.encode

        def slow(text: str, *, add_special_tokens: bool) -> Any:
            encoded.append(text)
            assert gate.wait(10)
            return encode(text, add_special_tokens=add_special_tokens)

        monkeypatch.setattr(case.tokenizer, "encode", slow)
        first = asyncio.create_task(ask(case, "tokenize", TokenizeRequest(prompt="first")))
        second = asyncio.create_task(ask(case, "tokenize", TokenizeRequest(prompt="second")))
        while case.processor.num_open < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        with pytest.raises(StatorError) as refused:
            await ask(case, "tokenize", TokenizeRequest(prompt="third"))
        assert refused.value.code is ErrorCode.OVERLOADED and refused.value.retry_after_s
        second.cancel()
        drained = asyncio.create_task(case.processor.drain())
        await asyncio.sleep(0.01)
        assert not drained.done()
        gate.set()
        assert unpack((await first).tokens)
        await drained
        assert encoded == ["first"]

    run(test, thread_chars=1)


def test_a_processor_that_stops_tells_those_who_wait() -> None:
    async def test(case: Harness) -> None:
        await case.processor.close()
        error = await refusal(case, TokenizeRequest(prompt="a"))
        assert error.code is ErrorCode.DRAINING

    run(test)
