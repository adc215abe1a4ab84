"""Outputs as models of each family write them, and running a parser over pieces of them."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from stator.core.tools.base import Limits, ToolSet
from stator.core.tools.events import CallArguments, CallEnded, CallStarted, Content, Event, Reasoning, joined
from stator.core.tools.parser import OutputParser
from stator.core.tools.registry import make_parser

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "deep": {"$ref": "#/$defs/Deep"},
        "on": {"type": "boolean"},
    },
    "required": ["city"],
    "$defs": {"Deep": {"type": "object"}},
}
TOOLS = ToolSet({"get_weather": WEATHER, "ping": None})


def parser(
    tools: str | None, reasoning: str | None = None, *, is_open: bool = False, limits: Limits | None = None
) -> OutputParser:
    ids = itertools.count()
    made = make_parser(
        tools, reasoning, tools=TOOLS, new_id=lambda: f"call_{next(ids)}", is_open=is_open, limits=limits
    )
    assert made is not None
    return made


def run(parser: OutputParser, pieces: Sequence[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined([*events, *parser.finish()])


def cut(text: str, at: Sequence[int]) -> list[str]:
    edges = sorted({0, len(text), *(each for each in at if 0 <= each <= len(text))})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def content(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def reasoning(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Reasoning))


def calls(events: Sequence[Event]) -> list[tuple[str, Any]]:
    """(name, decoded arguments) of each call; asserts that starts, arguments and ends are in order and complete."""
    return [(name, json.loads(text)) for name, text, complete in raw_calls(events) if complete]


def raw_calls(events: Sequence[Event]) -> list[tuple[str, str, bool]]:
    """(name, arguments' text, complete); asserts the order of starts, arguments and ends."""
    found: list[tuple[str, str, bool]] = []
    current: CallStarted | None = None
    pieces: list[str] = []
    for event in events:
        match event:
            case CallStarted():
                assert current is None and event.index == len(found)
                current, pieces = event, []
            case CallArguments():
                assert current is not None and event.index == current.index
                pieces.append(event.text)
            case CallEnded():
                assert current is not None and event.index == current.index
                found.append((current.name, "".join(pieces), event.complete))
                current = None
            case _:
                assert current is None or not isinstance(event, Reasoning)
    assert current is None
    return found


Expected = tuple[str, str, list[tuple[str, Any]]]
"""Reasoning, content, calls."""

PARIS = ("get_weather", {"city": "Paris"})
PING: tuple[str, dict[str, Any]] = ("ping", {})
ESCAPED = ("get_weather", {"city": 'S\u00e3o "P\\aulo"\n\U0001f600', "days": 3})
_ESCAPED_JSON = '{"city": "S\u00e3o \\"P\\\\aulo\\"\\n\\ud83d\\ude00", "days": 3}'

SAMPLES: list[tuple[str, str | None, bool, str, Expected]] = [
    # tool parser, reasoning parser, whether the prompt opened the reasoning, output, what it means
    ("hermes", None, False, "Just an answer with <b>tags</b>.\n", ("", "Just an answer with <b>tags</b>.\n", [])),
    (
        "hermes", None, False,
        'I look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "get_weather", "arguments": {_ESCAPED_JSON}}}\n</tool_call>\n',
        ("", "I look.", [PARIS, ESCAPED]),
    ),
    (
        "hermes", None, False,
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>',
        ("", "", [PARIS]),
    ),
    (
        "hermes", "qwen3", False,
        '<think>\nThey want {"weather"}.\n\nSo:\n</think>\n\n<tool_call>\n{"name": "ping", "arguments": {}}\n'
        "</tool_call>",
        ('They want {"weather"}.\n\nSo:', "", [PING]),
    ),
    ("hermes", "qwen3", True, "Hm.\n</think>\n\nHello <think>!", ("Hm.", "Hello <think>!", [])),
    ("hermes", "qwen3", True, 'Hm.\n<tool_call>{"name": "ping", "arguments": {}}</tool_call>', ("Hm.", "", [PING])),
    ("hermes", "deepseek_r1", True, "never closed\n", ("never closed", "", [])),
    (
        "qwen3_coder", "qwen3", False,
        "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nLine 1\n\"two\" </b>\\n\n\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=limit>\nnull\n</parameter>\n<parameter=tags>\n[\"a\", \"b\"]\n"
        "</parameter>\n<parameter=deep>\n{\"x\": {\"y\": 1.5}}\n</parameter>\n<parameter=on>\nTrue\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=ping>\n</function>\n</tool_call>",
        (
            "", "Sure.",
            [
                (
                    "get_weather",
                    {
                        "city": "Line 1\n\"two\" </b>\\n\n", "days": 3, "limit": None, "tags": ["a", "b"],
                        "deep": {"x": {"y": 1.5}}, "on": True,
                    },
                ),
                PING,
            ],
        ),
    ),
    (
        "qwen3_coder", None, False,
        "<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n</function>\n</tool_call>",
        ("", "", [("get_weather", {"city": "Paris", "days": 3})]),
    ),
    (
        "llama3_json", None, False,
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "ping", "parameters": {}}',
        ("", "", [PARIS, PING]),
    ),
    (
        "llama3_json", None, False,
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {_ESCAPED_JSON}}}',
        ("", "", [ESCAPED]),
    ),
    ("llama3_json", None, False, '{"name": "Bob", "age": 3}', ("", '{"name": "Bob", "age": 3}', [])),
    ("llama3_json", None, False, '{"answer": {"name": "ping"}}', ("", '{"answer": {"name": "ping"}}', [])),
    (
        "pythonic", None, False,
        "[get_weather(city='S\u00e3o \"P\\\\aulo\"\\n\\U0001f600', days=3), ping()]",
        ("", "", [ESCAPED, PING]),
    ),
    (
        "pythonic", None, False,
        '[get_weather(city="""a"b""", limit=-1.5e3, tags=["x", ], deep={"k": (True, None), 3: 0x10}, on=False)]',
        (
            "", "",
            [
                (
                    "get_weather",
                    {"city": 'a"b', "limit": -1500.0, "tags": ["x"], "deep": {"k": [True, None], "3": 16}, "on": False},
                )
            ],
        ),
    ),
    ("pythonic", None, False, "[1, 2, 3] is a list", ("", "[1, 2, 3] is a list", [])),
    ("pythonic", None, False, "[print(a=1)]", ("", "[print(a=1)]", [])),
    (
        "llama4_pythonic", None, False,
        'On it. <|python_start|>[ping(), get_weather(city="Paris")]<|python_end|>',
        ("", "On it.", [PING, PARIS]),
    ),
    (
        "mistral", "mistral", False,
        '[THINK]Hm.\n[/THINK]Wait.[TOOL_CALLS] [{"name": "ping", "arguments": {}}, {"name": "get_weather", '
        '"arguments": {"city": "Paris"}, "id": "123456789"}]',
        ("Hm.", "Wait.", [PING, PARIS]),
    ),
    (
        "mistral", None, False,
        '[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]ping[ARGS]{}',
        ("", "", [PARIS, PING]),
    ),
    ("mistral", None, False, f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{_ESCAPED_JSON}", ("", "", [ESCAPED])),
    (
        "deepseek_v3", "deepseek_r1", True,
        "Hm.\n</think>\n\nI ask.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{_ESCAPED_JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>ping\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("Hm.", "I ask.", [ESCAPED, PING]),
    ),
    (
        "deepseek_v31", "deepseek_v3", False,
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>ping<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("", "", [PARIS, PING]),
    ),
    (
        "openai", "openai_gptoss", False,
        "<|channel|>analysis<|message|>User wants {x}.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        f"{_ESCAPED_JSON}<|call|>",
        ("User wants {x}.", "I look.", [ESCAPED]),
    ),
    (
        "openai", "openai_gptoss", False,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.ping<|channel|>commentary json"
        "<|message|>{}",
        ("Hm.", "", [PING]),
    ),
    (
        "openai", None, False,
        "<|channel|>commentary to=browser.search code<|message|>{\"q\": 1}<|call|><|start|>assistant<|channel|>final"
        "<|message|>Hello < | world.<|return|>",
        ('{"q": 1}', "Hello < | world.", []),
    ),
    ("openai", None, False, "assistants are people", ("", "assistants are people", [])),
    (
        "llama_nemotron_json", "nemotron_v3", False,
        '<think>\nHm.\n</think>\n\n<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "ping", "arguments": "{}"}]</TOOLCALL>',
        ("Hm.", "", [PARIS, PING]),
    ),
    ("granite", "granite", False, "Here's my thought process:\nHm.\n\nHere is my response: Hi", ("Hm.", "Hi", [])),
    ("granite", "granite", False, '<|tool_call|>[{"name": "ping", "arguments": null}]', ("", "", [PING])),
    (
        "phi4_mini_json", None, False,
        'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        ("", "", [PARIS]),
    ),
    ("jamba", None, False, '<tool_calls>[\n  {"name": "ping"}\n]</tool_calls>', ("", "", [PING])),
]  # fmt: skip
