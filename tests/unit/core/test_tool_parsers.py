import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from output_samples import (
    SAMPLES,
    Expected,
    calls,
    content,
    cut,
    parser,
    raw_calls,
    reasoning,
    run,
)

from stator.core.output_parser import ComposedParser
from stator.core.tools.base import Limits, ToolSet
from stator.core.tools.events import CallStarted
from stator.core.tools.hermes import HermesParser
from stator.core.tools.registry import REASONING_FORMATS, TOOL_FORMATS

Sample = tuple[str, str | None, bool, str, Expected]
IDS = [f"{tools}-{index}" for index, (tools, *_) in enumerate(SAMPLES)]


def test_every_format_has_a_sample() -> None:
    aliases = {"granite4", "llama4_json", "qwen3_json", "qwen3_xml"}
    assert {tools for tools, *_ in SAMPLES} == set(TOOL_FORMATS) - aliases
    assert {name for _, name, *_ in SAMPLES if name} == set(REASONING_FORMATS) - {"glm45", "seed_oss"}


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_a_whole_output(sample: Sample) -> None:
    tools, thinking, is_open, text, expected = sample
    events = run(parser(tools, thinking, is_open=is_open), [text])
    assert (reasoning(events), content(events), calls(events)) == expected
    ids = [event.id for event in events if isinstance(event, CallStarted)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_every_cut_in_two_and_every_single_character(sample: Sample) -> None:
    tools, thinking, is_open, text, _ = sample
    whole = run(parser(tools, thinking, is_open=is_open), [text])
    for at in range(len(text) + 1):
        assert run(parser(tools, thinking, is_open=is_open), cut(text, [at])) == whole, at
    assert run(parser(tools, thinking, is_open=is_open), list(text)) == whole


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_an_output_cut_short_anywhere_loses_and_invents_nothing(sample: Sample) -> None:
    """What the beginning of an output brings is a beginning of what the whole brings, or not told apart yet."""
    tools, thinking, is_open, text, (_, _, expected) = sample
    for end in range(len(text)):
        events = run(parser(tools, thinking, is_open=is_open), [text[:end]])
        found = raw_calls(events)
        assert len(found) <= len(expected)
        for (name, arguments, complete), (whole_name, whole) in zip(found, expected, strict=False):
            assert name == whole_name
            if complete:
                assert json.loads(arguments) == whole


@given(st.sampled_from(SAMPLES), st.lists(st.integers(0, 600), max_size=40))
def test_random_cuts(sample: Sample, at: list[int]) -> None:
    tools, thinking, is_open, text, _ = sample
    pieces = cut(text, at)
    assert run(parser(tools, thinking, is_open=is_open), pieces) == run(
        parser(tools, thinking, is_open=is_open), [text]
    )


MARKUP = sorted(
    {marker for format in (*TOOL_FORMATS.values(), *REASONING_FORMATS.values()) for marker in format.markers}
    | {"<function=", "<parameter=", "</parameter>", "</function>", "ping", "get_weather", "city", ">", "\n"}
    | {'{"name": "ping", "arguments": ', '"', "{", "}", "[", "]", "(", ")", "=", ",", ";", ":", "\\", "to=functions."}
    | {"Here is my response:", "```json", "\u00e9", "\U0001f600", "\x00", "nul", "12", "'", "analysis", " ", "x" * 300}
)
soup = st.lists(st.sampled_from(MARKUP), max_size=25).map("".join)
SMALL = Limits(max_calls=2, max_call_chars=60)


@given(
    st.sampled_from(sorted(TOOL_FORMATS)),
    st.sampled_from([None, *sorted(REASONING_FORMATS)]),
    st.booleans(),
    soup,
    st.lists(st.integers(0, 900), max_size=12),
    st.sampled_from([None, SMALL]),
)
def test_any_soup_of_markup_means_the_same_however_cut(
    tools: str, thinking: str | None, is_open: bool, text: str, at: list[int], limits: Limits | None
) -> None:
    whole = run(parser(tools, thinking, is_open=is_open, limits=limits), [text])
    assert run(parser(tools, thinking, is_open=is_open, limits=limits), cut(text, at)) == whole
    for _, arguments, _ in raw_calls(whole):
        assert len(arguments) <= 60 or limits is None
    assert len(raw_calls(whole)) <= 2 or limits is None


NO_HARMONY = sorted(set(TOOL_FORMATS) - {"openai"})


@given(st.sampled_from(NO_HARMONY), soup, st.lists(st.integers(0, 900), max_size=6))
def test_without_a_call_the_content_is_the_text(tools: str, text: str, at: list[int]) -> None:
    events = run(parser(tools), cut(text, at))
    if not raw_calls(events):
        assert content(events) == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(), json_values, max_size=4)
