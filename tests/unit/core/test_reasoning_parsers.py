import pytest
from hypothesis import given
from hypothesis import strategies as st
from output_samples import content, cut, parser, reasoning, run

from stator.core.tools.registry import REASONING_FORMATS, reasoning_format

THINK = sorted(name for name, format in REASONING_FORMATS.items() if format.tags and format.tags.start == "<think>")


def split(name: str, text: str, *, is_open: bool = False) -> tuple[str, str]:
    found = {
        (reasoning(events), content(events))
        for pieces in ([text], list(text))
        for events in [run(parser(None, name, is_open=is_open), pieces)]
    }
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("name", THINK)
def test_thinking_in_tags(name: str) -> None:
    assert split(name, "<think>\nHm. <b>\n</think>\n\nHello </think>") == ("Hm. <b>", "Hello </think>")
    assert split(name, "Hm.\n</think>\n\nHello", is_open=True) == ("Hm.", "Hello")
    assert split(name, "<think>Hm.</think>Hello", is_open=True) == ("Hm.", "Hello")
    assert split(name, "\n\n<think>\n\n</think>\n\nHello") == ("", "Hello")
    assert split(name, "Hello <think>Hm.</think>") == ("", "Hello <think>Hm.</think>")
    assert split(name, "<think>never closed </thin") == ("never closed </thin", "")
    assert split(name, "  plain\n") == ("", "  plain\n")
    assert split(name, "") == ("", "")


def test_other_markers() -> None:
    assert split("mistral", "[THINK]a[/THINK]b") == ("a", "b")
    assert split("mistral", "[TOOL_CALLS]x") == ("", "[TOOL_CALLS]x")
    assert split("seed_oss", "<seed:think>a</seed:think>b") == ("a", "b")
    assert split("openai_gptoss", "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b") == ("a", "b")


def test_granites_phrases() -> None:
    assert split("granite", "Here is my thought process:\na b\nHere's my response:\nc") == ("a b", "c")
    assert split("granite", "Here is my answer") == ("", "Here is my answer")
    assert split("granite", "Well. Here is my thought process: a") == ("", "Well. Here is my thought process: a")


def test_markup_of_calls_ends_the_reasoning_of_models_that_forget_to() -> None:
    assert split("qwen3", "Hm.\n<tool_call>x", is_open=True) == ("Hm.", "<tool_call>x")
    assert split("glm45", "Hm.\n<tool_call>x", is_open=True) == ("Hm.\n<tool_call>x", "")


@pytest.mark.parametrize(
    ("name", "prompt", "is_open"),
    [
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "What does <think> mean?<|im_end|>\n<|im_start|>assistant\n", False),
        ("deepseek_r1", "<｜Assistant｜>", True),
        ("deepseek_r1", "<｜Assistant｜><think>\n", True),
        ("deepseek_r1", "<｜Assistant｜></think>", False),
        ("deepseek_v3", "<｜Assistant｜></think>", False),
        ("deepseek_v3", "<｜Assistant｜><think>", True),
        ("granite", "<think>", False),
        ("openai_gptoss", "<|start|>assistant", False),
        ("qwen3", "x" * 100_000 + "<think>\n", True),
    ],
)
def test_the_prompt_says_whether_the_output_begins_in_reasoning(name: str, prompt: str, is_open: bool) -> None:
    assert reasoning_format(name).is_open(prompt) is is_open


soup = st.lists(st.sampled_from(["<think>", "</think>", "<", "</thi", "\n", " ", "a", "<tool_call>"]), max_size=12).map(
    "".join
)


@given(st.sampled_from(THINK), soup, st.booleans(), st.lists(st.integers(0, 90), max_size=6))
def test_nothing_but_markup_and_the_space_around_it_is_lost(name: str, text: str, is_open: bool, at: list[int]) -> None:
    whole = run(parser(None, name, is_open=is_open), [text])
    assert run(parser(None, name, is_open=is_open), cut(text, at)) == whole

    def bare(text: str) -> str:
        return "".join(text.replace("<think>", "").replace("</think>", "").split())

    assert bare(reasoning(whole) + content(whole)) == bare(text)
    if not reasoning(whole) and not is_open and not text.lstrip().startswith("<think>"):
        assert content(whole) == text


def test_reasoning_comes_while_it_is_written() -> None:
    stream = parser("hermes", "qwen3", is_open=True)
    texts = [reasoning(stream.feed(piece)) for piece in ("\nThe", " user", " \n", "<", "b> ", "x</thi", "nk>", "y")]
    assert texts == ["The", " user", "", "", " \n<b>", " x", "", ""]
