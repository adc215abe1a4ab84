"""Tool-call and reasoning parsers by name: vLLM's names, of its --tool-call-parser and --reasoning-parser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from stator.core.output_parser import ComposedParser
from stator.core.reasoning.granite import GraniteReasoningParser
from stator.core.reasoning.tags import TagFormat, TagReasoningParser
from stator.core.tools import deepseek, forced, harmony, hermes, llama_json, mistral, pythonic, qwen_xml
from stator.core.tools.base import CallParser, Limits, NewId, ToolSet
from stator.core.tools.json_array import JsonArrayParser
from stator.core.tools.parser import OutputParser
from stator.errors import ConfigError

NONE = "none"
"""As a parser's name: do without."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """make: a parser for one output. styles: how forced calls are written (`forced.force`), the newest first.

    markers: literals of the format. Those that are special tokens of the model must be shown by the detokenizer.
    """

    make: Callable[[ToolSet, NewId, Limits | None], CallParser]
    styles: tuple[forced.Style, ...]
    markers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """tags: None for a format that is not told by the prompt. end: the marker behind the reasoning, if it is one."""

    tags: TagFormat | None
    markers: tuple[str, ...]

    def is_open(self, prompt: str) -> bool:
        return self.tags is not None and self.tags.is_open(prompt)


def _array_format(starts: tuple[str, ...], end: str) -> ToolFormat:
    def make(tools: ToolSet, new_id: NewId, limits: Limits | None) -> CallParser:
        return JsonArrayParser(tools, new_id, limits, starts=starts, end=end)

    return ToolFormat(make, (forced.array_style(starts[0], end),), (*starts, end) if end else starts)


_HERMES = ToolFormat(hermes.HermesParser, (forced.HERMES,), (hermes.START, hermes.END))
_QWEN_XML = ToolFormat(qwen_xml.QwenXmlParser, (forced.QWEN_XML,), (qwen_xml.START, qwen_xml.END))
_LLAMA_JSON = ToolFormat(llama_json.LlamaJsonParser, (forced.LLAMA_JSON,), (llama_json.TAG,))
_PYTHONIC = ToolFormat(pythonic.PythonicParser, (forced.PYTHONIC,), (pythonic.START, pythonic.END))
_DEEPSEEK_MARKERS = (
    deepseek.CALLS_BEGIN, deepseek.CALLS_END, deepseek.CALL_BEGIN, deepseek.CALL_END, deepseek.SEPARATOR
)  # fmt: skip
_HARMONY_MARKERS = (
    harmony.START, harmony.CHANNEL, harmony.CONSTRAIN, harmony.MESSAGE, harmony.END, harmony.CALL, harmony.RETURN
)  # fmt: skip

HARMONY = "openai"
HARMONY_REASONING = "openai_gptoss"

TOOL_FORMATS: dict[str, ToolFormat] = {
    "deepseek_v3": ToolFormat(deepseek.DeepSeekParser, (forced.DEEPSEEK_V3,), _DEEPSEEK_MARKERS),
    "deepseek_v31": ToolFormat(deepseek.DeepSeekParser, (forced.DEEPSEEK_V31,), _DEEPSEEK_MARKERS),
    "granite": _array_format(("<|tool_call|>", "<tool_call>"), ""),
    "granite4": _HERMES,
    "hermes": _HERMES,
    "jamba": _array_format(("<tool_calls>",), "</tool_calls>"),
    "llama3_json": _LLAMA_JSON,
    "llama4_json": _LLAMA_JSON,
    "llama4_pythonic": _PYTHONIC,
    "llama_nemotron_json": _array_format(("<TOOLCALL>",), "</TOOLCALL>"),
    "mistral": ToolFormat(
        mistral.MistralParser, (forced.MISTRAL, forced.MISTRAL_ARRAY), (mistral.START, mistral.ARGS, mistral.CALL_ID)
    ),
    HARMONY: ToolFormat(harmony.HarmonyParser, (forced.HARMONY,), _HARMONY_MARKERS),
    "phi4_mini_json": _array_format(("functools",), ""),
    "pythonic": _PYTHONIC,
    "qwen3_coder": _QWEN_XML,
    "qwen3_json": _HERMES,
    "qwen3_xml": _QWEN_XML,
}
"""`llama_nemotron_json` is what NVIDIA's plugin for vLLM is called."""


def _tags(start: str, end: str, *implicit_ends: str, assumed_open: bool = False) -> ReasoningFormat:
    return ReasoningFormat(TagFormat(start, end, implicit_ends, assumed_open), (start, end))


_THINK = ("<think>", "</think>")

REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "deepseek_r1": _tags(*_THINK, deepseek.CALLS_BEGIN, assumed_open=True),
    "deepseek_v3": _tags(*_THINK, deepseek.CALLS_BEGIN),
    "glm45": _tags(*_THINK),
    "granite": ReasoningFormat(None, ()),
    "mistral": _tags("[THINK]", "[/THINK]", mistral.START),
    "nemotron_v3": _tags(*_THINK, "<TOOLCALL>", hermes.START),
    HARMONY_REASONING: ReasoningFormat(None, _HARMONY_MARKERS),
    "qwen3": _tags(*_THINK, hermes.START),
    "seed_oss": _tags("<seed:think>", "</seed:think>"),
}


def tool_format(name: str) -> ToolFormat:
    """Raises ConfigError, with the known names, for another."""
    return TOOL_FORMATS.get(name) or _unknown("tool-call parser", name, TOOL_FORMATS)


def reasoning_format(name: str) -> ReasoningFormat:
    """Raises ConfigError, with the known names, for another."""
    return REASONING_FORMATS.get(name) or _unknown("reasoning parser", name, REASONING_FORMATS)


def _unknown(what: str, name: str, known: dict[str, ToolFormat] | dict[str, ReasoningFormat]) -> NoReturn:
    names = ", ".join(sorted(known))
    raise ConfigError(f"there is no {what} {name!r}; known are {names}, and {NONE!r} to do without")


def shown_markers(tool_name: str | None, reasoning_name: str | None) -> frozenset[str]:
    """Literals that these parsers read: where they are special tokens, the detokenizer must not skip them."""
    markers = set[str]()
    if tool_name is not None:
        markers.update(tool_format(tool_name).markers)
    if reasoning_name is not None:
        markers.update(reasoning_format(reasoning_name).markers)
    return frozenset(markers)


def make_parser(
    tool_name: str | None,
    reasoning_name: str | None,
    *,
    tools: ToolSet,
    new_id: NewId,
    is_open: bool,
    parallel: bool = True,
    limits: Limits | None = None,
) -> OutputParser | None:
    """The parser of one output; None if its text is its content.

    tool_name: None also for a request without tools, or with `tool_choice: none`. is_open: whether the prompt opened
    the reasoning (`ReasoningFormat.is_open`). parallel: otherwise calls behind the first are left out.
    """
    if reasoning_name == HARMONY_REASONING or tool_name == HARMONY:
        return ComposedParser(None, harmony.HarmonyParser(tools, new_id, limits), parallel=parallel)
    calls = None if tool_name is None else tool_format(tool_name).make(tools, new_id, limits)
    reasoning = None if reasoning_name is None else _reasoning_parser(reasoning_name, is_open=is_open)
    if calls is None and reasoning is None:
        return None
    return ComposedParser(reasoning, calls, parallel=parallel)


def _reasoning_parser(name: str, *, is_open: bool) -> OutputParser:
    format = reasoning_format(name)
    return GraniteReasoningParser() if format.tags is None else TagReasoningParser(format.tags, is_open=is_open)
