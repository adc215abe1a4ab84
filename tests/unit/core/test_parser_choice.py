"""Templates here are cut down to what tells one family from another; the real ones say it in the same words."""

import pytest

from stator.core.parser_choice import choose_parsers
from stator.core.tools.registry import REASONING_FORMATS, TOOL_FORMATS, shown_markers
from stator.errors import ConfigError

QWEN3 = "{% if tools %}{{ tools|tojson }} in <tool_call></tool_call>{% endif %}{{ m.split('</think>') }}<think>"
TEMPLATES: list[tuple[str, list[str], str, tuple[str | None, str | None]]] = [
    (QWEN3, [], "qwen3", ("hermes", "qwen3")),
    ("{% if tools %}<tool_call>{% endif %}", [], "qwen2", ("hermes", None)),
    ("{% if tools %}<tool_call>\n<function=x>\n<parameter=y>{% endif %}", [], "qwen3_moe", ("qwen3_coder", None)),
    ("{% if tools %}<tool_call>f\n<arg_key>k</arg_key>{% endif %}<think></think>", [], "glm4_moe", (None, "glm45")),
    ('{% if tools %}{"name": f, "parameters": d}{% endif %}<|python_tag|>', [], "llama", ("llama3_json", None)),
    (
        '{% if tools %}{"name": f, "parameters": d}{% endif %}Environment: ipython',
        ["<|python_tag|>", "<|eot_id|>"], "llama", ("llama3_json", None),
    ),
    ("{% if tools %}[func_name1(params_name1=a)]{% endif %}", ["<|python_tag|>"], "llama", ("pythonic", None)),
    ("{% if tools %}<|python_start|>{% endif %}", [], "llama4", ("llama4_pythonic", None)),
    ("{{ tools }}[TOOL_CALLS]", [], "mistral", ("mistral", None)),
    ("{{ messages }}", ["[TOOL_CALLS]", "[THINK]"], "mistral", ("mistral", "mistral")),
    (
        "<｜Assistant｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json</think>",
        [], "deepseek_v3", ("deepseek_v3", "deepseek_r1"),
    ),
    ("thinking <｜Assistant｜><｜tool▁call▁begin｜>f<｜tool▁sep｜></think>", [], "", ("deepseek_v31", "deepseek_v3")),
    ("<｜Assistant｜>{{ content.split('</think>') }}", [], "qwen2", (None, "deepseek_r1")),
    (
        "{% if tools %}<TOOLCALL>[]</TOOLCALL>{% endif %}</think>",
        [], "nemotron-nas", ("llama_nemotron_json", "nemotron_v3"),
    ),
    ("<|start|>system<|channel|>final<|message|>{{ tools }}", [], "gpt_oss", ("openai", "openai_gptoss")),
    ("", [], "gpt_oss", ("openai", "openai_gptoss")),
    ("{% if tools %}<|tool_call|>{% endif %}Here is my thought process:", [], "granite", ("granite", "granite")),
    ("{% if tools %}functools[]{% endif %}", [], "phi3", ("phi4_mini_json", None)),
    ("{% if tools %}<tool_calls>{% endif %}", [], "jamba", ("jamba", None)),
    ("<seed:think>", [], "seed_oss", (None, "seed_oss")),
    ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", ["<|im_end|>"], "llama", (None, None)),
    ("a template that says <tool_call>, but takes none", [], "", (None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("template", "special", "model_type", "expected"), TEMPLATES)
def test_the_template_says_what_the_model_writes(
    template: str, special: list[str], model_type: str, expected: tuple[str | None, str | None]
) -> None:
    assert choose_parsers(template, special, model_type) == expected


def test_without_a_template_there_is_nothing_to_tell_by() -> None:
    assert choose_parsers(None) == (None, None)


def test_the_configuration_has_the_last_word() -> None:
    assert choose_parsers(QWEN3, tool_parser="qwen3_xml", reasoning_parser="none") == ("qwen3_xml", None)
    assert choose_parsers(QWEN3, tool_parser="none") == (None, "qwen3")


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no tool-call parser 'kimi_k2'; known are deepseek_v3, .*'none'"):
        choose_parsers(QWEN3, tool_parser="kimi_k2")
    with pytest.raises(ConfigError, match=r"no reasoning parser 'step3'; known are deepseek_r1, "):
        choose_parsers(QWEN3, reasoning_parser="step3")


def test_what_the_detokenizer_has_to_show() -> None:
    assert shown_markers("hermes", "qwen3") == {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    assert shown_markers(None, None) == frozenset()
    assert all(shown_markers(name, None) for name in TOOL_FORMATS)
    assert shown_markers(None, "mistral") == {"[THINK]", "[/THINK]"}
    assert "granite" in REASONING_FORMATS and not shown_markers(None, "granite")
