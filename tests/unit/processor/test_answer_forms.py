"""What a chat's answer is taken apart into, with a template that teaches tools and reasoning as Qwen's does."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from stator.errors import Ending, ErrorCode, StatorError
from stator.messages.engine import EngineRequest, FinishReason, TokenDelta
from stator.messages.grammar import Choice, Grammar, Json, Literal, OwnGrammar, Repeat, Sequence, TextUntil
from stator.messages.openai import ChatCompletionRequest
from stator.messages.tokens import unpack

from . import tokenizers_for_tests as fixtures
from .harness import Harness, answer_with, harness

TEMPLATE = (
    "{%- if tools %}{{- 'Tools: ' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- ' Answer with <tool_call>{...}</tool_call>. ' }}{%- endif %}"
    + fixtures.CHATML.replace(
        "{{- '<|im_end|>\\n' }}",
        "{%- if message.tool_calls %}{%- for call in message.tool_calls %}{{- '<tool_call>' }}"
        "{{- call.function | tojson }}{{- '</tool_call>' }}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}",
    )
    + "{%- if enable_thinking is defined and enable_thinking is false %}"
    + "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>'


def chat(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, **fields}
    return msgspec.convert(body, ChatCompletionRequest)


def run(scene: Callable[[Harness], Any], template: str = TEMPLATE, **options: Any) -> None:
    async def main() -> None:
        async with harness(template=template, max_model_len=2048, **options) as case:
            await scene(case)
            await case.router.until_no_booking()
            assert case.processor.num_open == 0

    asyncio.run(asyncio.wait_for(main(), 20))


def ids_of(case: Harness, text: str) -> list[int]:
    return list(unpack(case.tokenizer.encode(text, add_special_tokens=False)))


class Read:
    """An answer put together. calls: (id, name, arguments)."""

    def __init__(self) -> None:
        self.text = self.reasoning = ""
        self.calls: dict[int, tuple[str, str, str]] = {}
        self.ending: Ending | None = None
        self.parsed = False
        self.request: EngineRequest | None = None


async def answered(case: Harness, request: ChatCompletionRequest, text: str, *, size: int = 1) -> Read:
    case.workers["w1"].script = answer_with(ids_of(case, text), finish=FinishReason.STOP, size=size)
    got = await case.open("chat", request).done()
    if got.error is not None:
        raise got.error
    read = Read()
    read.request = case.workers["w1"].calls[-1].request
    read.parsed = got.deltas[0].parsed
    for delta in got.deltas:
        read.text += delta.text
        read.reasoning += delta.reasoning
        read.ending = delta.ending
        for piece in delta.tool_calls:
            call_id, name, arguments = read.calls.get(piece.index, (piece.id, piece.name, ""))
            assert call_id and name
            read.calls[piece.index] = (call_id, name, arguments + piece.arguments)
    return read


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reasoning_text_and_calls_are_told_apart(size: int) -> None:
    async def scene(case: Harness) -> None:
        read = await answered(
            case, chat(tools=TOOLS), f"<think>\nSee the sea.\n</think>\n\nOf course.\n{CALL}", size=size
        )
        assert (read.reasoning, read.text, read.ending) == ("See the sea.", "Of course.", Ending.TOOL_CALLS)
        ((call_id, name, arguments),) = read.calls.values()
        assert (name, json.loads(arguments)) == ("look", {"at": "sea"}) and call_id.startswith("call_")
        assert read.parsed

    run(scene)


def test_the_prompt_has_the_tools_and_the_calls_of_before() -> None:
    async def scene(case: Harness) -> None:
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "moon"}'}}
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "dark"},
        ]
        read = await answered(case, chat(tools=TOOLS, messages=messages), "It is dark.")
        assert read.request is not None
        prompt = case.tokenizer.decode(unpack(read.request.prompt_ids), skip_special_tokens=False)
        assert '"name": "look"' in prompt and '"at": "moon"' in prompt and "dark" in prompt
        assert (read.text, read.calls, read.ending) == ("It is dark.", {}, Ending.STOP)
        assert read.request.sampling.grammar is None

    run(scene)


def test_without_tools_a_call_is_text() -> None:
    async def scene(case: Harness) -> None:
        for request in (chat(), chat(tools=TOOLS, tool_choice="none")):
            read = await answered(case, request, f"Look: {CALL}")
            assert read.text == f"Look: {CALL}" and not read.calls and read.ending is Ending.STOP

    run(scene)


def test_reasoning_may_be_switched_off_and_left_out() -> None:
    async def scene(case: Harness) -> None:
        for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
            read = await answered(case, chat(**fields), "Plain.")
            assert read.request is not None
            prompt = case.tokenizer.decode(unpack(read.request.prompt_ids), skip_special_tokens=False)
            assert prompt.endswith("</think>\n\n") and (read.text, read.reasoning) == ("Plain.", "")
        read = await answered(case, chat(include_reasoning=False), "<think>\nHm.\n</think>\n\nPlain.")
        assert (read.text, read.reasoning) == ("Plain.", "")

    run(scene)


def grammar_of(case: Harness, **fields: Any) -> Grammar | None:
    form = case.processor._forms.of_chat(chat(**fields))
    return form.grammar("<|im_start|>assistant\n")


def test_what_is_forced_comes_behind_free_reasoning() -> None:
    async def scene(case: Harness) -> None:
        forced = grammar_of(case, tools=TOOLS, tool_choice="required")
        assert isinstance(forced, Sequence) and TextUntil("</think>") in parts_of(forced)
        assert Literal('<tool_call>\n{"name": "look", "arguments": ') in parts_of(forced)
        answer = grammar_of(case, response_format={"type": "json_object"})
        assert isinstance(answer, Sequence) and Json({"type": "object"}) in parts_of(answer)
        either = grammar_of(case, response_format={"type": "json_object"}, tools=TOOLS)
        assert isinstance(either, Choice) and len(either.options) == 2
        with pytest.raises(StatorError) as refused:
            grammar_of(case, structured_outputs={"grammar": "start: x"})
        assert (refused.value.code, refused.value.param) == (ErrorCode.UNSUPPORTED, "structured_outputs")

    run(scene)
    run(lambda case: _own_grammar(case), template=fixtures.CHATML)


async def _own_grammar(case: Harness) -> None:
    assert grammar_of(case, structured_outputs={"grammar": "start: x"}) == OwnGrammar("start: x")


def parts_of(node: Any) -> list[Any]:
    found = [node]
    items = [node.item] if isinstance(node, Repeat) else []
    for inner in (*getattr(node, "parts", ()), *getattr(node, "options", ()), *items):
        found += parts_of(inner)
    return found


def test_a_cut_off_answer_ends_for_its_length() -> None:
    async def scene(case: Harness) -> None:
        ids = ids_of(case, '<tool_call>\n{"name": "look", "arguments": {"at": "s')
        case.workers["w1"].script = answer_with(ids, finish=FinishReason.LENGTH)
        got = await case.open("chat", chat(tools=TOOLS)).done()
        assert got.deltas[-1].ending is Ending.LENGTH
        assert "".join(p.arguments for d in got.deltas for p in d.tool_calls) == '{"at": "s'

    run(scene)


@pytest.mark.parametrize("cut", ["\n</tool_c", '\n</tool_call>\n<tool_call>\n{"na'])
def test_markup_that_is_cut_off_is_no_text_of_a_forced_call(cut: str) -> None:
    async def scene(case: Harness) -> None:
        ids = ids_of(case, CALL.removesuffix("\n</tool_call>") + cut)
        case.workers["w1"].script = answer_with(ids, finish=FinishReason.LENGTH)
        got = await case.open("chat", chat(tools=TOOLS, tool_choice="required")).done()
        assert "".join(delta.text for delta in got.deltas) == ""
        assert "".join(p.arguments for d in got.deltas for p in d.tool_calls) == '{"at": "sea"}'
        assert got.deltas[-1].ending is Ending.LENGTH

    run(scene, template=fixtures.CHATML)


def test_it_goes_on_elsewhere_in_the_midst_of_a_call() -> None:
    async def scene(case: Harness) -> None:
        ids = ids_of(case, CALL)
        lost = StatorError(ErrorCode.INSTANCE_LOST, "gone")
        case.workers["w1"].script = answer_with(ids[:9], finish=None, error=lost)

        def rest(call: Any) -> None:
            request: EngineRequest = call.request
            left = ids[len(unpack(request.resume_ids)) :]
            call.items([TokenDelta(left, FinishReason.STOP, 0)])
            call.end()

        case.workers["w2"].script = rest
        got = await case.open("chat", chat(tools=TOOLS)).done()
        assert got.error is None and got.deltas[-1].ending is Ending.TOOL_CALLS
        pieces = [piece for delta in got.deltas for piece in delta.tool_calls]
        assert [piece.name for piece in pieces if piece.name] == ["look"]
        assert json.loads("".join(piece.arguments for piece in pieces)) == {"at": "sea"}

    run(scene, workers=["w1", "w2"])


def test_parsers_may_be_chosen_by_name_and_unknown_formats_are_refused() -> None:
    unknown = TEMPLATE.replace("<tool_call>", "<do>").replace("</tool_call>", "</do>")

    async def refused(case: Harness) -> None:
        with pytest.raises(StatorError) as error:
            await answered(case, chat(tools=TOOLS), "x")
        assert (error.value.code, error.value.param) == (ErrorCode.UNSUPPORTED, "tools")

    async def chosen(case: Harness) -> None:
        read = await answered(case, chat(tools=TOOLS), CALL)
        assert len(read.calls) == 1

    run(refused, template=unknown)
    run(chosen, template=unknown, tool_parser="hermes")
    run(refused, template=fixtures.CHATML)


def test_an_engines_word_about_the_grammar_names_the_clients_field() -> None:
    async def scene(case: Harness) -> None:
        def refuse(call: Any) -> None:
            call.end(StatorError(ErrorCode.INVALID_REQUEST, "the form cannot be used: bad", param="grammar"))

        case.workers["w1"].script = refuse
        got = await case.open("chat", chat(response_format={"type": "json_object"})).done()
        assert got.error is not None
        assert (got.error.code, got.error.param) == (ErrorCode.INVALID_REQUEST, "response_format")
        assert len(case.workers["w1"].calls) == 1, "nobody else is asked"

    run(scene)
