"""The request's fields about tools, checked and brought into one form."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from stator.core.json_schema import check_object_schema, invalid
from stator.core.tools.base import ToolSet
from stator.errors import ErrorCode, StatorError
from stator.messages.tools import AllowedToolChoice, FunctionDefinition, NamedToolChoice, Tool, ToolChoice

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 1 << 19
"""Of all schemas and descriptions together."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NAME_RULE = "1 to 64 letters, digits, underscores and dashes"


def is_name(text: str) -> bool:
    """By NAME_RULE, OpenAI's."""
    return _NAME.fullmatch(text) is not None


class CallMode(Enum):
    """AUTO: the model decides. REQUIRED: at least one call. NAMED: exactly one, of the one allowed function."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """definitions: for the chat template, in OpenAI's shape. names: of functions that may be called; fewer than are
    declared if the choice says so. is_forced: the output must be calls, by a grammar (`forced.force`)."""

    mode: CallMode = CallMode.NONE
    tools: ToolSet = field(default_factory=ToolSet)
    definitions: tuple[dict[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def is_forced(self) -> bool:
        return self.mode in (CallMode.REQUIRED, CallMode.NAMED)

    @property
    def parses_calls(self) -> bool:
        return self.mode is not CallMode.NONE


NO_TOOLS = ToolRequest()


def normalize_tools(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel_tool_calls: bool | None
) -> ToolRequest:
    """Raises StatorError(INVALID_REQUEST or UNSUPPORTED) whose param names the field, as in tools[3].function.name.

    With `none` the definitions stay, so that the prompt is that of the turns before and after.
    """
    if not tools:
        if choice in (None, "none", "auto"):
            return NO_TOOLS
        raise invalid("tool_choice", "tool_choice asks for a call, but tools is empty or absent")
    declared = _checked(tools)
    mode, names = _choice(choice, declared)
    return ToolRequest(
        mode=mode,
        tools=ToolSet({name: function.parameters for name, function in declared.items()}),
        definitions=tuple({"type": "function", "function": _builtins(each)} for each in declared.values()),
        names=names,
        parallel=parallel_tool_calls is not False and mode is not CallMode.NAMED,
    )


def _builtins(function: FunctionDefinition) -> dict[str, Any]:
    return msgspec.to_builtins(function)


def _checked(tools: Sequence[Tool]) -> dict[str, FunctionDefinition]:
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"tools has {len(tools)} entries; at most {MAX_TOOLS} are taken")
    declared: dict[str, FunctionDefinition] = {}
    num_bytes = 0
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = _function(tool, where)
        if function.name in declared:
            raise invalid(f"{where}.function.name", f"{where}.function.name: {function.name!r} is declared twice")
        if function.parameters is not None:
            num_bytes += check_object_schema(function.parameters, f"{where}.function.parameters")
        num_bytes += len((function.description or "").encode(errors="replace"))
        declared[function.name] = function
    if num_bytes > MAX_TOOLS_BYTES:
        raise invalid(
            "tools", f"tools has {num_bytes} bytes of schemas and descriptions; the limit is {MAX_TOOLS_BYTES}"
        )
    return declared


def _function(tool: Tool, where: str) -> FunctionDefinition:
    if tool.type != "function":
        raise StatorError(
            ErrorCode.UNSUPPORTED, f'{where}.type: only tools of type "function" are supported', param=f"{where}.type"
        )
    if tool.function is None:
        raise invalid(f"{where}.function", f"{where}.function is required")
    if not is_name(tool.function.name):
        raise invalid(f"{where}.function.name", f"{where}.function.name must be {NAME_RULE}")
    return tool.function


def _choice(choice: ToolChoice | None, declared: dict[str, FunctionDefinition]) -> tuple[CallMode, tuple[str, ...]]:
    match choice:
        case None | "auto":
            return CallMode.AUTO, tuple(declared)
        case "none":
            return CallMode.NONE, ()
        case "required":
            return CallMode.REQUIRED, tuple(declared)
        case NamedToolChoice():
            return CallMode.NAMED, (_declared(choice, declared, "tool_choice"),)
        case AllowedToolChoice(allowed_tools=allowed):
            where = "tool_choice.allowed_tools.tools"
            named = [_declared(each, declared, f"{where}[{index}]") for index, each in enumerate(allowed.tools)]
            if not named:
                raise invalid(where, f"{where} must not be empty")
            return CallMode(allowed.mode), tuple(dict.fromkeys(named))


def _declared(choice: NamedToolChoice, declared: dict[str, FunctionDefinition], where: str) -> str:
    name = choice.function.name
    if name not in declared:
        raise invalid(f"{where}.function.name", f"{where}.function.name: {name[:64]!r} is not among the tools")
    return name
