from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import stator
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.messages.openai import ChatMessage, TextPart
from stator.processor.chat_template import ChatTemplate
from stator.processor.tokenizer import ModelTokenizer

BUNDLED = Path(stator.__file__).parent / "models" / "tiny-llama"

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% else %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, origin="test", special_tokens=tokens, now=lambda: datetime(2024, 7, 26, 12, 0))


def user(content: Any) -> ChatMessage:
    return ChatMessage("user", content)


def refusal(made: ChatTemplate, *messages: ChatMessage) -> StatorError:
    with pytest.raises(StatorError) as caught:
        made.render(messages)
    return caught.value


def test_the_bundled_models_template() -> None:
    tokenizer = ModelTokenizer.load(BUNDLED)
    assert tokenizer.chat_template is not None
    source, origin = tokenizer.chat_template
    made = ChatTemplate(source, origin=origin, special_tokens=tokenizer.special_tokens)
    text = made.render([ChatMessage("developer", "Be brief."), user([TextPart("Wer "), TextPart("ist da?")])])
    assert text == (
        "<|begin_of_text|><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWer ist da?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(memoryview(ids).cast("I").tolist(), skip_special_tokens=False) == text


def test_a_template_refuses_with_its_own_message() -> None:
    error = refusal(template(LLAMA2, bos_token="<s>", eos_token="</s>"), user("a"), user("b"))
    assert (error.code, error.message) == (ErrorCode.INVALID_REQUEST, "roles must alternate user/assistant")
    assert error.param == "messages"


def test_a_template_that_fails_says_nothing_internal() -> None:
    error = refusal(template("{{ messages[5].content.x.y }}"), user("a"))
    assert error.code is ErrorCode.INVALID_REQUEST and "chat template" in error.message


def test_parts_are_joined_for_a_template_of_strings() -> None:
    made = template(LLAMA2, bos_token="<s>", eos_token="</s>")
    assert made.render([user([TextPart("a"), TextPart("b")])]) == "<s>[INST] a\nb [/INST]"


def test_parts_are_joined_for_a_template_that_would_print_the_list() -> None:
    made = template("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert made.render([user([TextPart("a"), TextPart("b")])]) == "a\nb"


def test_strings_become_parts_for_a_template_of_parts() -> None:
    made = template("{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}")
    assert made.render([user("a"), user([TextPart("b"), TextPart("c")])]) == "<a><b><c>"


def test_a_developer_message_is_a_system_message_where_the_template_knows_no_other() -> None:
    source = (
        "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.role ~ ':' ~ m.content ~ ';' }}"
        "{% else %}{{ raise_exception('unknown role ' ~ m.role) }}{% endif %}{% endfor %}"
    )
    assert template(source).render([ChatMessage("developer", "d"), user("u")]) == "system:d;user:u;"


def test_what_a_template_would_drop_in_silence_is_refused_by_name() -> None:
    made = template(LLAMA2, bos_token="<s>", eos_token="</s>")
    error = refusal(made, user("a"), ChatMessage("tool", "42", tool_call_id="1"))
    assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, "messages[1].role")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    error = refusal(made, user("a"), ChatMessage("assistant", "", tool_calls=[call]))
    assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, "messages[1].tool_calls")


def test_tool_results_and_calls_for_a_template_that_takes_them() -> None:
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ c.function | tojson }}{% endfor %}{% else %}{{ m.role ~ ':' ~ m.content }}{% endif %}|{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "größe", "arguments": '{"x": "<1>"}'}}
    messages = [user("a"), ChatMessage("assistant", tool_calls=[call]), ChatMessage("tool", "42", tool_call_id="1")]
    assert template(source).render(messages) == ('user:a|{"name": "größe", "arguments": {"x": "<1>"}}|tool:42|')


def test_arguments_that_nobody_can_read_stay_text() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or () %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    for text in ("{", "[" * 100_000):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
        assert template(source).render([user("a"), ChatMessage("assistant", tool_calls=[call])]) == text


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_content_is_required(role: Any) -> None:
    made = template("{% for m in messages %}{{ m.content }}{% endfor %}")
    error = refusal(made, ChatMessage(role))
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "messages[0].content")


def test_no_messages() -> None:
    assert refusal(template("x")).param == "messages"


def test_the_helpers_of_hugging_face() -> None:
    source = """
    {%- for m in messages %}
        {%- if loop.index0 == 1 %}
            {%- break %}
        {%- endif %}
        {%- generation %}{{ m.content }}{% endgeneration %}
    {%- endfor %}
    {{- strftime_now('%d %b %Y') }}{{ {'a': '<é>'} | tojson(indent=1) }}
    {%- if tools is not none %}tools{% endif %}{% if add_generation_prompt %}!{% endif %}
"""
    assert template(source).render([user("a"), user("b")]) == 'a26 Jul 2024{\n "a": "<é>"\n}!'


def test_namespaces_and_dicts_work_as_usual() -> None:
    source = (
        "{% set ns = namespace(n=1, self=2) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n + ns.self }}{{ dict(a=1).a }}{{ dict.fromkeys('ab', 7).b }}"
    )
    assert template(source).render([user("x")]) == "417"


def test_the_sandbox_keeps_a_template_from_python_and_from_changing_messages() -> None:
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.pop() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.__subclasses__() }}",
    ):
        assert refusal(template(source), user("a")).code is ErrorCode.INVALID_REQUEST


def test_a_template_that_does_not_compile_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"some/file: the chat template does not compile: line 2"):
        ChatTemplate("\n{% if %}", origin="some/file", special_tokens={})