WRAPPED = {
    "hermes": '<tool_call>\n{"name": "ping", "arguments": %s}\n</tool_call>',
    "llama3_json": '{"name": "ping", "parameters": %s}',
    "mistral": "[TOOL_CALLS]ping[ARGS]%s",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>ping\n```json\n%s\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "openai": "<|channel|>commentary to=functions.ping <|constrain|>json<|message|>%s<|call|>",
    "llama_nemotron_json": '<TOOLCALL>[{"name": "ping", "arguments": %s}]</TOOLCALL>',
}


@given(st.sampled_from(sorted(WRAPPED)), arguments, st.booleans(), st.lists(st.integers(0, 400), max_size=8))
def test_any_json_arguments_come_through_as_they_are_written(
    tools: str, value: dict[str, object], ascii_only: bool, at: list[int]
) -> None:
    written = json.dumps(value, ensure_ascii=ascii_only)
    events = run(parser(tools), cut(WRAPPED[tools] % written, at))
    assert raw_calls(events) == [("ping", written, True)]
    assert content(events) == ""


python_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(python_values, st.lists(st.integers(0, 400), max_size=8))
def test_pythons_own_spelling_of_values_is_read_as_json(value: object, at: list[int]) -> None:
    events = run(parser("pythonic"), cut(f"[ping(value={value!r})]", at))
    assert calls(events) == [("ping", {"value": json.loads(json.dumps(value))})]


@given(st.text(), st.lists(st.integers(0, 400), max_size=8))
def test_any_text_is_a_string_parameter(value: str, at: list[int]) -> None:
    tags = ("</parameter>", "\n<parameter=", "\n</function>")
    if any(tag in f"{value}\n" for tag in tags):
        return
    text = f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{value}\n</parameter>\n</function>\n</tool_call>"
    assert calls(run(parser("qwen3_coder"), cut(text, at))) == [("get_weather", {"city": value})]


def test_arguments_come_as_they_are_written() -> None:
    stream = parser("hermes")
    seen = [
        "".join(
            event.text for event in stream.feed(piece) if not isinstance(event, CallStarted) and hasattr(event, "text")
        )
        for piece in ('<tool_call>{"name": "ping", "arguments": {"a', '": "', "b", 'c"', "}")
    ]
    assert seen == ['{"a', '": "', "b", 'c"', "}"]


def test_content_comes_at_once_unless_it_may_be_markup() -> None:
    stream = parser("hermes")
    texts = [content(stream.feed(piece)) for piece in ("Hello", " wor", "ld", " <", "b> <tool", "box>", "\n", "x")]
    assert texts == ["Hello", " wor", "ld", "", " <b>", " <toolbox>", "", "\nx"]


def test_an_answer_in_json_does_not_wait_for_its_end() -> None:
    stream = parser("llama3_json")
    assert content(stream.feed('{"title": "A lo')) == '{"title": "A lo'
    assert content(stream.feed("ng")) == "ng"


def test_the_ids_are_made_by_who_asks_or_given_by_the_model() -> None:
    text = "[TOOL_CALLS]ping[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]ping[CALL_ID]short[ARGS]{}[TOOL_CALLS]ping{}"
    ids = [event.id for event in run(parser("mistral"), [text]) if isinstance(event, CallStarted)]
    assert ids == ["abcdefghi", "call_0", "call_1"]


@pytest.mark.parametrize("size", range(1, 9))
def test_no_parallel_calls_leaves_out_those_behind_the_first(size: int) -> None:
    ids = itertools.count()
    single = ComposedParser(None, HermesParser(ToolSet(), lambda: str(next(ids))), parallel=False)
    text = "".join(f'<tool_call>{{"name": "f{i}", "arguments": {{"a": {i}}}}}</tool_call>\n' for i in range(3))
    events = run(single, cut(text, range(0, len(text), size)))
    assert calls(events) == [("f0", {"a": 0})]
    assert content(events) == ""
