import pytest
from hypothesis import given
from hypothesis import strategies as st
from output_samples import SAMPLES, Expected, calls, content, cut, parser, reasoning, run

from stator.core.output_delta import CallCollector, OutputDelta, delta_of, ending_with_calls
from stator.core.tools.request import CallMode
from stator.errors import Ending
from stator.messages.tools import FunctionCall, ToolCall, ToolCallDelta


def test_one_delta_of_many_events() -> None:
    stream = parser("hermes")
    events = stream.feed(
        'Hi <tool_call>{"name": "ping", "arguments": {}}</tool_call><tool_call>{"name": "f", "arguments": {"a'
    )
    assert delta_of(events) == OutputDelta(
        "Hi", "", [ToolCallDelta(0, "call_0", "ping", "{}"), ToolCallDelta(1, "call_1", "f", '{"a')]
    )
    assert delta_of(stream.feed('": 1}')) == OutputDelta(tool_calls=[ToolCallDelta(1, arguments='": 1}')])
    assert not delta_of(stream.feed("}"))


Sample = tuple[str, str | None, bool, str, Expected]


@given(st.sampled_from(SAMPLES), st.lists(st.integers(0, 600), max_size=20))
def test_the_deltas_of_a_stream_add_up_to_the_whole(sample: Sample, at: list[int]) -> None:
    tools, thinks, is_open, text, _ = sample
    whole = run(parser(tools, thinks, is_open=is_open), [text])
    stream = parser(tools, thinks, is_open=is_open)
    deltas = [*(delta_of(stream.feed(piece)) for piece in cut(text, at)), delta_of(stream.finish())]
    collector = CallCollector()
    for delta in deltas:
        collector.add(delta.tool_calls)
    assert "".join(delta.text for delta in deltas) == content(whole)
    assert "".join(delta.reasoning for delta in deltas) == reasoning(whole)
    assert [call.function.name for call in collector.calls()] == [name for name, _ in calls(whole)]
    once = CallCollector()
    once.add(delta_of(whole).tool_calls)
    assert collector.calls() == once.calls()


def test_a_call_without_arguments_yet() -> None:
    collector = CallCollector()
    collector.add([ToolCallDelta(0, "id", "f")])
    assert collector.calls() == [ToolCall("id", FunctionCall("f", ""))]


@pytest.mark.parametrize(
    ("ending", "num_calls", "mode", "expected"),
    [
        (Ending.STOP, 1, CallMode.AUTO, Ending.TOOL_CALLS),
        (Ending.STOP, 2, CallMode.REQUIRED, Ending.TOOL_CALLS),
        (Ending.STOP, 1, CallMode.NAMED, Ending.STOP),
        (Ending.STOP, 0, CallMode.AUTO, Ending.STOP),
        (Ending.LENGTH, 1, CallMode.AUTO, Ending.LENGTH),
    ],
)
def test_why_an_output_with_calls_ended(ending: Ending, num_calls: int, mode: CallMode, expected: Ending) -> None:
    assert ending_with_calls(ending, num_calls, mode) is expected
