"""Forced calls (`tool_choice` required or a named function), as a grammar in the words of the model's format.

What a grammar backend generates by it is read by the format's parser like anything else, so forced and free calls reach
the client alike. No text is added to the prompt: the grammar begins where the template's prompt ends, which for a
reasoning model is in or before its reasoning.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from stator.core.reasoning.tags import TagFormat
from stator.core.tools import deepseek, harmony, hermes, mistral, qwen_xml
from stator.core.tools.base import ToolSet
from stator.core.tools.grammar import NOTHING, optional
from stator.core.tools.schema_types import Schema, allowed_types, property_schema
from stator.errors import ErrorCode, StatorError
from stator.messages.grammar import Choice, Json, Literal, Node, Repeat, Sequence, TextUntil


class Arguments(Enum):
    JSON = "json"
    XML = "xml"
    PYTHON = "python"


MAX_COPIED_BYTES = 1 << 20
MAX_PARAMETERS = 256
MAX_LEADING = 16
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_NAME = "NAME"
_XML_NAME = re.compile(r"[^<>\n]+")
_PYTHON_NAME = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Style:
    """How a format writes calls: before, then for each call begin, arguments, end, with separators; after.

    begin has NAME for the function's name. single: the format has one call an output. needs: a token without which
    the model's tokenizer is older than this style.
    """

    begin: str
    end: str
    separator: str = ""
    before: str = ""
    after: str = ""
    arguments: Arguments = Arguments.JSON
    single: bool = False
    needs: str = ""


def array_style(start: str, end: str) -> Style:
    return Style('{"name": "NAME", "arguments": ', "}", ", ", f"{start}[", f"]{end}")


HERMES = Style(f'{hermes.START}\n{{"name": "NAME", "arguments": ', f"}}\n{hermes.END}", "\n")
LLAMA_JSON = Style('{"name": "NAME", "parameters": ', "}", "; ")
PYTHONIC = Style("NAME(", ")", ", ", "[", "]", Arguments.PYTHON)
MISTRAL = Style(f"{mistral.START}NAME{mistral.ARGS}", "", needs=mistral.ARGS)
MISTRAL_ARRAY = array_style(mistral.START, "")
DEEPSEEK_V3 = Style(
    f"{deepseek.CALL_BEGIN}function{deepseek.SEPARATOR}NAME\n```json\n",
    f"\n```{deepseek.CALL_END}",
    "\n",
    deepseek.CALLS_BEGIN,
    deepseek.CALLS_END,
)
DEEPSEEK_V31 = Style(
    f"{deepseek.CALL_BEGIN}NAME{deepseek.SEPARATOR}", deepseek.CALL_END, "", deepseek.CALLS_BEGIN, deepseek.CALLS_END
)
QWEN_XML = Style(
    f"{qwen_xml.START}\n{qwen_xml.FUNCTION}NAME>\n",
    f"{qwen_xml.FUNCTION_END}\n{qwen_xml.END}",
    "\n",
    arguments=Arguments.XML,
)
# What ends a message of calls is a stop token of the model: a grammar allows those where it is done.
HARMONY = Style(
    f"{harmony.CHANNEL}commentary to=functions.NAME {harmony.CONSTRAIN}json{harmony.MESSAGE}", "", single=True
)
_HARMONY_ANALYSIS = Sequence(
    (
        Literal(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}"),
        TextUntil(harmony.END),
        Literal(f"{harmony.START}assistant"),
    )
)


def force(
    styles: tuple[Style, ...],
    tools: ToolSet,
    names: Collection[str],
    *,
    parallel: bool,
    special_tokens: Collection[str] = (),
    reasoning: TagFormat | None = None,
    is_open: bool = False,
) -> Node:
    """The grammar of an output that calls one of these functions, or several times where `parallel`.

    styles: of the format, newest first. names: functions of `tools`, at least one. reasoning, is_open: the model's
    reasoning markers, and whether the prompt opened them; before a call the model may reason.
    """
    chosen = next(style for style in styles if not style.needs or style.needs in special_tokens)
    return _forced(chosen, tools, names, parallel=parallel, thinking=_thinking(chosen, reasoning, is_open=is_open))


def constrained_answer(
    answer: Node, *, is_harmony: bool = False, reasoning: TagFormat | None = None, is_open: bool = False
) -> Node:
    """The grammar of an output whose text is to be `answer`: what the model may write before it stays free."""
    if is_harmony:
        return Sequence((optional(_HARMONY_ANALYSIS), Literal(f"{harmony.CHANNEL}final{harmony.MESSAGE}"), answer))
    thinking = _tagged_thinking(reasoning, is_open=is_open)
    return answer if thinking == NOTHING else Sequence((thinking, answer))


def _forced(style: Style, tools: ToolSet, names: Collection[str], *, parallel: bool, thinking: Node) -> Node:
    calls = tuple(_call(style, name, tools.parameters[name]) for name in names)
    call = calls[0] if len(calls) == 1 else Choice(calls)
    repeated = Repeat(call, style.separator) if parallel and not style.single else call
    parts = [thinking, Literal(style.before), repeated, Literal(style.after)]
    return Sequence(tuple(part for part in parts if part not in (NOTHING, Literal(""))))


def _thinking(style: Style, reasoning: TagFormat | None, *, is_open: bool) -> Node:
    return optional(_HARMONY_ANALYSIS) if style is HARMONY else _tagged_thinking(reasoning, is_open=is_open)


def _tagged_thinking(reasoning: TagFormat | None, *, is_open: bool) -> Node:
    if reasoning is None:
        return NOTHING
    # The templates put a blank line behind the reasoning.
    rest = Sequence((TextUntil(reasoning.end), optional(Literal("\n\n"))))
    return rest if is_open else optional(Sequence((Literal(reasoning.start), rest)))


def _call(style: Style, name: str, parameters: Mapping[str, Any] | None) -> Node:
    schema = parameters or _NO_PARAMETERS
    match style.arguments:
        case Arguments.JSON:
            arguments: Node = Json(dict(schema))
        case Arguments.XML:
            arguments = _xml_arguments(schema)
        case Arguments.PYTHON:
            arguments = _python_arguments(schema)
    return Sequence((Literal(style.begin.replace(_NAME, name)), arguments, Literal(style.end)))


def _parameters(schema: Schema, names: re.Pattern[str]) -> list[tuple[str, bool, Mapping[str, Any]]]:
    """(name, required, schema that stands alone) of each parameter, the required ones first.

    Raises StatorError(UNSUPPORTED) for a name that the format cannot write, and for schemas that take too much room
    when each parameter's has to stand alone.
    """
    properties = schema.get("properties")
    required = schema.get("required") or ()
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    num_bytes = len(msgspec.json.encode(shared))
    found: list[tuple[str, bool, Mapping[str, Any]]] = []
    properties = properties if isinstance(properties, Mapping) else {}
    if len(properties) > MAX_PARAMETERS:
        raise _unsupported(f"a function may have {MAX_PARAMETERS} parameters, not {len(properties)}")
    for name, own in properties.items():
        if not names.fullmatch(name):
            raise _unsupported(f"this model's format of calls cannot name the parameter {name[:64]!r}")
        own = own if isinstance(own, Mapping) else {}
        found.append((name, name in required, {**own, **shared} if b'"$ref"' in msgspec.json.encode(own) else own))
    if num_bytes * sum(own.get("$defs", own.get("definitions")) is not None for _, _, own in found) > MAX_COPIED_BYTES:
        raise _unsupported(
            "this model's format of calls needs each parameter's schema alone, and with $defs they are too big"
        )
    return sorted(found, key=lambda each: not each[1])


def _unsupported(message: str) -> StatorError:
    return StatorError(ErrorCode.UNSUPPORTED, f"tools: {message}; leave tool_choice at auto", param="tools")


def _xml_arguments(schema: Schema) -> Node:
    """Strings are any text: a format that does not quote them cannot keep their patterns and lengths."""
    parts: list[Node] = []
    for name, required, own in _parameters(schema, _XML_NAME):
        begin = Literal(f"{qwen_xml.PARAMETER}{name}>\n")
        parameter = Sequence((begin, _xml_value(property_schema(schema, name), own, schema)))
        parts.append(parameter if required else optional(parameter))
    return Sequence(tuple(parts))


def _xml_value(resolved: Schema | None, own: Schema, root: Schema) -> Node:
    ending = f"\n{qwen_xml.PARAMETER_END}\n"
    values = None if resolved is None else resolved.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return Sequence((Choice(tuple(Literal(value) for value in values)), Literal(ending)))
    types = allowed_types(resolved, root)
    if not types or "string" in types:
        return TextUntil(ending)
    return Sequence((Json(dict(own)), Literal(ending)))


def _python_arguments(schema: Schema) -> Node:
    """Keywords in the schema's order, the required ones first; values are JSON, which the parser reads as well.

    Where none is required, one of the first MAX_LEADING has to come first.
    """
    parameters = _parameters(schema, _PYTHON_NAME)
    if not parameters:
        return NOTHING
    nodes = [Sequence((Literal(f"{name}="), Json(dict(own)))) for name, _, own in parameters]
    following: list[Node] = []
    for (_, required, _), node in zip(parameters, nodes, strict=True):
        behind_another = Sequence((Literal(", "), node))
        following.append(behind_another if required else optional(behind_another))
    if parameters[0][1]:
        return Sequence((nodes[0], *following[1:]))
    leading = [Sequence((node, *following[index + 1 :])) for index, node in enumerate(nodes[:MAX_LEADING])]
    return Choice((*leading, NOTHING))
