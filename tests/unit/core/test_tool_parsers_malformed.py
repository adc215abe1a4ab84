"""Broken and hostile outputs: what becomes of them, what they may hold, and that their cost is linear.

Work is counted, not timed: lines of Python executed, and characters a reader copies when text arrives.
"""

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
from output_samples import TOOLS, calls, content, cut, parser, raw_calls, reasoning, run

from stator.core.tools.base import Limits
from stator.core.tools.json_text import MAX_DEPTH
from stator.core.tools.reader import Markers, TextReader
from stator.core.tools.registry import TOOL_FORMATS

BROKEN: list[tuple[str, str, list[tuple[str, str, bool]], str]] = [
    # format, output, calls, content
    ("hermes", "<tool_call>nothing</tool_call>", [], "<tool_call>nothing</tool_call>"),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', [], '<tool_call>{"name": 3}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}', [], '<tool_call>{"arguments": {}}'),
    ("hermes", '<tool_call>{"name": "f", "arguments": 3}', [], '<tool_call>{"name": "f", "arguments": 3}'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "no"}', [], '<tool_call>{"name": "f", "arguments": "no"}'),
    ("hermes", '<tool_call><tool_call>{"name": "f"}</tool_call>', [("f", "{}", True)], "<tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', [("f", '{"a": 1', False)], ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1}}', [("f", '{"a": [1', False)], "}}"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": maybe}}</tool_call>', [("f", '{"a": maybe}', True)], ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>ok', [("f", '{"a": 1}', True)], "ok"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}}}</tool_call>ok', [("f", "{}", True)], "ok"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, "x": {"y": "}"}}</tool_call>', [("f", "{}", True)], ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny\t"}}', [("f", '{"a": "x\\ny\\t"}', True)], ""),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "x\\\n\\\x0b"}}',
        [("f", '{"a": "x\\n\\u000b"}', True)],
        "",
    ),
    ("hermes", '<tool_call>{"name": "unheard of", "arguments": {}}', [("unheard of", "{}", True)], ""),
    ("llama3_json", '{"name": "unheard of", "parameters": {}}', [], '{"name": "unheard of", "parameters": {}}'),
    ("llama3_json", 'Hi {"name": "ping", "parameters": {}}', [], 'Hi {"name": "ping", "parameters": {}}'),
    ("llama3_json", '{"name": "ping", "parameters": {}} and so', [("ping", "{}", True)], "and so"),
    ("llama3_json", '{"name": "ping", "parameters": {}}; x', [("ping", "{}", True)], "; x"),
    ("pythonic", "[ping(a=open('x'))]", [("ping", '{"a": ', False)], "('x'))]"),
    ("pythonic", "[ping(1)]", [], "[ping(1)]"),
    ("pythonic", "[ping(a='x", [("ping", '{"a": "x', False)], ""),
    ("pythonic", "[ping(a=1) or else", [("ping", '{"a": 1}', True)], "or else"),
    ("pythonic", "[ping(a=float('inf'))]", [("ping", '{"a": ', False)], "('inf'))]"),
    ("mistral", "[TOOL_CALLS]", [], "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] and text", [], "[TOOL_CALLS] and text"),
    ("mistral", '[TOOL_CALLS][{"name": "ping", "arguments": {}}, oops]', [("ping", "{}", True)], "oops]"),
    ("deepseek_v31", "<｜tool▁calls▁begin｜>oops", [], "<｜tool▁calls▁begin｜>oops"),
    ("deepseek_v31", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{", [("f", "{", False)], ""),
    ("qwen3_coder", "<tool_call>\n<function=f>\noops", [], "<tool_call>\n<function=f>\noops"),
    ("qwen3_coder", "<function=f>\n<parameter=a>\nx\ny", [("f", '{"a": "x\\ny', False)], ""),
    ("qwen3_coder", "<function=get_weather><parameter=days>4", [("get_weather", '{"days": 4', False)], ""),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=days>four</parameter></function>",
        [("get_weather", '{"days": "four"}', True)],
        "",
    ),
    ("openai", "no <|channel|> at all", [], "no <|channel|> at all"),
    (
        "openai",
        "<|channel|>commentary to=functions.f<|message|>not json<|call|><|channel|>final<|message|>ok",
        [("f", "not json", False)],
        "ok",
    ),
    ("openai", "<|channel|>commentary to=functions.f<|message|>", [("f", "", False)], ""),
]


@pytest.mark.parametrize(("tools", "text", "expected", "rest"), BROKEN)
def test_broken_calls(tools: str, text: str, expected: list[tuple[str, str, bool]], rest: str) -> None:
    for pieces in ([text], list(text)):
        events = run(parser(tools), pieces)
        assert raw_calls(events) == expected
        assert content(events) == rest


OPENINGS = {
    "hermes": '<tool_call>{"name": "ping", "arguments": ',
    "llama3_json": '{"name": "ping", "parameters": ',
    "mistral": "[TOOL_CALLS]ping",
    "deepseek_v31": "<｜tool▁call▁begin｜>ping<｜tool▁sep｜>",
    "openai": "<|channel|>commentary to=functions.ping<|message|>",
    "llama_nemotron_json": '<TOOLCALL>[{"name": "ping", "arguments": ',
}


@pytest.mark.parametrize("tools", sorted(OPENINGS))
def test_deep_nesting_ends_the_call_and_loses_nothing(tools: str) -> None:
    num = 100_000
    events = run(parser(tools), [OPENINGS[tools] + '{"a":' * num])
    [(_, arguments, complete)] = raw_calls(events)
    assert (arguments, complete) == ('{"a":' * MAX_DEPTH, False)
    assert content(events) == '{"a":' * (num - MAX_DEPTH)


def test_deep_pythonic_nesting_ends_the_call_and_loses_nothing() -> None:
    events = run(parser("pythonic"), ["[ping(a=" + "[" * 100_000])
    [(_, arguments, complete)] = raw_calls(events)
    assert (arguments, complete) == ('{"a": ' + "[" * MAX_DEPTH, False)
    assert content(events) == "[" * (100_000 - MAX_DEPTH)


@pytest.mark.parametrize("tools", sorted(OPENINGS))
def test_arguments_past_the_bound_are_content(tools: str) -> None:
    body = '{"a": "' + "x" * 5000 + '"}'
    events = run(parser(tools, limits=Limits(max_call_chars=1000)), cut(OPENINGS[tools] + body, range(0, 6000, 77)))
    assert raw_calls(events) == [("ping", body[:1000], False)]
    assert content(events).startswith(body[1000:])


def test_text_held_to_see_whether_it_is_a_call_is_bounded() -> None:
    text = '<tool_call>{"arguments": {"a": "' + "x" * 5000 + '"}, "name": "ping"}</tool_call>'
    events = run(parser("hermes", limits=Limits(max_call_chars=1000)), [text])
    assert raw_calls(events) == []
    assert content(events) == text


def test_calls_past_the_bound_are_content() -> None:
    call = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    events = run(parser("hermes", limits=Limits(max_calls=3)), [call * 5])
    assert len(calls(events)) == 3
    assert content(events) == call * 2


def test_space_past_the_bound_is_content() -> None:
    space = "\n" * 100_000
    call = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    events = run(parser("hermes"), cut(f"a{space}{call}", range(0, 100_000, 999)))
    assert content(events) == f"a{space}"
    assert reasoning(run(parser(None, "qwen3", is_open=True), [f"a{space}</think>b"])) == f"a{space}"


# Cost

LONG: dict[str, tuple[str, Callable[[int], str]]] = {
    "plain text": ("hermes", lambda n: "word " * n),
    "almost markers": ("deepseek_v3", lambda n: "<｜tool▁call <｜tool▁calls▁beg" * n),
    "unclosed string": ("hermes", lambda n: '<tool_call>{"name": "ping", "arguments": {"a": "' + "x\\n" * n),
    "many opening tags": ("hermes", lambda n: "<tool_call>" * n),
    "many broken calls": ("hermes", lambda n: '<tool_call>{"name": ' * n),
    "many calls": ("hermes", lambda n: '<tool_call>{"name": "ping", "arguments": {"a": 1}}</tool_call>' * n),
    "held object": ("hermes", lambda n: '<tool_call>{"arguments": {"a": [' + "1, " * n),
    "held object of llama": ("llama3_json", lambda n: '{"parameters": {"a": [' + "1, " * n),
    "spaces": ("hermes", lambda n: "<tool_call>" + " " * n),
    "many lists": ("mistral", lambda n: "[TOOL_CALLS][" * n),
    "pythonic list": ("pythonic", lambda n: "[ping(a=[" + "1, 'x', " * n),
    "xml value": ("qwen3_coder", lambda n: "<function=get_weather>\n<parameter=days>\n" + "\n" * n),
    "xml parameters": (
        "qwen3_coder",
        lambda n: "<function=get_weather>\n" + "<parameter=city>\nx\n</parameter>\n" * n,
    ),
    "harmony header": ("openai", lambda n: "<|channel|>final " + "x" * n),
    "harmony messages": ("openai", lambda n: "<|channel|>final<|message|>x<|end|><|start|>assistant" * n),
    "unclosed thought": ("hermes", lambda n: "<think>" + "hm\n\n</thin" * n),
}


def work(make: Callable[[], Any], pieces: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(lines executed in the parsers, characters copied by readers)."""
    num_lines = num_chars = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal num_lines
        if "/stator/core/" not in frame.f_code.co_filename:
            return None
        num_lines += event == "line"
        return trace

    feed = TextReader.feed

    def counted(self: TextReader, text: str) -> None:
        nonlocal num_chars
        feed(self, text)
        num_chars += len(self._text)  # pyright: ignore[reportPrivateUsage]

    with monkeypatch.context() as patch:
        patch.setattr(TextReader, "feed", counted)
        instance = make()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            run(instance, pieces)
        finally:
            sys.settrace(before)
    return num_lines, num_chars


@pytest.mark.parametrize("piece_chars", [4, 1 << 20])
@pytest.mark.parametrize("name", sorted(LONG))
def test_twice_the_text_is_twice_the_work(name: str, piece_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, make_text = LONG[name]
    costs: list[tuple[int, int]] = []
    for num in (100, 200):
        text = make_text(num)
        pieces = cut(text, range(0, len(text), piece_chars))
        costs.append(work(lambda: parser(tools, "qwen3"), pieces, monkeypatch))
    (lines, chars), (more_lines, more_chars) = costs
    assert lines > 0 and chars > 0
    assert more_lines <= 2.2 * lines + 200
    assert more_chars <= 2.2 * chars + 200


@pytest.mark.parametrize("tools", sorted(TOOL_FORMATS))
def test_megabytes_pass(tools: str) -> None:
    text = "x[{(<" * 400_000
    events = run(parser(tools), cut(text, range(0, len(text), 65_536)))
    assert content(events) == text


def test_markers_must_not_begin_one_another() -> None:
    with pytest.raises(ValueError, match="begins another"):
        Markers("<a>", "<a><b>")
    with pytest.raises(ValueError, match="empty"):
        Markers("<a>", "")


def test_the_tools_of_the_samples_are_what_the_texts_call() -> None:
    assert "ping" in TOOLS and "nobody" not in TOOLS
