"""Which parsers read a model's output: told by what its chat template teaches the model to write."""

from collections.abc import Callable, Collection

from stator.core.tools import deepseek, harmony, mistral
from stator.core.tools.registry import HARMONY, HARMONY_REASONING, NONE, reasoning_format, tool_format

Rule = Callable[["_Features"], bool]


class _Features:
    def __init__(self, template: str, special_tokens: Collection[str], model_type: str) -> None:
        self.template = template
        self.special_tokens = special_tokens
        self.model_type = model_type

    def says(self, *texts: str) -> bool:
        return all(text in self.template for text in texts)

    def knows(self, token: str) -> bool:
        return token in self.special_tokens or token in self.template

    @property
    def is_harmony(self) -> bool:
        return self.model_type == "gpt_oss" or self.says(harmony.CHANNEL, harmony.MESSAGE)

    @property
    def takes_tools(self) -> bool:
        return "tools" in self.template


_TOOL_RULES: tuple[tuple[str | None, Rule], ...] = (
    (HARMONY, lambda f: f.is_harmony),
    ("mistral", lambda f: f.knows(mistral.START)),
    ("deepseek_v3", lambda f: f.says(deepseek.CALL_BEGIN, "```json")),
    ("deepseek_v31", lambda f: f.says(deepseek.CALL_BEGIN)),
    ("llama_nemotron_json", lambda f: f.takes_tools and f.says("<TOOLCALL>")),
    ("qwen3_coder", lambda f: f.takes_tools and f.says("<function=", "<parameter=")),
    # The same tag around another format, GLM's, which has no parser here.
    (None, lambda f: f.says("<arg_key>")),
    ("granite", lambda f: f.takes_tools and f.says("<|tool_call|>")),
    ("jamba", lambda f: f.takes_tools and f.says("<tool_calls>")),
    ("phi4_mini_json", lambda f: f.takes_tools and f.says("functools")),
    ("hermes", lambda f: f.takes_tools and f.says("<tool_call>")),
    ("llama4_pythonic", lambda f: f.takes_tools and f.says("<|python_start|>")),
    ("pythonic", lambda f: f.takes_tools and f.says("[func_name1(")),
    ("llama3_json", lambda f: f.takes_tools and f.says('"parameters": ') and f.knows("<|python_tag|>")),
)
"""The first that holds."""

_REASONING_RULES: tuple[tuple[str, Rule], ...] = (
    (HARMONY_REASONING, lambda f: f.is_harmony),
    ("mistral", lambda f: f.knows("[THINK]")),
    ("granite", lambda f: f.says("Here is my thought process")),
    ("seed_oss", lambda f: f.says("<seed:think>")),
    # Where the template opens and closes the reasoning, the prompt says which; R1's early ones do neither.
    ("deepseek_v3", lambda f: f.says("</think>", "<｜Assistant｜>", "thinking")),
    ("deepseek_r1", lambda f: f.says("</think>", "<｜Assistant｜>")),
    ("nemotron_v3", lambda f: f.says("</think>", "<TOOLCALL>")),
    ("glm45", lambda f: f.says("</think>", "<arg_key>")),
    ("qwen3", lambda f: f.says("</think>")),
)


def choose_parsers(
    template: str | None,
    special_tokens: Collection[str] = (),
    model_type: str = "",
    *,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> tuple[str | None, str | None]:
    """(tool parser, reasoning parser): names of `registry`, None where the model has no format that is known.

    template: the chat template's text. special_tokens: the tokenizer's. model_type: of config.json. tool_parser,
    reasoning_parser: what the configuration says instead, "none" for none; raises ConfigError if there is none such.
    """
    features = _Features(template or "", special_tokens, model_type)
    tools = tool_parser or next((name for name, holds in _TOOL_RULES if holds(features)), None)
    reasoning = reasoning_parser or next((name for name, holds in _REASONING_RULES if holds(features)), None)
    tools = None if tools == NONE else tools
    reasoning = None if reasoning == NONE else reasoning
    if tools is not None:
        tool_format(tools)
    if reasoning is not None:
        reasoning_format(reasoning)
    return tools, reasoning
